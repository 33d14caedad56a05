"""Orbax folders as Tensors: metadata at open, then one partial restore an array."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from effc.errors import EffcError

KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
ITEMS = ("params", "items", "default", "state")


class OrbaxTensors:
    """Leaves by their keys joined with '/'; integer keys come back as text, as Orbax stores them."""

    kinds = tuple(KINDS.values())

    def __init__(self, folder: Path):
        self.where = str(folder)
        self.folder = folder.resolve()
        self.reader = ocp.PyTreeCheckpointer()
        try:
            found: Any = self.reader.metadata(self.folder)
            self.tree = found.item_metadata.tree
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise EffcError(f"{folder}: not a readable Orbax checkpoint: {_first_line(error)}") from None
        self.leaves = {"/".join(map(str, keys)): (keys, leaf) for keys, leaf in _leaves(self.tree)}

    def names(self) -> Iterable[str]:
        return self.leaves

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(getattr(self.leaves[name][1], "shape", ()))

    def kind(self, name: str) -> str:
        dtype = str(np.dtype(self.leaves[name][1].dtype))
        return KINDS.get(dtype, dtype)

    def read(self, name: str) -> np.ndarray:
        keys, _ = self.leaves[name]
        args = ocp.RestoreArgs(restore_type=np.ndarray)
        try:
            if any(isinstance(key, int) for key in keys):
                out = self._read_in_place(keys, args)
            else:
                request = ocp.args.PyTreeRestore(_nest(keys, 0), restore_args=_nest(keys, args), partial_restore=True)
                out = self.reader.restore(self.folder, args=request)
        except (OSError, ValueError, KeyError) as error:
            raise EffcError(f"{self.where}: cannot read '{name}': {_first_line(error)}") from None
        for key in keys:
            out = out[key]
        return np.asarray(out)

    def _read_in_place(self, keys: tuple[Any, ...], args: ocp.RestoreArgs) -> Any:
        """Lists cannot be restored in part by leaving keys out: the other leaves are placeholders."""
        wanted = "/".join(map(str, keys))
        item = _map(self.tree, lambda at, _: 0 if at == wanted else ocp.PLACEHOLDER)
        request = ocp.args.PyTreeRestore(item, restore_args=jax.tree.map(lambda _: args, item))
        return self.reader.restore(self.folder, args=request)


def find_orbax(folder: Path) -> Path | None:
    """The folder itself, or its newest numbered step, or the item in it that holds parameters."""
    if (folder / "_METADATA").exists() or (folder / "manifest.ocdbt").exists():
        return folder
    inner = [folder / name for name in ITEMS]
    steps = sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: -int(p.name))
    for candidate in [*inner, *steps[:1]]:
        found = find_orbax(candidate) if candidate.is_dir() else None
        if found is not None:
            return found
    return None


def save_tree(folder: Path, tree: Any) -> None:
    """One process, arrays as they are."""
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder.resolve(), tree)


def _leaves(tree: Any, keys: tuple[Any, ...] = ()) -> Iterable[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*keys, key))
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for i, value in enumerate(tree):
            yield from _leaves(value, (*keys, i))
    elif tree is not None and getattr(tree, "dtype", None) is not None:
        yield keys, tree


def _map(tree: Any, leaf: Any, at: str = "") -> Any:
    if isinstance(tree, Mapping):
        return {key: _map(value, leaf, f"{at}/{key}") for key, value in tree.items()}
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        return [_map(value, leaf, f"{at}/{i}") for i, value in enumerate(tree)]
    return leaf(at.removeprefix("/"), tree)


def _nest(keys: Sequence[Any], leaf: Any) -> Any:
    for key in reversed(keys):
        leaf = {key: leaf}
    return leaf


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
