"""Verifiers: answers are drawn, judged, and kept if they pass: p(y | x) conditioned on every v_i saying yes.

    python examples/programs/verifiers.py [MODEL]

y is what a function returns. One verifier is Python itself: what does not parse is rejected. One is a rule: unknown
names make an answer less likely. One is the model: how likely is it that the function ends there? Best of n by weight.
"""

import ast
import builtins
import sys
from pathlib import Path

from effc.programs import LM, factor, likelihood_weighting, observe, program, sample, tool

BUNDLED = Path(__file__).parent.parent / "stdlib12" / "model.ckpt"


def unknown_names(code):
    """Names that the function neither takes nor finds among the builtins; SyntaxError where it is no Python."""
    tree = ast.parse(code)
    known = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | set(dir(builtins))
    return sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - known)


@program
def returned(lm, signature, tokens):
    code = f"{signature}\n    return"
    code += yield sample(lm(code, stop="\n", max_tokens=tokens), "answer")
    unknown = yield sample(tool(unknown_names, code, rejects=(SyntaxError,)), "parses")
    yield factor(-2.0 * len(unknown), "names")
    yield observe(lm(code), "\n\n\ndef", "ends")
    return code.split("return", 1)[1]


def main(model=BUNDLED, n=16, tokens=8):
    lm = LM(model)
    samples = likelihood_weighting(returned(lm, "def add(first, second):", tokens), n)
    failed = sum(trace.rejected is not None for trace in samples)
    print(f"{n} drawn, {failed} rejected, effective number {samples.ess:.1f}")
    for value, probability in list(samples.posterior().items())[:4]:
        print(f"{probability:6.1%}  return{value}")
    print(samples.best())


if __name__ == "__main__":
    main(*sys.argv[1:2])
