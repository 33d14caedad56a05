"""The op table: a line an op. Verifier, docs, interpreter and emitter read it.

Shapes: b sequences, t tokens of this call, d width, h query heads, g key/value heads.
`lax.*` ops are the traced primitives, one for one, with the keywords of `effc.runtime.primitives`;
they always run. The others are what raising produces and passes look for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from effc.ir.core import Attr, Op, Ref
from effc.ir.types import DType, Size, Type

Infer = Callable[[Op, Sequence[Type], Mapping[str, Type]], tuple[Type, ...]]


class ShapeError(Exception):
    """Operands that an op's shape rule refuses; the message says what and what was wanted."""


class Along(Enum):
    """What an op does along the token axis: this decides how it decodes."""

    LOCAL = "each token by itself"
    POSITION = "a function of the token's position"
    CACHED = "reads earlier tokens through a cache of its own"
    MIXES = "mixes tokens; no incremental rule of its own"


@dataclass(frozen=True)
class OpSpec:
    """What a kind takes. Names end in `?` where optional, in `*` where any number."""

    kind: str
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    attrs: Mapping[str, str]  # name -> "int", "float", "a|b", "ref" ...; "=default" where optional
    regions: tuple[str, ...]
    infer: Infer
    along: Along
    doc: str


def _same(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    return (inputs[0],)


def _declared(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    """The outputs' own types: for ops whose shape the table does not compute."""
    return tuple(value.type for value in op.outputs)


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise ShapeError(message)


def _dtype(op: Op) -> DType:
    """The dtype that the only output is declared with: the table computes shapes, ops choose dtypes."""
    _want(len(op.outputs) == 1, f"defines {len(op.outputs)} values, want 1")
    return op.out.type.dtype


def _axes(name: str, x: Type) -> None:
    _want(bool(x.shape), f"{name} is {x}, want 1 axis or more")


def _norm(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    x = inputs[0]
    _axes("x", x)
    for role, param in params.items():
        _want(param.shape == x.shape[-1:], f"{role} is {param}, want shape [{x.shape[-1]}]")
    return (Type(_dtype(op), x.shape),)


def _linear(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    x, w = inputs[0], params["w"]
    _want(len(w.shape) == 2, f"w is {w}, want a matrix")
    _axes("x", x)
    k, n = w.shape if op.attrs.get("layout", "kn") == "kn" else w.shape[::-1]
    _want(x.shape[-1] == k, f"x is {x} and w is {w}: {x.shape[-1]} is not {k}")
    if "bias" in params:
        _want(params["bias"].shape == (n,), f"bias is {params['bias']}, want shape [{n}]")
    return (Type(_dtype(op), (*x.shape[:-1], n)),)


def _embed(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    table = params["table"]
    _want(len(table.shape) == 2, f"table is {table}, want a matrix")
    return (Type(_dtype(op), (*inputs[0].shape, table.shape[1])),)


def _param(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    return (Type(_dtype(op), params["value"].shape),)


def _split(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    x, sizes = inputs[0], op.attrs["sizes"]
    assert isinstance(sizes, tuple)
    cut = [size for size in sizes if isinstance(size, int)]
    _axes("x", x)
    _want(sum(cut) == x.shape[-1], f"sizes add up to {sum(cut)}, want {x.shape[-1]}, the last axis of {x}")
    return tuple(Type(x.dtype, (*x.shape[:-1], size)) for size in cut)


def _rope_table(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    half = op.attrs["dims"]
    _want(isinstance(half, int) and half % 2 == 0, f"dims is {half}, want an even number")
    assert isinstance(half, int)
    table = Type("f32", (*inputs[0].shape, half // 2))
    return (table, table)


def _rope(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    x, cos, sin = inputs
    _want(cos == sin, f"cos is {cos} and sin is {sin}, want one type")
    _want(len(x.shape) == 4, f"x is {x}, want [b,t,heads,dims]")
    _axes("cos", cos)
    width, half = x.shape[-1], cos.shape[-1]
    ok = isinstance(width, int) and isinstance(half, int) and 2 * half <= width
    _want(ok, f"cos has {half} columns, x only {width} dims a head")
    return (x,)


def _attention(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    q, k, v = inputs[:3]
    for name, value in zip("qkv", (q, k, v), strict=True):
        _want(len(value.shape) == 4, f"{name} is {value}, want [b,t,heads,dims]")
    _want(q.shape[-1] == k.shape[-1], f"q is {q} and k is {k}: different dims a head")
    _want(k.shape[:3] == v.shape[:3], f"k is {k} and v is {v}: different heads")
    heads, groups = q.shape[2], k.shape[2]
    whole = isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups == 0
    _want(bool(whole), f"{heads} query heads do not divide among {groups} key heads")
    _want("sinks" not in params or params["sinks"].shape == (heads,), f"sinks is {params.get('sinks')}, want [{heads}]")
    masked = op.attrs.get("mask", "causal") == "region"
    _want(masked == ("bias" in op.regions), "mask=region and a region 'bias' go together")
    _bias_operands(op, inputs[3:], k)
    return (Type(q.dtype, (*q.shape[:3], v.shape[-1])),)


def _bias_operands(op: Op, extra: Sequence[Type], k: Type) -> None:
    """Operands past q, k and v against the region: rows first, by key and by query, then what is read whole."""
    keyed, asked = rows_beside(op)
    rows = keyed + asked
    ok = keyed >= 0 and asked >= 0 and rows <= len(extra)
    _want(ok, f"keyed={keyed}, asked={asked} of {len(extra)} operands after q, k and v")
    if "bias" not in op.regions:
        _want(not extra, f"{len(extra)} operands after q, k and v, want a region 'bias' that reads them")
        return
    for value in extra[:rows]:
        _want(value.shape[:2] == k.shape[:2], f"rows of {value}, want one for each token, as k: {k}")
    scalars = [Type("i32", ())] * 3
    wanted = [*scalars, *(Type(x.dtype, x.shape[2:]) for x in extra[:rows]), *extra[rows:]]
    given = [value.type for value in op.regions["bias"].inputs]
    told = ", ".join(map(str, wanted))
    _want(given == wanted, f"region 'bias' takes ({', '.join(map(str, given))}), want ({told})")


def _repeat(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    carry = op.attrs.get("carry", 1)
    assert isinstance(carry, int)
    _want(0 < carry <= len(inputs), f"carry={carry}, want 1 to {len(inputs)}, the number of operands")
    return tuple(inputs[:carry])


def _recurse(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    x, router, times, capacity = inputs[0], params["router"], op.attrs["times"], op.attrs["capacity"]
    assert isinstance(times, int)
    rows = times if op.attrs.get("select") == "token" else times - 1
    _want(times > 1, f"times={times}, want 2 or more")
    _want(router.shape == (rows, x.shape[-1]), f"router is {router}, want shape [{rows},{x.shape[-1]}]")
    shares = list(capacity) if isinstance(capacity, tuple) else list[Attr]()
    ok = len(shares) == times and all(isinstance(s, (int, float)) and 0 < s <= 1 for s in shares) and shares[0] == 1
    _want(ok, f"capacity={capacity}, want {times} shares of 0 to 1, the first 1")
    return (x,)


def _fake_quant(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    bits, group, scale = op.attrs.get("bits", 8), op.attrs.get("group", 0), params.get("scale")
    _axes("x", inputs[0])
    _want(isinstance(bits, int) and 2 <= bits <= 8, f"bits={bits}, want 2 to 8")
    _want(scale is None or scale.shape == (1,), f"scale is {scale}, want shape [1]")
    _want(isinstance(group, int) and group >= 0, f"group={group}, want 0 or more")
    given = scale is not None or group != 0
    _want(not given or op.attrs.get("of", "value") == "value", "a gradient has neither scale nor group, want none")
    _want(scale is None or group == 0, "a scale is given, and a group to find one for, want one of them")
    return (inputs[0],)


def _broadcast(op: Op, inputs: Sequence[Type], params: Mapping[str, Type]) -> tuple[Type, ...]:
    """Equal ranks; a size of 1 stretches."""
    shape: list[Size] = []
    ranks = {len(x.shape) for x in inputs if x.shape}
    _want(len(ranks) <= 1, f"operands {', '.join(map(str, inputs))} differ in rank")
    for sizes in zip(*(x.shape for x in inputs if x.shape), strict=True):
        wide = {s for s in sizes if s != 1}
        _want(len(wide) <= 1, f"operands {', '.join(map(str, inputs))} do not line up")
        shape.append(wide.pop() if wide else 1)
    return (Type(_dtype(op), tuple(shape)),)


def _row(
    kind: str, inputs: str, params: str, attrs: str, infer: Infer, along: Along, doc: str,
    regions: str = "",
) -> OpSpec:  # fmt: skip
    fields = dict(item.split(":", 1) for item in attrs.split())
    return OpSpec(kind, tuple(inputs.split()), tuple(params.split()), fields, tuple(regions.split()), infer, along, doc)


_L, _P, _C, _M = Along.LOCAL, Along.POSITION, Along.CACHED, Along.MIXES

_ROWS = [
    # kind, operands, parameters, attributes, shape, what it does along the tokens, meaning, regions
    _row("const", "", "", "value:any", _declared, _L, "a literal, filled to the output's shape"),
    _row("param", "", "value", "", _param, _L, "a parameter as a value, whole"),
    _row("positions", "tokens", "", "", lambda op, i, p: (Type("i32", i[0].shape),), _P,
         "position of every token in its sequence, i32[b,t]"),
    _row("embed", "ids", "table", "", _embed, _L, "rows of table[V,d] at ids[...] -> [...,d]"),
    _row("linear", "x", "w bias?", "layout:kn|nk=kn", _linear, _L,
         "x[...,K] @ w[K,N] (layout nk: w[N,K]) + bias[N] -> [...,N], accumulated in f32"),
    _row("norm", "x", "scale? bias?", "kind:rms|layer eps:float offset:float=0.0", _norm, _L,
         "over the last axis in f32: rms x/sqrt(mean x^2+eps), layer (x-mean)/sqrt(var+eps); "
         "times (scale+offset) plus bias"),
    _row("rope_table", "positions", "freq?", "dims:int theta:float=0.0 scale:float=1.0", _rope_table, _L,
         "cos and sin of position*freq[dims/2], each [b,t,dims/2] times scale; "
         "freq = theta^(-2i/dims) if not given"),
    _row("rope", "x cos sin", "", "style:half|interleaved=half", _rope, _L,
         "rotate pairs of the first 2*cos.shape[-1] dims of x[b,t,h,d]; "
         "half: (i, i+n), interleaved: (2i, 2i+1)"),
    _row("attention", "q k v extra*", "sinks? bias*",
         "scale:float=1.0 mask:causal|region=causal window:int=0 softcap:float=0.0 keyed:int=0 asked:int=0 "
         "cache:float|f16|i8|i4=float",
         _attention, _C,
         "softmax(mask(softcap(scale*q.k))) v over this and earlier tokens; "
         "q[b,t,h,d] k[b,t,g,d] v[b,t,g,e] -> [b,t,h,e]; "
         "window n: the last n keys only; region `bias`(q position, k position, head, extra) is added to the scores: "
         "the first `keyed` extra are [b,t,...], kept with k and v and given as the key's row, the next `asked` the "
         "query's, the rest whole; "
         "sinks[h] are one score more a head, of which nothing is read; "
         "cache: k and v are seen as rounded to that many bits, each row by its own scale, and kept so",
         "bias?"),
    _row("fake_quant", "x", "scale?", "bits:int=8 group:int=0 of:value|gradient=value", _fake_quant, _L,
         "x rounded to codes of so many bits times a scale: scale[1], or for each row of the last axis its own, or for "
         "each `group` of its places; "
         "of=gradient: x as it is, and its gradient rounded so in training, up or down at random by nearness"),
    _row("silu", "x", "", "", _same, _L, "x * sigmoid(x)"),
    _row("gelu", "x", "", "approx:tanh|erf=tanh", _same, _L, "Gaussian error linear unit"),
    _row("softcap", "x", "", "cap:float", _same, _L, "cap * tanh(x / cap)"),
    _row("split", "x", "", "sizes:ints", _split, _L, "cut the last axis into pieces of these sizes"),
    _row("repeat", "x*", "", "block:ref times:int start:int=0 order:ints=() carry:int=1", _repeat, _C,
         "run a block `times` times; the first `carry` operands are fed back, the rest stay the same; "
         "stacked parameters give array start+i to run i, or with an order array order[start+i] "
         "(those that hold one for each number of the order: start+i)"),
    _row("early", "x*", "", "block:ref times:int order:ints=() exits:ints exit:ref head:ref keys:ref "
         "after:ref=none say:ref=none measure:softmax|softmax_max|state|classifier=softmax threshold:float=1.0 "
         "rows:masked|wait=masked decay:none|paper|t5x=none tau:float=4.0 "
         "state:propagate|deferred|shared=propagate waiting:int=3", _declared, _C,
         "repeat(x, ..), from which a token leaves after exits[i] layers where the confidence of exit i reaches the "
         "threshold (1: never); results are head(exit_i(x)), or say of it where given, or head(x), and the layers run, "
         "i32[b,t]; skipped layers "
         "run `keys` on the x that left, which keeps what later tokens see, or, deferred, run with the next token that "
         "takes them all: at most `waiting` tokens wait; shared: layers after the exit are `after`(x, s, ..), whose "
         "keys and values are of s, the state at the exit, whether a token leaves or not"),
    _row("keep", "x*", "", "cache:float|f16|i8|i4=float", lambda op, i, p: tuple(i), _C,
         "keep rows [b,t,...] of every token as attention keeps k and v, two of them as `cache` says; gives them back"),
    _row("recurse", "x*", "router", "block:ref times:int span:int capacity:any start:int=0 order:ints=() "
         "select:expert|token=expert gate:delta|paper=delta alpha:float=0.0 slack:int=16 "
         "kv:recursion|shared=recursion", _recurse, _C,
         "`times` runs over `span` layers, layer start+r*span+i in run r as in repeat, every run but the first on "
         "the tokens that the router lets go on: expert x.router[r-1] > 0, token the row with the highest x.router; "
         "at most capacity[r] of them plus slack; gate delta x+g*(f(x)-x), paper x+g*f(x), g = alpha*sigmoid or 1; "
         "kv recursion: a run attends to the tokens that ran it, shared: to what the first run kept"),
    _row("call", "x*", "", "func:ref", _declared, _C, "the results of another function of the module"),
    _row("running", "x", "", "fn:sum|prod|max|min|logsumexp=sum", _same, _C,
         "total of x[b,t,...] over this and all earlier tokens; keeps every token's total"),
    _row("recur", "x*", "", "consts:int carry:int", _declared, _C,
         "a recurrence: operands are `consts` constants, first carries [b,...], then items [b,t,...]; the region of "
         "(constants, carries, items) of one token of one sequence gives its next carries, then results [b,t,...]; "
         "keeps the carry after every token",
         "body"),
    _row("window", "x*", "", "why:str fixed:int=0 lookback:int=-1", _declared, _C,
         "run the region over the rows [b,t,...] of all tokens so far and keep those of this call: right for any "
         "causal op, costs O(length) a token; with lookback n the region sees this call's rows and n before, with 0 "
         "nothing is kept; the last `fixed` operands are no rows",
         "body"),
]  # fmt: skip

_ELEMENTWISE = """
add sub mul div rem max min pow atan2 nextafter eq ne lt le gt ge and or xor not neg sign floor ceil
round abs exp exp2 expm1 log log1p tanh logistic sin cos tan asin acos atan sinh cosh sqrt rsqrt cbrt
erf erfc erf_inv is_finite square integer_pow convert_element_type select_n clamp population_count
shift_left shift_right_logical shift_right_arithmetic reduce_precision
""".split()  # noqa: SIM905

ELEMENTWISE: frozenset[str] = frozenset(f"lax.{name}" for name in _ELEMENTWISE)
"""Primitives that act on each element by itself; a size of 1 stretches."""

OPS: Mapping[str, OpSpec] = {row.kind: row for row in _ROWS}
"""Every op of the transformer level by kind."""

_LAX_ELEMENTWISE = OpSpec(
    "lax", ("x*",), (), {"*": "any"}, ("body*",), _broadcast, Along.LOCAL, "elementwise primitive"
)
_LAX = OpSpec("lax", ("x*",), (), {"*": "any"}, ("body*",), _declared, Along.MIXES, "traced primitive")


def spec_of(kind: str) -> OpSpec | None:
    """The table's row for `kind`, or None where there is no such op."""
    if kind in ELEMENTWISE:
        return _LAX_ELEMENTWISE
    if kind.startswith("lax."):
        return _LAX
    return OPS.get(kind)


def attribute(op: Op, name: str) -> Attr | Ref:
    """An attribute of a transformer op, or the table's default where the op leaves it out; else None."""
    if name in op.attrs:
        return op.attrs[name]
    spec = spec_of(op.kind)
    kind, _, default = spec.attrs.get(name, "").partition("=") if spec else ("", "", "")
    if kind in _NUMBERS and default:
        return _NUMBERS[kind](default)
    return default or None


def rows_beside(op: Op) -> tuple[int, int]:
    """Operands past q, k and v that an attention's bias sees a row of: how many by key, how many by query."""
    keyed, asked = attribute(op, "keyed"), attribute(op, "asked")
    assert isinstance(keyed, int) and isinstance(asked, int)
    return keyed, asked


def kept(op: Op) -> tuple[str, ...]:
    """What a cache keeps of an attention: its keys, its values, and what its bias sees by key."""
    return op.inputs[1 : 3 + rows_beside(op)[0]]


_NUMBERS: Mapping[str, Callable[[str], Attr]] = {"int": int, "float": float, "ints": lambda text: ()}


def array_index(order: Attr | Ref, stack: int, layer: int) -> int:
    """Which of `stack` arrays a layer takes: the one `order` names, or its own where it has one."""
    if not isinstance(order, tuple) or not order or stack == len(order):
        return layer
    found = order[layer]
    assert isinstance(found, int)
    return found
