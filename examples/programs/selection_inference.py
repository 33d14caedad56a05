"""Selection-inference: choose a fact, conclude from that fact alone, and again: p(s | facts, x) p(c | s) each hop.

    python examples/programs/selection_inference.py [MODEL]

The facts are a class's attributes; a hop chooses the one that a loop is over and writes the loop from that line alone.
Beam search keeps the chains of hops that are likeliest as a whole.
"""

import sys
from pathlib import Path

from effc.programs import LM, beam, program, sample

BUNDLED = Path(__file__).parent.parent / "stdlib12" / "model.ckpt"
FACTS = {"lines": "        self.lines = []", "count": "        self.count = 0", "name": "        self.name = name"}


@program
def hop(lm, wanted, tokens):
    facts = "\n".join(FACTS.values())
    chosen = yield sample(lm.choice(f"{facts}\n\n        {wanted} self.", list(FACTS)), "selection")
    prompt = f"{FACTS[chosen]}\n\n        {wanted} self.{chosen}"
    return chosen + (yield sample(lm(prompt, stop="\n", max_tokens=tokens), "inference"))


@program
def chain(lm, questions, tokens):
    conclusions = []
    for i, wanted in enumerate(questions):
        conclusions.append((yield hop(lm, wanted, tokens).named(f"hop{i}")))
    return conclusions


def main(model=BUNDLED, width=3, expand=4, tokens=6):
    lm = LM(model)
    samples = beam(chain(lm, ["for line in", "return"], tokens), width, expand)
    for trace in samples:
        print(f"{trace.score:7.2f}  for line in self.{trace.value[0]}  |  return self.{trace.value[1]}")
    print(samples[0])
    print(samples.attempts, "runs", lm.usage)


if __name__ == "__main__":
    main(*sys.argv[1:2])
