"""Layers after an exit that keep keys and values of the exit's state: what is kept is the same whoever leaves.

As in SwiftKV (arXiv 2410.03960), whose later layers read keys and values of an earlier layer's output. The matrices
that make them begin in closed form: the ridge regression from the exit's state to what the layers kept before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from effc.ir.core import Decode, Func, Module, Op, Ref, Value, walk
from effc.ir.ops import attribute, kept
from effc.ir.rewrite import names_of, producers, prune
from effc.ir.stream import Watch, look
from effc.ir.types import Quant
from effc.passes.calm.shape import Shape
from effc.passes.ridge import Sums
from effc.weights import Array, Arrays, Lazy, Store


@dataclass(frozen=True)
class Twin:
    """A linear that keys or values are made by: what it gives in the layer, and what its copy reads at the exit."""

    op: Op
    reads: str

    @property
    def w(self) -> str:
        return self.op.params["w"]

    @property
    def bias(self) -> str | None:
        return self.op.params.get("bias")


@dataclass(frozen=True)
class Sharing:
    """Blocks (x, s, ...) -> x: `after`, whose attentions take keys and values of s; `both`, the layer as it was,
    which makes those beside."""

    after: Func
    both: Func
    twins: tuple[Twin, ...]


def shared(block: Func, keys: Func, name: str) -> Sharing:
    """The block with a second operand, the exit's state. keys: the ops of it that make keys and values."""
    names, source = names_of(block), producers(keys)
    x, *rest = block.inputs
    at_exit = Value(names.fresh("at_exit"), x.type)
    new = {value.name: value.name for value in rest} | {x.name: at_exit.name}
    made = [op for op in keys.ops if op.kind != "keep"]
    copies = [_copied(op, new, names.fresh) for op in made]
    inputs = (x, at_exit, *rest)
    ops = tuple(_redirected(op, new) if op.kind == "attention" else op for op in block.ops)
    after = prune(replace(block, name=name, inputs=inputs, ops=(*copies, *ops)))
    both = replace(block, name=f"{name}.fit", inputs=inputs, ops=(*copies, *block.ops))
    uses = [w for op in walk(after) for w in op.params.values()]
    twins = [
        Twin(op, copy.inputs[0])
        for op, copy in zip(made, copies, strict=True)
        if op.kind == "linear" and uses.count(op.params["w"]) == 1 and not _after_linear(op, source)
    ]
    return Sharing(after, both, tuple(twins))


def _copied(op: Op, new: dict[str, str], fresh: Callable[[str], str]) -> Op:
    outputs = tuple(replace(value, name=fresh(f"{value.name}.exit")) for value in op.outputs)
    copy = replace(op, inputs=tuple(new[name] for name in op.inputs), outputs=outputs)
    new |= {value.name: out.name for value, out in zip(op.outputs, outputs, strict=True)}
    return copy


def _redirected(op: Op, new: Mapping[str, str]) -> Op:
    """An attention that takes the copies of its keys, values and what goes with them."""
    first, end = op.inputs[0], 1 + len(kept(op))
    return replace(op, inputs=(first, *(new[name] for name in kept(op)), *op.inputs[end:]))


def _after_linear(op: Op, source: Mapping[str, Op]) -> bool:
    """Whether what an op reads comes of a linear: that one is fitted, and this follows."""
    above = [source[name] for name in op.inputs if name in source]
    return any(other.kind == "linear" or _after_linear(other, source) for other in above)


def parted(shape: Shape, at: int, block: str) -> Func:
    """The forward function whose layers from the `at`-th on run the block, with the state before them as second
    operand."""
    whole, names = shape.repeat, names_of(shape.forward)
    rest = whole.inputs[1:]
    exit = Value(names.fresh(f"{whole.out.name}.exit"), shape.state)
    first = replace(whole, outputs=(exit,), attrs={**whole.attrs, "times": at})
    told = {"block": Ref(block), "times": shape.layers - at, "start": at}
    later = replace(whole, inputs=(exit.name, exit.name, *rest), attrs={**whole.attrs, **told})
    ops = [[first, later] if op is whole else [op] for op in shape.forward.ops]
    return replace(shape.forward, ops=tuple(op for some in ops for op in some))


# -- the beginning, in closed form --------------------------------------------------------------------------


@dataclass
class _Watched:
    """Sums by twin and layer, as the text goes through."""

    sharing: Sharing
    sums: dict[tuple[str, int], Sums] = field(default_factory=dict[tuple[str, int], Sums])

    def see(self, func: str, layer: int, values: Mapping[str, jax.Array]) -> None:
        for twin in self.sharing.twins:
            new, old = Sums.of(values[twin.reads], values[twin.op.out.name]), self.sums.get((twin.w, layer))
            self.sums[twin.w, layer] = new if old is None else old + new


def fitted(
    sharing: Sharing, shape: Shape, at: int, before: Module, store: Store, tokens: Sequence[Array]
) -> tuple[list[Lazy], float]:
    """Arrays of the matrices that make keys and values, those of layers from the `at`-th on fitted to what the layers
    of `before` kept of a text i32[b,t]; and the mean share that is left unexplained."""
    twins = tuple(twin for twin in sharing.twins if not isinstance(before.params[twin.w].type.dtype, Quant))
    if not twins:
        return [], 1.0
    sharing = replace(sharing, twins=twins)
    forward = parted(shape, at, sharing.both.name)
    funcs = {**before.funcs, sharing.both.name: sharing.both, forward.name: forward}
    module = replace(before, funcs=funcs, decode=Decode("greedy", {"forward": Ref(forward.name)}))
    watched = _Watched(sharing)
    names = {name for twin in twins for name in (twin.reads, twin.op.out.name)}
    look(
        module, store, [jnp.asarray(chunk) for chunk in tokens], Watch({sharing.both.name: sorted(names)}, watched.see)
    )
    made, left = list[Lazy](), list[float]()
    for twin in twins:
        sums = {layer: watched.sums[twin.w, layer] for layer in range(at, shape.layers)}
        solved = {layer: mine.solved(_bias(twin, store, layer)) for layer, mine in sums.items()}
        left += [share for _, share in solved.values()]
        nk = attribute(twin.op, "layout") == "nk"
        made.append(_lazy(store[twin.w], {layer: w.T if nk else w for layer, (w, _) in solved.items()}))
    return made, float(np.mean(left))


def _bias(twin: Twin, store: Store, layer: int) -> Array | None:
    return None if twin.bias is None else store[twin.bias].read(layer)[""].astype(np.float32)


def _lazy(old: Lazy, new: Mapping[int, np.ndarray]) -> Lazy:
    """A parameter some arrays of which are new."""

    def read(layer: int) -> Arrays:
        before = old.read(layer)
        return {"": new[layer].astype(before[""].dtype)} if layer in new else before

    return Lazy(old.param, read)


__all__ = ["Sharing", "fitted", "parted", "shared"]
