"""effc: a compiler for language-model efficiency.

    import effc
    report = effc.optimize("examples/stdlib12/model.ckpt", "out", "quant4")

`load` takes a checkpoint, or a Linen or NNX module with its parameters; `optimize` writes an artifact;
`Generator.open` and `open_model` open either; `parse` and `dump` turn IR into text and back.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from effc.errors import EffcError, nearest

if TYPE_CHECKING:
    from effc.api import distill, load, optimize
    from effc.artifact import Artifact
    from effc.driver import Settings
    from effc.frontend import lower
    from effc.frontend.checkpoints import save_checkpoint
    from effc.generator import Generator
    from effc.ir import Module, dump, parse
    from effc.opened import open_model
    from effc.passes import PASSES
    from effc.pipeline import Pipeline
    from effc.report import Report

_HOME = {
    "Artifact": "effc.artifact",
    "Generator": "effc.generator",
    "Module": "effc.ir",
    "PASSES": "effc.passes",
    "Pipeline": "effc.pipeline",
    "Report": "effc.report",
    "Settings": "effc.driver",
    "distill": "effc.api",
    "dump": "effc.ir",
    "load": "effc.api",
    "lower": "effc.frontend",
    "open_model": "effc.opened",
    "optimize": "effc.api",
    "parse": "effc.ir",
    "save_checkpoint": "effc.frontend.checkpoints",
}


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that `import effc` costs nothing."""
    if name == "programs":
        return import_module("effc.programs")
    if name not in _HOME:
        raise AttributeError(f"module 'effc' has no attribute '{name}'{nearest(name, _HOME)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


__all__ = [
    "PASSES", "Artifact", "EffcError", "Generator", "Module", "Pipeline", "Report", "Settings", "distill",
    "dump", "load", "lower", "open_model", "optimize", "parse", "save_checkpoint",
]  # fmt: skip
