"""Scratchpad: notes first, then the answer, p(y | x) = sum over z of p(z | x) p(y | x, z).

    python examples/programs/scratchpad.py [MODEL]

x is a method's signature, the scratchpad z its docstring, y the first line of its body. Runs the program forward, then
scores one line after several scratchpads: the note that says what the line does makes it likelier.
"""

import sys
from pathlib import Path

from effc.programs import LM, forward, handlers, program, sample

BUNDLED = Path(__file__).parent.parent / "stdlib12" / "model.ckpt"
SIGNATURE = "    def get(self):\n"


@program
def method(lm, signature, tokens):
    note = yield sample(lm(f'{signature}        """', stop='"""', max_tokens=tokens), "scratchpad")
    body = lm(f'{signature}        """{note}"""\n        return', stop="\n", max_tokens=tokens)
    return (yield sample(body, "line"))


def main(model=BUNDLED, n=4, tokens=16):
    lm = LM(model)
    for trace in forward(method(lm, SIGNATURE, tokens), n):
        print(f"{trace['scratchpad']!r} -> 'return{trace.value}'   {trace.forwards} forwards")
    line = " self._name"
    for note in ("Return the name.", "Return the size.", "Close the file."):
        given = handlers.condition(method(lm, SIGNATURE, tokens), {"scratchpad": note, "line": line})
        print(f"log p(return{line} | {note}) = {handlers.trace(given).sites['line'].score:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
