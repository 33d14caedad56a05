"""STaR: thoughts that lead to the known answer are kept to train on; where none does, the answer is given as a hint.

    python examples/programs/star.py [MODEL] [OUT.jsonl]

x is the condition of an `if` and y the exception that is right; the rationale z between them is latent. Rejection keeps
z ~ p(z | x, y); a rationale made with the hint is kept if the answer follows from it without the hint.
"""

import json
import sys
from pathlib import Path

from effc.programs import LM, handlers, program, run_all, sample

BUNDLED = Path(__file__).parent.parent / "stdlib12" / "model.ckpt"
KNOWN = {"not isinstance(x, int)": " TypeError", "x < 0": " ValueError", "key not in data": " KeyError"}


@program
def rationale(lm, condition, hint, tokens):
    """The hint is in the prompt of the rationale alone, never in that of the answer."""
    start = f"if {condition}:\n    #"
    thought = yield sample(lm(f"{start}{hint}", stop="\n", max_tokens=tokens), "rationale")
    errors = list(KNOWN.values())
    return (yield sample(lm.choice(f"{start}{thought}\n    raise", errors), "answer"))


def kept(lm, condition, hint, n, tokens):
    """Rationales whose answer is the right one, each once."""
    traces = run_all([rationale(lm, condition, hint, tokens)] * n, seed=1)
    return list(dict.fromkeys(t["rationale"] for t in traces if t.value == KNOWN[condition]))


def main(model=BUNDLED, out=None, n=8, tokens=10):
    lm, lines = LM(model), []
    for condition, error in KNOWN.items():
        found, how = kept(lm, condition, "", n, tokens), "own"
        if not found:
            found, how = kept(lm, condition, f"{error}:", n, tokens), "with a hint"
        print(f"if {condition}: raise{error}: {len(found)} of {n} kept, {how}; {found[:1]}")
        lines += [json.dumps({"x": condition, "z": str(z), "y": error}) for z in found]
        for z in found[:1]:  # what training on it would raise
            given = handlers.condition(rationale(lm, condition, "", tokens), {"rationale": z, "answer": error})
            print(f"    log p(z, y | x) = {handlers.trace(given).score:.2f}")
    if out:
        Path(out).write_text("\n".join(lines) + "\n")
    return lines


if __name__ == "__main__":
    main(*sys.argv[1:3])
