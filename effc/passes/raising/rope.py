"""x times cos plus its other half times sin -> rope: told by the rotation it applies at given positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from effc.frontend.graph import Graph
from effc.frontend.simplify import reshaped, transposed
from effc.ir.core import Attr, Op
from effc.ir.interpret import shape_of
from effc.ir.ops import ELEMENTWISE
from effc.ir.tokens import Dep, dependence, token_axes
from effc.ir.types import Size, Type, depends, divide, evaluate, name_dim, product
from effc.passes.raising.probe import constant_of, region, run_region, signature

B, T = name_dim("b"), name_dim("t")
MOVES = ELEMENTWISE | {
    "lax.concatenate", "lax.slice", "lax.split", "lax.reshape", "lax.broadcast_in_dim", "lax.stack", "lax.pad",
    "lax.transpose", "lax.rev", "lax.gather",
}  # fmt: skip
ANCHORS = {"lax.concatenate", "lax.add", "lax.reshape", "lax.convert_element_type", "lax.stack", "lax.sub"}
SPAN = 24
"""How many ops a rotation may be written in."""


@dataclass(frozen=True)
class Rotation:
    """Pairs of the first `dims` dims turned by position * freq, lengthened by `scale`."""

    dims: int
    style: str
    freq: tuple[float, ...]
    scale: float


def raise_ropes(graph: Graph, context: int) -> None:
    """Every rotary embedding becomes a `rope` over one table of cosines and sines."""
    ops = graph.order()
    deps = dependence(ops, [v.name for v in graph.inputs])
    positions = [op.outputs[0].name for op in ops if op.kind == "positions"]
    known: dict[str, Rotation | None] = {}
    tables: dict[Rotation, list[str]] = {}
    if not positions:
        return
    for op in reversed(ops):
        name = op.outputs[0].name
        if op.kind in ANCHORS and name == graph.find(name) and _place(op.out.type) is not None:
            _raise(graph, name, positions[0], deps, known, tables, context)


def _raise(
    graph: Graph, y: str, positions: str, deps: dict[str, Dep], known: dict[str, Rotation | None],
    tables: dict[Rotation, list[str]], context: int,
) -> None:  # fmt: skip
    for x in _sources(graph, y, positions, deps):
        text = signature(graph, [y], [x, positions])
        if text not in known:
            known[text] = _rotation(graph, x, y, positions, context)
        found = known[text]
        if found is None:
            continue
        if found not in tables:
            tables[found] = _table(graph, positions, found)
        same = reshaped(graph, x, graph.type(y).shape)
        graph.become(y, _rope(graph, same, graph.op(y), tables[found], found.style))
        return


def _rope(graph: Graph, x: str, y: Op | None, table: list[str], style: str) -> str:
    """x turned: brought to the axes that `rope` takes, and back."""
    type, place = graph.type(x), _place(graph.type(x))
    assert place is not None
    attrs: dict[str, Attr] = {} if style == "half" else {"style": style}
    split = (*type.shape[: place.batch], B, *place.merged, *type.shape[place.batch + 1 :])
    order = place.order(len(split))
    moved = transposed(graph, reshaped(graph, x, split), order)
    shape = graph.type(moved).shape
    four = Type(graph.type(y.outputs[0].name if y else x).dtype, (B, T, product(shape[2:-1]), shape[-1]))
    (made,) = graph.add(
        "rope", [reshaped(graph, moved, four.shape), *table], four, attrs=attrs, loc=y.loc if y else None
    )
    back = tuple(order.index(a) for a in range(len(order)))
    return reshaped(graph, transposed(graph, reshaped(graph, made, shape), back), type.shape)


@dataclass(frozen=True)
class Place:
    """Which axis holds the sequences, perhaps times heads, and which the tokens; the last is a head's width."""

    batch: int
    token: int
    merged: tuple[Size, ...]

    def order(self, rank: int) -> tuple[int, ...]:
        """Sequences, tokens, then the rest, once merged axes are apart."""
        token = self.token + (len(self.merged) if self.token > self.batch else 0)
        return (self.batch, token, *(a for a in range(rank) if a not in (self.batch, token)))


def _place(type: Type) -> Place | None:
    """Where a value [..., width] holds sequences and tokens; None where it could not be turned."""
    batch, tokens = [a for a, size in enumerate(type.shape) if depends(size, "b")], token_axes(type)
    if len(batch) != 1 or len(tokens) != 1 or batch == tokens or type.shape[tokens[0]] != T:
        return None
    heads = divide(type.shape[batch[0]], B)
    if heads is None or len(type.shape) - 1 in (batch[0], tokens[0]) or not isinstance(type.shape[-1], int):
        return None
    return Place(batch[0], tokens[0], () if heads == 1 else (heads,))


def _sources(graph: Graph, y: str, positions: str, deps: dict[str, Dep]) -> Iterator[str]:
    """Values that y may rotate: with as many elements, and with positions all it depends on."""
    size = product(graph.type(y).shape)
    queue, seen = [y], set[str]()
    while queue and len(seen) < SPAN:
        name = queue.pop(0)
        op = graph.op(name)
        if name in seen or op is None or deps.get(name, Dep.TOKENS) < Dep.TOKENS:
            continue
        seen.add(name)
        if name != y and product(graph.type(name).shape) == size and _only(graph, y, name, positions, deps):
            yield name
        if op.kind in MOVES:
            queue.extend(op.inputs)


def _only(graph: Graph, y: str, x: str, positions: str, deps: dict[str, Dep]) -> bool:
    """Whether y is made of x, positions and constants, and of positions at all."""
    ops = region(graph, [y], [x, positions], limit=60)
    if len(ops) > 60:
        return False
    made = {v.name for op in ops for v in op.outputs} | {x, positions}
    closed = all(i in made for op in ops for i in op.inputs)
    plain = all(op.kind in MOVES or deps.get(op.outputs[0].name, Dep.TOKENS) < Dep.TOKENS for op in ops)
    return closed and plain and any(positions in op.inputs for op in ops)


def _rotation(graph: Graph, x: str, y: str, positions: str, context: int) -> Rotation | None:
    """The rotation that y applies to x, from what becomes of unit vectors at chosen positions."""
    place, width = _place(graph.type(y)), graph.type(y).shape[-1]
    if place is None or not isinstance(width, int) or width > 1024:
        return None
    at = np.array([p for p in (0, 1, 2, 7, 64, 1000, 8000) if p < context], np.int32)
    maps = _maps(graph, x, y, positions, place, at)
    if maps is None or not np.allclose(maps[0], np.diag(np.diag(maps[0])), atol=1e-6):
        return None
    for style in ("half", "interleaved"):
        found = _read(maps, at, width, style)
        if found is not None:
            return found
    return None


def _maps(
    graph: Graph, x: str, y: str, positions: str, place: Place, at: np.ndarray
) -> np.ndarray | None:  # fmt: skip
    """[position, width in, width out] for one head: y is that of each head of x, and of no other."""
    width = evaluate(graph.type(y).shape[-1], {})
    sizes = {"b": width, "t": len(at)}
    shape = shape_of(graph.type(y), sizes)
    units = _each_unit(shape, place, width)
    mixed = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    names = [name for op in region(graph, [y], [x, positions]) for name in op.params.values()]
    params = {name: constant_of(graph, name) for name in names}
    if any(array is None for array in params.values()):
        return None
    where = np.broadcast_to(at, (width, len(at)))

    def run(given: np.ndarray) -> np.ndarray:
        feeds = {x: given.reshape(shape_of(graph.type(x), sizes)), positions: where}
        return _by_head(run_region(graph, [y], feeds, sizes, params)[0], place, width)

    maps = run(units)[:, :, 0].transpose(1, 0, 2)
    wanted = np.einsum("kphi,pio->kpho", _by_head(mixed, place, width), maps)
    return maps if np.allclose(run(mixed), wanted, atol=1e-4) else None


def _by_head(x: np.ndarray, place: Place, width: int) -> np.ndarray:
    """[sequences, tokens, heads, width], of as many sequences as the width."""
    split = (*x.shape[: place.batch], width, x.shape[place.batch] // width, *x.shape[place.batch + 1 :])
    token = place.token + (place.token > place.batch)
    return np.moveaxis(x.reshape(split), (place.batch, token), (0, 1)).reshape(width, x.shape[place.token], -1, width)


def _each_unit(shape: tuple[int, ...], place: Place, width: int) -> np.ndarray:
    """An array in which sequence k holds the k-th unit vector everywhere."""
    heads = shape[place.batch] // width
    rows = np.repeat(np.eye(width, dtype=np.float32), heads, axis=0)
    apart = [1] * len(shape)
    apart[place.batch], apart[-1] = width * heads, width
    return np.broadcast_to(rows.reshape(apart), shape)


def _read(maps: np.ndarray, at: np.ndarray, width: int, style: str) -> Rotation | None:
    """The rotation of this style that the maps are."""
    turned = [k for k in range(width) if not np.allclose(maps[:, k, k], 1, atol=1e-7)]
    span = _span(maps, width)
    if not turned or span < 2 or span % 2:
        return None
    half = span // 2
    first = np.arange(half) if style == "half" else np.arange(0, span, 2)
    second = first + (half if style == "half" else 1)
    cos, sin = maps[:, first, first], maps[:, first, second]
    scale = float(np.sqrt(cos[1, 0] ** 2 + sin[1, 0] ** 2))
    freq = _frequencies(np.arctan2(sin, cos), at)
    wanted = _expected(freq, at, width, first, second, scale)
    if not np.allclose(maps, wanted, atol=3e-4):
        return None
    return Rotation(span, style, tuple(float(f) for f in freq.astype(np.float32)), _near_one(scale))


def _span(maps: np.ndarray, width: int) -> int:
    """Dims that are turned: the rest pass unchanged."""
    still = [k for k in range(width) if np.allclose(maps[:, k], np.eye(width)[k], atol=1e-7)]
    moving = sorted(set(range(width)) - set(still))
    return moving[-1] + 1 if moving else 0


def _near_one(scale: float) -> float:
    return 1.0 if abs(scale - 1) < 1e-5 else scale


def _frequencies(angles: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Angle a position turns each pair, refined from near positions to far ones."""
    freq = angles[1].astype(np.float64)
    for row in range(2, len(at)):
        turns = np.round((freq * at[row] - angles[row]) / (2 * np.pi))
        freq = (angles[row] + 2 * np.pi * turns) / at[row]
    return freq


def _expected(
    freq: np.ndarray, at: np.ndarray, width: int, first: np.ndarray, second: np.ndarray, scale: float
) -> np.ndarray:
    out = np.broadcast_to(np.eye(width), (len(at), width, width)).copy()
    angle = at[:, None] * freq
    out[:, first, first] = out[:, second, second] = scale * np.cos(angle)
    out[:, first, second], out[:, second, first] = scale * np.sin(angle), -scale * np.sin(angle)
    return out


def _table(graph: Graph, positions: str, rotation: Rotation) -> list[str]:
    """The op that makes cosines and sines for all layers."""
    half = Type("f32", (B, T, rotation.dims // 2))
    attrs: dict[str, Attr] = {"dims": rotation.dims}
    params: dict[str, str] = {}
    theta = _geometric(rotation)
    if theta:
        attrs["theta"] = theta
    else:
        params["freq"] = graph.constant(np.array(rotation.freq, np.float32), "rope")
    if rotation.scale != 1.0:
        attrs["scale"] = rotation.scale
    return graph.add("rope_table", [positions], [half, half], params=params, attrs=attrs)


def _geometric(rotation: Rotation) -> float:
    """theta where freq is theta^(-2i/dims), else 0."""
    freq, dims = np.array(rotation.freq), rotation.dims
    if dims < 4 or (freq[0] != 1.0 and abs(freq[0] - 1) > 1e-6):
        return 0.0
    raw = float(freq[-1] ** (-dims / (dims - 2)))
    theta = float(f"{raw:.4g}")
    wanted = theta ** (-np.arange(0, dims, 2) / dims)
    return theta if np.allclose(freq, wanted, rtol=2e-6, atol=2e-10) else 0.0


__all__ = ["Op", "Rotation", "raise_ropes"]
