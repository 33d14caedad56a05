"""Which equations a native region takes, and the ops they become."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.extend.core import Literal

from effc.runtime.kernels.region import program as ops
from effc.runtime.kernels.region import record
from effc.runtime.kernels.region.flat import Step
from effc.runtime.kernels.region.program import NOWHERE, Place, Slot
from effc.runtime.packed import Packed

if TYPE_CHECKING:
    from effc.runtime.kernels.region.form import Former

FUNCTIONS = (
    "add", "sub", "mul", "div", "max", "min", "neg", "exp", "tanh", "logistic", "square", "integer_pow", "sqrt",
    "rsqrt", "erf", "erfc", "copy",
)  # fmt: skip
"""Elementwise primitives in the order of rowops.h."""

COPY = FUNCTIONS.index("copy")

LONGEST = 128
"""Numbers that share a scale at most, as linear.h rounds them."""

SPAN, FEW = 128, 8
"""Keys that one task of attention takes, and tokens up to which it takes no more; SPAN is attention.h's too."""

ROWS, COLUMNS = 16, 8
"""Rows up to which products with floats are native; columns from which on: fewer are scores, not layers."""

_VIEWS = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "slice", "concatenate"})
_NONE = Place(NOWHERE, 1, 1, 0)
_KINDS = ("float32", "float16", "int8", "uint8")
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and their width: axes b and t are rows, or all but the last where there are fewer than three."""
    cut = 2 if len(shape) > 2 else max(len(shape) - 1, 0)
    return math.prod(shape[:cut]), math.prod(shape[cut:])


def room(rows: int, width: int) -> Place:
    """Scratch memory for a value."""
    return Place(Slot(4 * rows * width), rows, width, width)


def is_view(step: Step) -> bool:
    """Whether it computes nothing, or only what attention reads as it lies, or whole numbers that are only told.

    It waits until the region ends, unless something that cannot wait reads it.
    """
    counts = step.name == "convert_element_type" and np.issubdtype(step.out().dtype, np.integer)
    return counts or step.name in _VIEWS or is_layer(step, "held") or bool(_group_of(step))


def _group_of(step: Step) -> int:
    """Numbers that share a scale, of a step that rounds to 8 bits as products do by themselves; else 0.

    Products read what it rounds, and round it; what else reads it has it made.
    """
    if not is_layer(step, "fake_quant"):
        return 0
    asked = dict(step.params["keywords"])
    known = asked["bits"] == 8 and asked.get("of", "value") == "value" and len(step.ins) == 1
    group = int(asked.get("group", 0))
    return group if known and group % 4 == 0 and group <= LONGEST else 0


def is_layer(step: Step, name: str) -> bool:
    """Whether it is a recorded layer of that name."""
    return step.eqn.primitive is record.LAYER and step.params["name"] == name


def reference(step: Step, args: Sequence[Any]) -> Any:
    """A recorded layer's result by its own function."""
    return record.reference(*args, **step.params)


def join(former: Former, step: Step) -> bool:
    """Adds the step to the open region; whether it could."""
    if step.eqn.primitive is record.LAYER:
        take = _LAYERS.get(step.params["name"])
        wide = is_wide(step.out()) or take is _append
        return take is not None and wide and take(former, step, Args(former, step))
    if not any(former.inside(atom) for atom in step.ins):
        return False
    if step.name in FUNCTIONS:
        return _map(former, step)
    take = _OTHERS.get(step.name)
    return take is not None and step.ins[0] not in former.caches and take(former, step)


def is_wide(aval: Any) -> bool:
    """Whether it is f32, and not empty."""
    return aval.dtype == np.float32 and 0 not in aval.shape


class Args:
    """The arguments of a recorded layer: atoms where it has arrays."""

    def __init__(self, former: Former, step: Step):
        self.former = former
        avals: list[Any] = [var.aval for var in step.eqn.invars]
        self.types: dict[Any, Any] = dict(enumerate(avals))
        self.atoms = step.ins
        self.values: Any = jax.tree.unflatten(step.params["tree"], range(len(avals)))
        self.keywords = dict(step.params["keywords"])

    def place(self, number: Any, exact: bool = True) -> Place | None:
        """Of an argument that is f32 (or nothing: the place that is nowhere); else of what it is rounded from."""
        if number is None:
            return _NONE
        if self.types[number].dtype != np.float32:
            return None
        atom = self.atoms[number]
        return self.former.place(atom if exact else self.former.views[atom].ins[0])

    def rounded(self, number: Any) -> int:
        """Numbers that share a scale, of an argument that is to be rounded to 8 bits; else 0."""
        view = self.former.views.get(self.atoms[number])
        return _group_of(view) if view is not None else 0

    def slot(self, number: Any) -> Slot | None:
        """Of a whole array."""
        if number is None:
            return NOWHERE
        found = self.former.place(self.atoms[number])
        return None if found is None or found.offset else found.slot

    def numbers(self, number: Any) -> Slot | None:
        """Of an array i32."""
        atom = self.atoms[number]
        if self.types[number].dtype != np.int32 or isinstance(atom, Literal):
            return None
        if atom in self.former.counts:
            return self.former.counts[atom]
        made = self.former.places.get(atom)
        if made is not None:  # the likeliest tokens, one after another
            return None if made.offset or made.slot.size != 4 * made.rows * made.width else made.slot
        array = self.outside(number)
        return None if array is None else self.former.program.input(array)

    def matrix(self, number: Any) -> Any:
        """An array [m,n] of floats, as they lie, that is not the region's; None where it is no such array."""
        aval = self.types.get(number)
        if aval is None or len(aval.shape) != 2 or aval.dtype.name not in TYPES:
            return None
        return self.outside(number)

    def outside(self, number: Any) -> Any:
        """An array that is not the region's; None where it is."""
        atom = self.atoms[number]
        return None if isinstance(atom, Literal) or self.former.inside(atom) else self.former.values[atom]


def _norm(former: Former, step: Step, args: Args) -> bool:
    number, scale, bias = (*args.values, None, None)[:3]
    x, scale, bias = args.place(number), args.place(scale), args.place(bias)
    if x is None or scale is None or bias is None:
        return False
    last = step.shape()[-1]
    if x.width % last:
        return False
    y, keywords = room(x.rows, x.width), args.keywords
    numbers = [x.width // last, last, keywords["kind"] == "layer", float(keywords["eps"])]
    words = [x, y, scale.slot, bias.slot, *numbers, float(keywords.get("offset", 0.0))]
    former.program.by_rows(ops.NORM, words, [x.slot, scale.slot, bias.slot], y.slot, x.rows)
    former.places[step.outs[0]] = y
    return True


def _linear(former: Former, step: Step, args: Args) -> bool:
    number, w, bias = (*args.values, None)[:3]  # numbers of arguments, or for w a Packed of them
    group = args.rounded(number) if isinstance(w, Packed) else 0
    x, bias, shape = args.place(number, exact=not group), args.place(bias), step.shape()
    x = x and x.reshaped(math.prod(shape[:-1]), shape[-1])
    if x is None or bias is None:
        return False
    made = _coded(former, args, x, w, bias, group) if isinstance(w, Packed) else _dense(former, args, x, w, bias)
    if made is None:
        return False
    former.places[step.outs[0]] = made
    return True


def _coded(former: Former, args: Args, x: Place, w: Any, bias: Place, group: int) -> Place | None:
    """x times packed codes; group: numbers of x that share a scale, where they are said to be rounded."""
    if args.keywords.get("layout", "kn") != w.layout or args.types[w.scales].dtype.name not in TYPES:
        return None
    if args.outside(w.codes) is None or args.outside(w.scales) is None:
        return None
    codes, scales, zeros = (args.slot(part) for part in (w.codes, w.scales, w.zeros))
    assert codes and scales and zeros
    piece, digits, whole = group or w.piece, 1 if group else former.digits, w.group or w.extent
    if whole % piece and whole < w.extent:  # a piece lies in one group of weights
        return None
    quantized, block = _quantized(former, x, piece, digits)
    y = room(x.rows, w.columns)
    parts = [quantized, codes, scales, zeros, bias.slot]
    numbers = [block, x.rows, x.width, w.columns, w.bits, whole, piece, digits]
    words = [x, y, *parts, *numbers, TYPES[args.types[w.scales].dtype.name]]
    former.program.together(ops.LINEAR, words, [x.slot, *parts], y.slot)
    return y


def _dense(former: Former, args: Args, x: Place, w: Any, bias: Place) -> Place | None:
    """x times floats as they lie, where it has few rows: XLA's products of many are as good."""
    layout, array = args.keywords.get("layout", "kn"), args.matrix(w)
    if array is None or x.rows > ROWS:
        return None
    inner, outer = array.shape if layout == "kn" else array.shape[::-1]
    if outer <= COLUMNS:
        return None
    y, table = room(x.rows, outer), former.program.input(array)
    words = [x, y, table, bias.slot, x.rows, inner, outer, layout == "nk", TYPES[array.dtype.name]]
    former.program.together(ops.PRODUCT, words, [x.slot, table, bias.slot], y.slot)
    return y


def _quantized(former: Former, x: Place, piece: int, digits: int) -> tuple[Slot, int]:
    """x as integers, made once for all products that read it; and the bytes of a row."""
    pieces, wide = -(-x.width // piece), -(-x.width // 64) * 64
    block = -(-(digits * wide + 8 * pieces + 4) // 64) * 64
    key = (id(x.slot), x.offset, x.stride, x.rows, x.width, piece, digits)
    if key not in former.quantized:
        slot = Slot(x.rows * block)
        former.quantized[key] = slot
        former.program.by_rows(ops.QUANTIZE, [x, slot, block, x.width, piece, digits], [x.slot], slot, x.rows)
    return former.quantized[key], block


def _rope(former: Former, step: Step, args: Args) -> bool:
    x, cos, sin = (args.place(number) for number in args.values)
    if x is None or cos is None or sin is None:
        return False
    heads, width = step.shape()[2:]
    half, y = step.shape(1)[-1], room(x.rows, x.width)
    if cos.stride != half or sin.stride != half or cos.rows != x.rows or cos.offset or sin.offset:
        return False
    words = [x, y, cos.slot, sin.slot, heads, width, half, args.keywords.get("style", "half") == "interleaved"]
    former.program.by_rows(ops.ROPE, words, [x.slot, cos.slot, sin.slot], y.slot, x.rows)
    former.places[step.outs[0]] = y
    return True


def _append(former: Former, step: Step, args: Args) -> bool:
    """A row of a cache [b*g,S,m] for each new token, in place: nothing else may read the old cache."""
    old, new, lengths = args.values
    x, counts, aval = args.place(new), args.numbers(lengths), args.types[old]
    if x is None or counts is None or len(aval.shape) != 3:
        return False
    _, tokens, heads, width = step.shape(1)
    kind = _kind(aval.dtype)
    if kind is None or (aval.dtype == np.uint8 and width % 2):
        return False
    slot = _grown(former, args.atoms[old])
    if slot is None:
        return False
    words = [x, slot, counts, tokens, heads, width, aval.shape[1], kind]
    former.program.by_rows(ops.APPEND, words, [x.slot, counts], slot, x.rows)
    former.places[step.outs[0]] = Place(slot, 1, slot.size // 4, slot.size // 4)
    former.caches[step.outs[0]] = slot
    return True


def _grown(former: Former, old: Any) -> Slot | None:
    """Where a cache lies that nothing but this step reads from now on; the region may have grown it before."""
    if former.last[old] != former.at:
        return None
    if former.inside(old):
        return former.caches.get(old)
    cache = former.values[old]
    grown = former.updated.pop(id(cache), None)
    if grown is None and former.program.takes(cache):
        return None
    return grown or former.program.update(cache)


def _kind(dtype: Any) -> int | None:
    """How a cache of that dtype keeps its rows, by its number in rows.h."""
    return _KINDS.index(dtype.name) if dtype.name in _KINDS else None


def _attention(former: Former, step: Step, args: Args) -> bool:
    q, keys, values, positions, *more = args.values
    bias, keyed, asked, sinks = (*more, *(None,) * 4)[:4]
    if bias is not None or keyed or asked:
        return False
    x, sink = args.place(q), args.place(sinks)
    stored = [_cache_of(former, args.atoms[number]) for number in (keys, values)]
    where = args.numbers(positions)
    if x is None or sink is None or None in stored or where is None:
        return False
    former.places[step.outs[0]] = _attended(former, step, args, x, [*stored, where, sink.slot])
    return True


def _attended(former: Former, step: Step, args: Args, x: Place, arrays: list[Any]) -> Place:
    """Few tokens: stretches of keys are shared among threads, and what they come to is joined."""
    batch, tokens, heads, width = step.shape()
    _, capacity, groups, value_width = step.shape(2)
    seen = [capacity, args.keywords.get("window", 0)]
    kinds = [_KINDS.index(slot.dtype) for slot in arrays[:2]]
    spans = -(-capacity // SPAN) if tokens <= FEW else 0
    y = room(x.rows, heads * value_width)
    parts = Slot(4 * x.rows * spans * heads * (value_width + 2)) if spans else NOWHERE
    sizes = [batch, tokens, heads, groups, width, value_width, *kinds, spans, *seen]
    numbers = [float(args.keywords.get("scale", 1.0)), float(args.keywords.get("softcap", 0.0))]
    words = [x, y if not spans else _NONE, *arrays, parts, *sizes, *numbers]
    former.program.together(ops.ATTENTION, words, [x.slot, *arrays], parts if spans else y.slot)
    if spans:
        _, _, positions, sinks = arrays
        joined = [y, parts, positions, sinks, heads, value_width, spans, *seen]
        former.program.by_rows(ops.JOIN, joined, [parts, positions, sinks], y.slot, x.rows)
    return y


def _cache_of(former: Former, atom: Any) -> Slot | None:
    """The cache [b*g,S,m] that a value [b,S,g,d] is what it holds of."""
    view = former.views.get(atom)
    return former.caches.get(view.ins[0]) if view is not None and is_layer(view, "held") else None


def _map(former: Former, step: Step) -> bool:
    """An elementwise function of values in the same rows, or of such a value and one number."""
    if not is_wide(step.out()) or (step.name == "integer_pow" and step.params["y"] not in (2, 3)):
        return False
    rows, width = rows_of(step.out().shape)
    found = [_operand(former, step, i, rows, width) for i in range(len(step.ins))]
    operands = [operand for operand in found if operand is not None]
    if len(operands) < len(found):
        return False
    operands += [(_NONE, 0, 0.0)] * (2 - len(operands))
    (a, a_step, first), (b, b_step, second) = operands
    y = room(rows, width)
    words = [y, a, b, _function(step), width, a_step, b_step, first + second]
    former.program.by_rows(ops.MAP, words, [a.slot, b.slot], y.slot, rows)
    former.places[step.outs[0]] = y
    return True


def _function(step: Step) -> int:
    """Its number in rowops.h."""
    square = step.name == "integer_pow" and step.params["y"] == 2
    return FUNCTIONS.index("square" if square else step.name)


def _operand(former: Former, step: Step, i: int, rows: int, width: int) -> tuple[Place, int, float] | None:
    """Place, step (0: one number for all) and, for a literal, the number."""
    atom, shape = step.ins[i], step.shape(i)
    if isinstance(atom, Literal):
        return (_NONE, 0, float(np.asarray(atom.val))) if np.ndim(atom.val) == 0 else None
    place = former.place(atom)
    if place is None or step.eqn.invars[i].aval.dtype != np.float32:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    if not shape:
        return Place(place.slot, 1, 1, 0, place.offset), 0, 0.0
    lies = place.reshaped(rows, width)
    return None if lies is None else (lies, 1, 0.0)


def _reshape(former: Former, step: Step) -> bool:
    """The same numbers in the same rows, or in others where they lie so."""
    place = former.places.get(step.ins[0])
    if place is None or not (is_wide(step.out()) or place.slot.dtype == "int32"):
        return False
    lies = place.reshaped(*rows_of(step.out().shape))
    if lies is None:
        return False
    former.places[step.outs[0]] = lies
    return True


def columns_of(step: Step) -> tuple[int, int] | None:
    """From where to where, if the step is a slice of the last axis of f32 of up to three axes."""
    if step.name != "slice" or not is_wide(step.out()) or len(step.shape()) > 3:
        return None
    start, limit, strides = (step.params[name] for name in ("start_indices", "limit_indices", "strides"))
    rest = all(a == 0 and b == n for a, b, n in zip(start[:-1], limit[:-1], step.shape()[:-1]))
    return (start[-1], limit[-1]) if rest and set(strides or (1,)) == {1} else None


def _slice(former: Former, step: Step) -> bool:
    """Some of the last axis."""
    place, columns = former.places.get(step.ins[0]), columns_of(step)
    if place is None or columns is None:
        return False
    former.places[step.outs[0]] = place.columns(*columns)
    return True


def _split(former: Former, step: Step) -> bool:
    place, shape = former.places.get(step.ins[0]), step.shape()
    if place is None or len(shape) > 3 or step.params["axis"] != len(shape) - 1:
        return False
    start = 0
    for number, size in zip(step.outs, step.params["sizes"], strict=True):
        former.places[number] = place.columns(start, start + size)
        start += size
    return True


def _concatenate(former: Former, step: Step) -> bool:
    """Values side by side along the last axis."""
    shape = step.out().shape
    if not is_wide(step.out()) or step.params["dimension"] != len(shape) - 1 or len(shape) > 3:
        return False
    rows, width = rows_of(shape)
    parts = [former.place(atom) for atom in step.ins]
    lie = [p and p.reshaped(rows, step.shape(i)[-1]) for i, p in enumerate(parts)]
    y, start = room(rows, width), 0
    if None in lie:
        return False
    for place in (place for place in lie if place is not None):
        to = y.columns(start, start + place.width)
        former.program.by_rows(ops.MAP, copied(to, place), [place.slot], y.slot, rows)
        start += place.width
    former.places[step.outs[0]] = y
    return True


def copied(to: Place, place: Place) -> list[Any]:
    """Words of an op that copies rows."""
    return [to, place, Place(NOWHERE, 1, 1, 0), COPY, place.width, 1, 0, 0.0]


def _argmax(former: Former, step: Step) -> bool:
    """Over the last axis; NaN counts as the largest, as in XLA."""
    place, shape = former.places.get(step.ins[0]), step.shape()
    wanted = step.params["axes"] == (len(shape) - 1,) and step.params["index_dtype"] == np.int32
    x = place.reshaped(math.prod(shape[:-1]), shape[-1]) if place and wanted else None
    if x is None:
        return False
    y = Place(Slot(4 * x.rows, dtype="int32"), x.rows, 1, 1)
    former.program.by_rows(ops.ARGMAX, [x, y.slot, x.width], [x.slot], y.slot, x.rows)
    former.places[step.outs[0]] = y
    return True


_LAYERS: dict[str, Callable[[Former, Step, Args], bool]] = {
    "norm": _norm, "linear": _linear, "rope": _rope, "append": _append, "attended": _attention,
}  # fmt: skip

_OTHERS: dict[str, Callable[[Former, Step], bool]] = {
    "reshape": _reshape, "squeeze": _reshape, "expand_dims": _reshape, "slice": _slice, "split": _split,
    "argmax": _argmax, "concatenate": _concatenate,
}  # fmt: skip
