"""Language-model programs (arXiv 2207.10342): generator functions over local artifacts, and inference over them.

    from effc.programs import LM, forward, program, sample

    @program
    def answer(lm, question):
        thought = yield sample(lm(question, stop="\\n"), "thought")
        return (yield sample(lm(f"{question}{thought}\\n", stop="\\n"), "answer"))

    forward(answer(LM("out"), "import"), n=16).mode()

Nothing else of effc imports this; `import effc` does not either. docs/programs.md tells the rest.
"""

from effc.programs import handlers, keys
from effc.programs.calls import Cache
from effc.programs.distributions import (
    Bernoulli,
    Categorical,
    Choose,
    Constant,
    Distribution,
    Draw,
    Failed,
    Memo,
    Proposed,
    tool,
    uniform,
)
from effc.programs.effects import factor, log, observe, param, reject, sample
from effc.programs.inference import forward, likelihood_weighting, rejection, run_all
from effc.programs.lm import LM, Text
from effc.programs.program import program
from effc.programs.samples import Samples
from effc.programs.search import beam, sequential
from effc.programs.trace import Record, Trace

__all__ = [
    "LM", "Bernoulli", "Cache", "Categorical", "Choose", "Constant", "Distribution", "Draw", "Failed", "Memo",
    "Proposed", "Record", "Samples", "Text", "Trace", "beam", "factor", "forward", "handlers",
    "keys", "likelihood_weighting", "log", "observe", "param", "program", "reject", "rejection", "run_all", "sample",
    "sequential", "tool", "uniform",
]  # fmt: skip
