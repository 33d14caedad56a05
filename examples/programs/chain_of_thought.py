"""Chain of thought with self-consistency: the answer most thoughts lead to, mode over z of p(y | x, z).

    python examples/programs/chain_of_thought.py [MODEL]

x is the condition of an `if`, the thought z a comment under it, y the exception that is raised. Demonstrations
(x, z, y) come first. Prints the vote over thoughts beside the answer without any: the bundled model knows the answers
and writes comments that are noise, so that thinking helps it less than it will help a larger one.
"""

import sys
from pathlib import Path

from effc.programs import LM, forward, program, sample

BUNDLED = Path(__file__).parent.parent / "stdlib12" / "model.ckpt"
ERRORS = [" TypeError", " ValueError", " KeyError"]
DEMOS = """if not isinstance(name, str):
    # must be a string
    raise TypeError

if n > 9:
    # too many
    raise ValueError

"""


@program
def answer(lm, condition, tokens):
    start = f"{DEMOS}if {condition}:\n    #"
    thought = yield sample(lm(start, stop="\n", max_tokens=tokens, temperature=0.8), "thought")
    return (yield sample(lm.choice(f"{start}{thought}\n    raise", ERRORS), "answer"))


@program
def at_once(lm, condition):
    return (yield sample(lm.choice(f"if {condition}:\n    raise", ERRORS), "answer"))


def main(model=BUNDLED, n=16, tokens=10):
    lm = LM(model)
    for condition in ("not isinstance(x, int)", "x < 0"):
        voted, share = forward(answer(lm, condition, tokens), n).mode()
        first, alone = forward(at_once(lm, condition), 64).mode()  # one model call answers all
        print(f"if {condition}: raise{voted} by {share:.0%} of {n} thoughts; without thoughts{first} {alone:.0%}")
    print(lm.usage)


if __name__ == "__main__":
    main(*sys.argv[1:2])
