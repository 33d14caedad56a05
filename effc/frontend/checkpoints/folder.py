"""effc's own checkpoint folder, and any weights whose module the user names.

model.ckpt/
  effc.json       {"format": 1, "module": "model.py:build", "config": {...}, "params": "params",
                   "tokenizer": "tokenizer.json", "dtype": "float32", "context": 512}
  model.py        build(**config) -> a Linen or NNX module; or "module": "package.module:build"
  params/         Orbax: the parameter tree
  tokenizer.json  and, if wanted, tokenizer_config.json, generation_config.json, chat_template.jinja
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from effc.errors import EffcError, nearest
from effc.frontend.adapt import vocab_of
from effc.frontend.checkpoints.hf import kinds_of, read_json, safetensors_in, tokenizer_in
from effc.frontend.checkpoints.msgpack import MsgpackTensors
from effc.frontend.checkpoints.orbax import OrbaxTensors, find_orbax, save_tree
from effc.frontend.checkpoints.safetensor_files import SafetensorFiles
from effc.frontend.checkpoints.tensors import Tensors, check_dtype, match_by_path
from effc.frontend.checkpoints.user_code import adapt_model, load_build, split_ref
from effc.frontend.source import Source, TokenizerFiles, flatten

FORMAT = 1
KEYS = ("format", "module", "config", "params", "tokenizer", "dtype", "context")

# Saved beside the parameters by training code, used by no forward pass.
TRAINING_STATE = r"(^|[/.])(opt_state|step|rngs?|key|count|loss_scale)([/.]|$)"


def open_folder(folder: Path, config: Mapping[str, Any], dtype: np.dtype | None, module: str | None = None) -> Source:
    """A folder with effc.json. Runs the code it names: open only what you trust."""
    settings = read_settings(folder / "effc.json")
    params = folder / settings.get("params", "params")
    if not params.exists():
        raise EffcError(f"{folder / 'effc.json'}: params '{params.name}' is not there, want an Orbax folder")
    return build_source(
        where=folder,
        tensors=tensors_in(params),
        module=_module(module, settings["module"]),
        config={**settings.get("config", {}), **config},
        dtype=dtype or check_dtype(settings.get("dtype", "float32")),
        tokenizer=_tokenizer(folder, settings),
        context=settings.get("context"),
    )


def _module(asked: str | None, own: str) -> str:
    """The module asked for, or the folder's own, with the inputs asked for."""
    if asked and asked.startswith("("):
        return own.partition("(")[0] + asked
    return asked or own


def open_with_module(path: Path, module: str, config: Mapping[str, Any], dtype: np.dtype | None) -> Source:
    """Weights of any format under the names that the module's own code gives its parameters."""
    if (path / "effc.json").exists():
        return open_folder(path, config, dtype, module)
    folder = path if path.is_dir() else path.parent
    tokenizer = tokenizer_in(folder) or tokenizer_in(folder.parent)
    return build_source(path, tensors_in(path), module, config, dtype or np.dtype(np.float32), tokenizer, None)


def build_source(
    where: Path,
    tensors: Tensors,
    module: str,
    config: Mapping[str, Any],
    dtype: np.dtype,
    tokenizer: TokenizerFiles | None,
    context: int | None,
) -> Source:
    folder = where if where.is_dir() else where.parent
    module, inputs = split_ref(module)
    forward, spec = adapt_model(load_build(module, folder), config, dtype, module, inputs)
    weights = match_by_path(tensors, flatten(spec), TRAINING_STATE)
    kind = type(tensors).__name__.removesuffix("Tensors").removesuffix("Files").lower()
    meta = {
        "format": kind,
        "module": module,
        "stored": kinds_of(tensors),
        "file": where.resolve().name,
        "dtype": dtype.name,
        "vocab": vocab_of(forward, spec, module),
    }
    stem = where.resolve().stem
    name = where.resolve().parent.name if stem == "model" else stem
    return Source(name, forward, spec, weights, tokenizer, context, meta)


def tensors_in(path: Path) -> Tensors:
    """Orbax folder, msgpack file, or safetensors: by what is there."""
    if path.suffix == ".msgpack":
        return MsgpackTensors(path)
    if path.suffix == ".safetensors":
        return SafetensorFiles([path], str(path))
    found = find_orbax(path) if path.is_dir() else None
    if found is not None:
        return OrbaxTensors(found)
    packed = sorted(path.glob("*.msgpack")) if path.is_dir() else []
    if len(packed) == 1:
        return MsgpackTensors(packed[0])
    if path.is_dir() and list(path.glob("*.safetensors")):
        return safetensors_in(path)
    raise EffcError(f"{path}: no weights, want an Orbax folder, a .msgpack or .safetensors file")


def read_settings(file: Path) -> dict[str, Any]:
    settings = read_json(file)
    for key in settings:
        if key not in KEYS:
            raise EffcError(f"{file}: no setting '{key}', want {', '.join(KEYS)}{nearest(key, KEYS)}")
    if settings.get("format") != FORMAT:
        raise EffcError(f"{file}: format {settings.get('format')}, want {FORMAT}")
    if "module" not in settings:
        raise EffcError(f"{file}: no 'module', want FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION")
    return settings


def save_checkpoint(
    path: str | Path,
    module: str,
    config: Mapping[str, Any],
    params: Any,
    tokenizer: str | Path | None = None,
    *,
    context: int | None = None,
    dtype: str = "float32",
) -> Path:
    """Writes a folder that open_checkpoint reads; 'file.py:build' is copied in, params may be nnx.State."""
    path = Path(path)
    if path.exists():
        raise EffcError(f"{path}: is there already, want a new folder")
    settings = {
        "format": FORMAT,
        "module": module,
        "config": dict(config),
        "params": "params",
        "dtype": dtype,
    }
    check_dtype(dtype)
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    file, _, function = module.rpartition(":")
    if file.endswith(".py"):
        shutil.copy(file, partial)
        settings["module"] = f"{Path(file).name}:{function}"
    if tokenizer is not None:
        shutil.copy(tokenizer, partial / "tokenizer.json")
        settings["tokenizer"] = "tokenizer.json"
    if context is not None:
        settings["context"] = context
    save_tree(partial / "params", nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params)
    (partial / "effc.json").write_text(json.dumps(settings, indent=2) + "\n")
    partial.rename(path)
    return path


def _tokenizer(folder: Path, settings: Mapping[str, Any]) -> TokenizerFiles | None:
    name = settings.get("tokenizer")
    if name is None:
        return None
    file = folder / name
    if not file.exists():
        raise EffcError(f"{folder / 'effc.json'}: tokenizer '{name}' is not there, want a tokenizer.json")
    beside = tokenizer_in(file.parent)
    return TokenizerFiles(file.read_bytes(), beside.extra if beside else {})
