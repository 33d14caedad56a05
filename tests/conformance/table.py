"""`python -m tests.conformance.table` runs every check on every model and writes docs/conformance.md."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from tests.conformance.checks import CHECKS, EXACT, FACTOR, SHAPES, STEPS, Case
from tests.conformance.models import MODELS

DOC = Path(__file__).parents[2] / "docs" / "conformance.md"

HEAD = f"""# Conformance

Models that were written elsewhere, random weights, lowered untouched. Made by `python -m tests.conformance.table`;
`make conformance` runs the same checks.

- raised: every attention, norm, linear and embedding has become an op of its own; how many there are
- rolled: layers that are alike are one block; how often it runs
- logits: the emitted program against the module's own, (batch, length) = {", ".join(map(str, SHAPES))}; largest
  difference as a part of the range, at most {EXACT:.0e}
- decoding: {STEPS} steps with a cache, a ragged batch of 3, against the module's own full forward; at most {EXACT:.0e}
- quant8: every linear's weights in 8 bits, a scale a channel; the emitted program gives the logits of the decoded
  weights (at most {EXACT:.0e} apart), and they differ from the module's own by at most {FACTOR:g} times what random
  errors of half a step in the same weights do: both as a part of the range

| model | from | {" | ".join(CHECKS)} |
|---|---|{"---|" * len(CHECKS)}
"""


def cell(case: Case, check: str, why: list[str]) -> str:
    """What the check found; where it fails, the reason goes to `why`."""
    try:
        return CHECKS[check](case)
    except Exception as error:  # whatever it is, the other checks and models go on
        why.append(f"{check}: {str(error).splitlines()[0]}")
        return "FAILS"


def table() -> str:
    """A line a model, then why checks fail; models whose package is not here are told on stderr."""
    rows, reasons = "", ""
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as folder, jax.numpy_rank_promotion("allow"):
            try:
                case = Case(model, Path(folder))
            except pytest.skip.Exception as skipped:
                print(f"{name}: {skipped}", file=sys.stderr)
                continue
            why: list[str] = []
            cells = [name, model.source, *(cell(case, check, why) for check in CHECKS)]
        print(*cells, *why, sep=" | ", file=sys.stderr, flush=True)
        rows += f"| {' | '.join(cells)} |\n"
        reasons += "".join(f"- {name}, {reason}\n" for reason in why)
    return rows + (f"\n## Failing\n\n{reasons}" if reasons else "")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of packages written elsewhere
    DOC.write_text(HEAD + table())
