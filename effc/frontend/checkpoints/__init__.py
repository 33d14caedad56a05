"""Trained models on disk -> Source. `open_checkpoint` looks at what is there and picks the reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effc.errors import EffcError, check_exists
from effc.frontend import tokenizer
from effc.frontend.checkpoints import folder, hf, msgpack
from effc.frontend.checkpoints.folder import save_checkpoint
from effc.frontend.checkpoints.tensors import check_dtype
from effc.frontend.source import Source

__all__ = ["open_checkpoint", "save_checkpoint"]

F32 = np.dtype(np.float32)

WANTED = (
    "effc.json (an effc checkpoint), config.json and model.safetensors or flax_model.msgpack (Hugging Face), "
    "a .gguf file, or Orbax, .msgpack or .safetensors weights with --module FILE.py:FUNCTION"
)


def open_checkpoint(
    path: str | Path,
    *,
    module: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Source:
    """Reads headers only; dtype is float32 unless given or in effc.json.

    `module`, 'file.py:build' or 'package.module:build', is called with `config`, in place of what the folder
    names. Code that `module`, or the effc.json in a checkpoint, names is run: open only what you trust.
    """
    path = Path(path)
    check_exists(path)
    try:
        source = _read(path, module, dict(config or {}), check_dtype(dtype) if dtype else None)
    except OSError as error:
        raise EffcError(f"{error.filename or path}: {error.strerror or error}") from error
    if source.tokenizer is not None:
        tokenizer.Tokenizer(source.tokenizer, where=str(path)).check_fits(int(source.meta["vocab"]))
    return source


def _read(path: Path, module: str | None, config: dict[str, Any], dtype: np.dtype | None) -> Source:
    if path.is_file():
        return _read_file(path, module, config, dtype)
    if module is not None:
        return folder.open_with_module(path, module, config, dtype)
    if (path / "effc.json").exists():
        return folder.open_folder(path, config, dtype)
    if (path / "config.json").exists():
        if (path / "flax_model.msgpack").exists() and not list(path.glob("*.safetensors")):
            return msgpack.open_hf_flax(path, dtype or F32)
        return hf.open_hf(path, dtype or F32)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0], dtype)
    raise EffcError(f"{path}: no checkpoint ({_listing(path)}), want {WANTED}")


def _read_file(path: Path, module: str | None, config: dict[str, Any], dtype: np.dtype | None) -> Source:
    with path.open("rb") as f:
        magic = f.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        return _open_gguf(path, dtype)
    if module is not None:
        return folder.open_with_module(path, module, config, dtype)
    if path.suffix in (".safetensors", ".msgpack") and (path.parent / "config.json").exists():
        return _read(path.parent, None, config, dtype)
    raise EffcError(f"{path}: not a checkpoint by itself, want {WANTED}")


def _open_gguf(file: Path, dtype: np.dtype | None) -> Source:
    try:
        from effc.frontend.checkpoints import gguf  # the library is an extra
    except ModuleNotFoundError as error:
        raise EffcError(f"{file}: reading GGUF needs the {error.name} package: pip install 'effc[gguf]'") from None
    return gguf.open_gguf(file, dtype or F32)


def _listing(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    return f"holds {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else "empty"
