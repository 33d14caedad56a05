"""Parameters by name: which leaf of a program's tree is which, and which of them are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from effc.errors import EffcError, nearest
from effc.runtime.program import Table
from effc.runtime.qarray import QArray
from effc.runtime.train.plan import Tree
from effc.runtime.weights import parse_spec


@dataclass(frozen=True)
class Leaf:
    """Which array a leaf of a program's tree is: the i-th of a named parameter."""

    name: str
    layer: int = 0


def places(table: Table) -> Tree:
    """A tree like the program's parameters whose leaves are `Leaf`s."""
    out: dict[str, Any] = {}
    for key, entry in table.items():
        if isinstance(entry, str):
            out[key] = Leaf(parse_spec(key, entry).stored)
            continue
        specs = {k: parse_spec(f"{key}.{k}", text) for k, text in entry.items()}
        counts = {k: spec.stack or 1 for k, spec in specs.items()}
        layers = range(max(counts.values()))
        out[key] = [{k: Leaf(s.stored, i) for k, s in specs.items() if i < counts[k]} for i in layers]
    return out


def by_name(table: Table, params: Tree) -> dict[str, list[Any]]:
    """Arrays of each parameter, a list of one for what is not stacked."""
    out: dict[str, list[Any]] = {}
    for leaf, array in zip(jax.tree.leaves(places(table)), leaves(params), strict=True):
        out.setdefault(leaf.name, []).append(array)
    return out


def chosen(table: Table, names: str = "*", where: str = "trainable") -> Tree:
    """A mask for `fit`: True for parameters whose name fits the glob (a|b for several); each glob must fit one."""
    globs, tree = names.split("|"), places(table)
    known = {leaf.name for leaf in jax.tree.leaves(tree)}
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            raise EffcError(f"{where}: '{glob}' fits none of {len(known)} parameters{nearest(glob, known)}")
    return jax.tree.map(lambda leaf: any(fnmatchcase(leaf.name, glob) for glob in globs), tree)


def leaves(params: Tree) -> list[Any]:
    """Arrays, a quantized one as one."""
    return jax.tree.leaves(params, is_leaf=_quantized)


def take(params: Tree, mask: Tree) -> dict[str, jax.Array]:
    """The leaves that are trained, by path; EffcError for one that is not of floats."""
    paths = jax.tree_util.tree_flatten_with_path(params, is_leaf=_quantized)[0]
    kept = {jax.tree_util.keystr(p): x for (p, x), on in zip(paths, flags(params, mask), strict=True) if on}
    for path, leaf in kept.items():
        if _quantized(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise EffcError(f"train: {path} is no array of floats, want training before quantization")
    return kept


def put(params: Tree, kept: Mapping[str, Any], mask: Tree) -> Tree:
    """The tree with these leaves in place of those `take` took."""
    paths, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=_quantized)
    on = flags(params, mask)
    return tree.unflatten(
        [kept[jax.tree_util.keystr(p)] if flag else x for (p, x), flag in zip(paths, on, strict=True)]
    )


def flags(params: Tree, mask: Tree) -> list[bool]:
    """A flag a leaf, in the order of leaves; a bool in the mask stands for all that is under it."""
    if isinstance(mask, bool):
        return [mask] * len(leaves(params))
    if isinstance(mask, Mapping):
        return [flag for key in sorted(params) for flag in flags(params[key], mask[key])]
    return [flag for value, part in zip(params, mask, strict=True) for flag in flags(value, part)]


def _quantized(leaf: Any) -> bool:
    return isinstance(leaf, QArray)
