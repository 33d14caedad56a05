"""A cascade as a program: the small model answers where it is sure, else the large one does.

    python examples/programs/defer.py [SMALL LARGE]

By default the small model is the bundled one after quant4, made on the spot; the large one is the original. Both say
what they cost, effect by effect. `handlers.param` sets the threshold: 0 never defers, above 1 always.
"""

import sys
import tempfile
from pathlib import Path

import effc
from effc.programs import LM, forward, handlers, param, program, sample

BUNDLED = Path(__file__).parent.parent / "stdlib12" / "model.ckpt"
PROMPTS = ["import os\nimport ", "class Reader:\n    def __init__(self, name):\n        self.name", "if x:\n    raise "]


@program
def answered(small, large, prompt, tokens):
    how = {"stop": "\n", "max_tokens": tokens, "temperature": 0}
    threshold = yield param("threshold", 0.5)
    draft = yield sample(small(prompt, **how), "small")
    if draft.confidence >= threshold:
        return draft
    return (yield sample(large(prompt, **how), "large"))


def compare(small, large, tokens=8):
    """(deferred of all, tokens, forwards) for a few thresholds."""
    rows = []
    for threshold in (0.0, 0.5, 1.1):
        traces = []
        for prompt in PROMPTS:
            bound = handlers.param(answered(small, large, prompt, tokens), {"threshold": threshold})
            traces += forward(bound, 1)
        deferred = sum("large" in trace for trace in traces)
        rows.append((deferred, sum(t.tokens for t in traces), sum(t.forwards for t in traces)))
        print(f"threshold {threshold}: {deferred} of {len(PROMPTS)} deferred, tokens and forwards {rows[-1][1:]}")
    print(traces[0])
    return rows


def main(small=None, large=BUNDLED):
    if small is not None:
        return compare(LM(small), LM(large))
    with tempfile.TemporaryDirectory() as folder:
        effc.optimize(large, f"{folder}/out", "quant4", speed=False)
        return compare(LM(f"{folder}/out"), LM(large))


if __name__ == "__main__":
    main(*sys.argv[1:3])
