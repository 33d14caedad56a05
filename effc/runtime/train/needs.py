"""Libraries that only training needs, imported when it begins."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from effc.errors import EffcError


def optax() -> Any:
    """The optimizers."""
    _imported("optax.contrib", "optax")
    return _imported("optax", "optax")


def orbax() -> Any:
    """The checkpoints."""
    return _imported("orbax.checkpoint", "orbax-checkpoint")


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise EffcError(
            f"training needs {package}, which is not installed ({error}): pip install 'effc[train]'"
        ) from None
