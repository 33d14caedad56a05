"""Training that goes on where it was left: state and history of a run, by Orbax, a folder a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effc.runtime.train import needs
from effc.runtime.train.plan import Plan, Tree
from effc.runtime.train.tree import flags

KEPT = 2
"""Checkpoints that stay: the last one might be damaged."""


def fingerprint(plan: Plan, params: Tree, mask: Tree, tag: str = "") -> str:
    """Of all that decides where a run goes: what is trained, from which arrays, by which plan; tag is the caller's."""
    # the folder and how often it is saved to are no part of what a plan shows
    return digest(params, f"{plan!r}|{tag}|{flags(params, mask)}")


def digest(params: Tree, more: str = "") -> str:
    """A name for these very arrays, 24 hexadecimal digits."""
    found = hashlib.blake2b(more.encode(), digest_size=12)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data if array.size else b"")
    return found.hexdigest()


class Checkpoints:
    """Saves and restores (state, facts) by step; with no folder it does nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._manager: Any = None
        if folder is not None:
            orbax = needs.orbax()
            folder.mkdir(parents=True, exist_ok=True)
            # In step with training: buffers that a save still reads would be overwritten by the next step.
            options = orbax.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
            self._manager = orbax.CheckpointManager(folder.resolve(), options=options)

    def latest(self, state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The last state saved, in the form of `state`, and the facts saved with it."""
        if self._manager is None or self._manager.latest_step() is None:
            return None
        args = needs.orbax().args
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        both = args.Composite(state=args.StandardRestore(abstract), facts=args.JsonRestore())
        found = self._manager.restore(self._manager.latest_step(), args=both)
        return found["state"], dict(found["facts"])

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Keep both under this step; a step that is there stays as it is."""
        if self._manager is None or step in self._manager.all_steps():
            return
        args = needs.orbax().args
        self._manager.save(step, args=args.Composite(state=args.StandardSave(state), facts=args.JsonSave(dict(facts))))

    def close(self) -> None:
        """Wait for what is being written."""
        if self._manager is not None:
            self._manager.close()
