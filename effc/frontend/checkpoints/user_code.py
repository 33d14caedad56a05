"""Models that come with their own code: 'file.py:build' or 'package.module:build', called with a config."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from effc.errors import EffcError, nearest
from effc.frontend import adapt
from effc.frontend.adapt import Forward
from effc.frontend.source import PyTree, Spec

Build = Callable[..., Any]


def split_ref(ref: str) -> tuple[str, str]:
    """`model.py:build(ids=tokens,mask=causal)`: the function, and what its module's arguments are given."""
    name, bracket, rest = ref.partition("(")
    if not bracket:
        return ref, ""
    if not rest.endswith(")"):
        raise EffcError(f"module '{ref}': want FILE.py:FUNCTION(ARGUMENT=ROLE,...)")
    if not name:
        raise EffcError(f"inputs {rest[:-1]}: want --module FILE.py:FUNCTION too, whose arguments they are")
    return name, rest[:-1]


def load_build(ref: str, folder: Path) -> Build:
    """Runs the named file (looked for in folder, then in the current one) or imports the named module."""
    name, _, function = ref.rpartition(":")
    if not name or not function.isidentifier():
        raise EffcError(f"module '{ref}': want FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION")
    code = _run_file(ref, name, folder) if name.endswith(".py") else _import(ref, name)
    build = getattr(code, function, None)
    if build is None:
        public = [n for n, v in vars(code).items() if callable(v)]
        raise EffcError(f"module '{ref}': '{name}' has no '{function}'{nearest(function, public)}")
    return build


def adapt_model(
    build: Build, config: Mapping[str, Any], dtype: np.dtype, where: str, inputs: adapt.Inputs = ""
) -> tuple[Forward, PyTree]:
    """Forward and spec of build(**config), floating parameters as dtype; NNX models are not initialised."""
    module = _call_abstractly(build, config, where)
    if isinstance(module, nnx.Module):
        forward, spec = adapt.from_nnx(lambda: build(**config), where, inputs)
    elif isinstance(module, linen.Module):
        forward, spec = adapt.from_linen(build(**config), where=where, inputs=inputs)
    else:
        raise EffcError(f"{where}: build returned {type(module).__name__}, want a flax.linen or flax.nnx Module")

    def as_dtype(leaf: Spec) -> Spec:
        return (
            Spec(leaf.shape, dtype) if np.issubdtype(leaf.dtype, np.floating) or leaf.dtype.name == "bfloat16" else leaf
        )

    return forward, jax.tree.map(as_dtype, spec)


def _call_abstractly(build: Build, config: Mapping[str, Any], where: str) -> Any:
    """What build returns, without making arrays: under tracing an NNX model's parameters are only shapes."""
    made = []

    def probe() -> None:
        made.append(build(**config))

    try:
        jax.eval_shape(probe)
    except TypeError as error:
        # A wrong config key is the user's to mend; any other fault inside build keeps its traceback.
        if "argument" not in str(error):
            raise
        raise EffcError(f"{where}: build cannot take this config: {error}") from error
    return made[0]


def _run_file(ref: str, name: str, folder: Path) -> ModuleType:
    tried = [folder / name, Path(name)]
    file = next((p for p in tried if p.is_file()), None)
    if file is None:
        raise EffcError(f"module '{ref}': no file {' or '.join(map(str, dict.fromkeys(tried)))}")
    key = f"effc_user_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(key, file)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.modules[key] = code  # dataclasses look their module up there
    sys.path.insert(0, str(file.parent.resolve()))  # so that the file can import its neighbours
    try:
        spec.loader.exec_module(code)
    finally:
        sys.path.remove(str(file.parent.resolve()))
    return code


def _import(ref: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise EffcError(f"module '{ref}': {error}; a file is written with its .py: path/to/model.py:build") from None
