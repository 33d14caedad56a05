"""Drafters that share the target's layers or read what it makes: a head on its features, its first layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from effc.ir.core import Func, Module, Op, Param, Ref, Value, walk
from effc.ir.rewrite import Names, copy_ops, names_of, substitute
from effc.ir.types import NUMPY, Type
from effc.passes.base import PassError
from effc.passes.draft.parts import PREFIX, Cut, cut, layer_of, lazily, made, narrowed, with_params
from effc.weights import Lazy, Store

VERIFY = "verify"
IDS, EXIT, READS = f"{PREFIX}.ids", f"{PREFIX}.exit", f"{PREFIX}.reads"
TOKENS = "tokens"
DEPTHS = 3
"""Places in the stack of layers that a head reads, the last of them at its end."""


def head_attached(name: str, module: Module, vocab: int) -> Module:
    """With @draft, one layer like the target's last over its features and the next tokens, and @verify."""
    parts = cut(name, module)
    func, params = _head(name, module, parts, vocab)
    _, new, _ = _tail(module, parts, vocab)
    verify = tapped(parts)
    params = {**module.params, **params, **new}
    return replace(module, params=params, funcs={**module.funcs, VERIFY: verify, PREFIX: func})


def part_attached(name: str, module: Module, layers: int, vocab: int) -> Module:
    """With @draft, the first layers and a way out of them."""
    parts = cut(name, module)
    times = parts.loop.attrs["times"]
    if not isinstance(times, int) or not 0 < layers < times:
        raise PassError(f"{name}: layers={layers}, want 1 to {int(str(times)) - 1}: fewer than the model has")
    names, hidden = names_of(parts.func), parts.hidden
    loop = replace(parts.loop, attrs={**parts.loop.attrs, "times": layers})
    turned = Value(names.fresh("turned"), hidden.type)
    left = Value(names.fresh("left"), hidden.type)
    way = [
        Op("linear", (hidden.name,), (turned,), {"w": EXIT}),
        Op("lax.add", (hidden.name, turned.name), (left,)),
    ]
    tail, new, _ = _tail(module, parts, vocab)
    after = substitute(Func("", (), tail, parts.func.results), {hidden.name: left.name}).ops
    func = Func(PREFIX, parts.func.inputs, (*parts.before, loop, *way, *after), parts.func.results)
    exit_ = Param(EXIT, Type(str(hidden.type.dtype), (parts.width, parts.width)), path="draft: the way out")
    return replace(module, params={**module.params, EXIT: exit_, **new}, funcs={**module.funcs, PREFIX: func})


def _depths(parts: Cut) -> list[int]:
    """How many layers of the loop come before each place that is read."""
    times = int(str(parts.loop.attrs["times"]))
    return sorted({max(1, times * n // DEPTHS) for n in range(1, DEPTHS + 1)})


def tapped(parts: Cut) -> Func:
    """The forward function with one more result: what lies between the layers, side by side."""
    names, loop, depths = names_of(parts.func), parts.loop, _depths(parts)
    start = int(str(loop.attrs.get("start", 0)))
    (x, *rest), pieces, taken = loop.inputs, list[Op](), list[Value]()
    for begin, end in zip([0, *depths], depths, strict=False):
        out = loop.out if end == depths[-1] else Value(names.fresh("depth"), loop.out.type)
        attrs = {**loop.attrs, "start": start + begin, "times": end - begin}
        pieces.append(replace(loop, inputs=(x, *rest), outputs=(out,), attrs=attrs))
        taken.append(out)
        x = out.name
    beside, features = _side_by_side(names, taken)
    at = parts.func.ops.index(loop)
    ops = (*parts.func.ops[:at], *pieces, *beside, *parts.func.ops[at + 1 :])
    return replace(parts.func, name=VERIFY, ops=ops, results=(*parts.func.results, features))


def _side_by_side(names: Names, values: Sequence[Value]) -> tuple[list[Op], str]:
    """Values [b,t,d] as one."""
    if len(values) == 1:
        return [], values[0].name
    both = Value(names.fresh("features"), _times(values[0].type, len(values)))
    return [Op("lax.concatenate", tuple(v.name for v in values), (both,), {}, {"dimension": 2})], both.name


def _times(type_: Type, count: int) -> Type:
    """[b,t,count*d]."""
    return Type(type_.dtype, (*type_.shape[:-1], int(str(type_.shape[-1])) * count))


def _head(name: str, module: Module, parts: Cut, vocab: int) -> tuple[Func, dict[str, Param]]:
    (tokens,), target = parts.func.inputs, parts.loop.attrs["block"]
    assert isinstance(target, Ref)
    block, hidden, names = module.funcs[target.name], parts.hidden, names_of(parts.func)
    if any(isinstance(value, Ref) for op in walk(block) for value in op.attrs.values()):
        raise PassError(f"{name}: @{block.name} runs other functions, want plain layers for kind=head")
    params, count = _layer_params(module, block), len(_depths(parts))
    params |= {p.name: p for i in (*range(count), TOKENS) for p in _reader(i, parts)}
    features = Value(names.fresh("features"), _times(hidden.type, count))
    first, *rest = parts.loop.inputs
    begin, x = _joined(names, features, first, hidden.type, _eps(parts))
    body, (y,) = copy_ops(block, [x, *rest], names)
    body = with_params(body, {old: f"{PREFIX}.{old}" for old in _stacked(module, block)})
    own, told = _side_by_side(names, [Value(y, hidden.type)] * count)
    tail, _, _ = _tail(module, parts, vocab)
    after = substitute(Func("", (), tail, parts.func.results), {hidden.name: y}).ops
    # Features last: native code runs all before them as one piece.
    ops = (*parts.before, *begin, *body, *after, *own)
    return Func(PREFIX, (tokens, features), ops, (*parts.func.results, told)), params


def _reader(which: int | str, parts: Cut) -> tuple[Param, Param]:
    """Scale and matrix through which a head reads features of one depth, or tokens."""
    dtype, width = parts.hidden.type.dtype, parts.width
    what = "tokens" if which == TOKENS else f"features {which}"
    scale = Param(f"{READS}.{which}.scale", Type(dtype, (width,)), path=f"draft: norm of {what}")
    return scale, Param(f"{READS}.{which}.w", Type(dtype, (width, width)), path=f"draft: {what} to the layer")


def _joined(names: Names, features: Value, tokens: str, type_: Type, eps: float) -> tuple[list[Op], str]:
    """Features of each depth and embedded tokens, each normed and turned, as one sum [b,t,d]."""
    count = int(str(features.type.shape[-1])) // int(str(type_.shape[-1]))
    pieces = [_piece(names, features, i, type_) for i in range(count)] if count > 1 else []
    parts = [op.out.name for op in pieces] or [features.name]
    ops, total = list(pieces), ""
    for which, value in [*enumerate(parts), (TOKENS, tokens)]:
        normed, turned = Value(names.fresh("normed"), type_), Value(names.fresh("turned"), type_)
        attrs = {"kind": "rms", "eps": eps}
        ops.append(Op("norm", (value,), (normed,), {"scale": f"{READS}.{which}.scale"}, attrs))
        ops.append(Op("linear", (normed.name,), (turned,), {"w": f"{READS}.{which}.w"}))
        if total:
            ops.append(Op("lax.add", (total, turned.name), (Value(names.fresh("joined"), type_),)))
        total = ops[-1].out.name
    return ops, total


def _piece(names: Names, features: Value, i: int, type_: Type) -> Op:
    """Features of one depth."""
    *outer, width = type_.shape
    start, limit = (*(0 for _ in outer), i * int(str(width))), (*outer, (i + 1) * int(str(width)))
    return Op("lax.slice", (features.name,), (Value(names.fresh("part"), type_),), {}, {"start": start, "limit": limit})


def _tail(module: Module, parts: Cut, vocab: int) -> tuple[tuple[Op, ...], dict[str, Param], dict[str, str]]:
    """What makes logits, with arrays of its own where they are trained; those, and what each began as."""
    ops = parts.after
    small = [n for op in ops for n in op.params.values() if len(module.params[n].type.shape) == 1]
    head = [*parts.head.params.values()] if vocab else []
    own = dict.fromkeys(n for n in small if n not in head)
    new = {f"{PREFIX}.{n}": replace(module.params[n], name=f"{PREFIX}.{n}") for n in own}
    names = {n: f"{PREFIX}.{n}" for n in own}
    if vocab:
        new |= {_head_name(n): _rows(module.params[n], parts, vocab) for n in head}
        new[IDS] = Param(IDS, Type("i32", (vocab,)), path="draft: the target's number of each token")
        tail = narrowed(ops, parts.head, vocab)
        return _with_head(with_params(tail, names), parts.head), new, names
    return with_params(ops, names), new, names


def _with_head(ops: Sequence[Op], head: Op) -> tuple[Op, ...]:
    """The head among these reads its own rows."""
    mine = {role: _head_name(n) for role, n in head.params.items()}
    return tuple(replace(op, params=mine) if op.inputs == head.inputs and op.kind == "linear" else op for op in ops)


def _head_name(name: str) -> str:
    return f"{PREFIX}.head.{name}"


def _rows(param: Param, parts: Cut, vocab: int) -> Param:
    """The head's matrix or bias for fewer tokens, plain floats."""
    axis, shape = _vocab_axis(param, parts), list(param.type.shape)
    shape[axis] = vocab
    dtype = param.type.dtype if isinstance(param.type.dtype, str) else "f32"
    return Param(_head_name(param.name), Type(dtype, tuple(shape)), path=f"draft: rows of {param.name}")


def _vocab_axis(param: Param, parts: Cut) -> int:
    return 0 if len(param.type.shape) == 1 or parts.head.attrs.get("layout", "kn") == "nk" else 1


def _eps(parts: Cut) -> float:
    found = [op.attrs["eps"] for op in parts.after if op.kind == "norm"]
    return float(str(found[0])) if found else 1e-5


def _stacked(module: Module, block: Func) -> list[str]:
    names = dict.fromkeys(n for op in walk(block) for n in op.params.values())
    return [n for n in names if module.params[n].stack]


def _layer_params(module: Module, block: Func) -> dict[str, Param]:
    """One array of each stack of the layer."""
    stacked = [module.params[n] for n in _stacked(module, block)]
    path = "draft: begun as the last layer's"
    return {f"{PREFIX}.{p.name}": Param(f"{PREFIX}.{p.name}", p.type, path=path) for p in stacked}


# ---- arrays to begin with


def arrays(before: Module, after: Module, store: Store, name: str) -> list[Lazy]:
    """Copies of the target's arrays, and beginnings of what it has not."""
    parts, new = cut(name, before), [p for n, p in after.params.items() if n not in before.params]
    return [_array(param, before, parts, store) for param in new]


def _array(param: Param, before: Module, parts: Cut, store: Store) -> Lazy:
    shape = tuple(int(str(size)) for size in param.type.shape)
    fresh: Mapping[str, Any] = {
        IDS: lambda: {"": np.arange(shape[0], dtype=np.int32)},
        EXIT: lambda: {"": np.zeros(shape, _dtype(param))},
    }
    if param.name.startswith(f"{READS}."):
        return made(param, lambda: {"": _reading(param.name, shape, len(_depths(parts))).astype(_dtype(param))})
    if param.name in fresh:
        return made(param, fresh[param.name])
    origin = param.name.removeprefix(f"{PREFIX}.")
    if origin in before.params:
        old = before.params[origin]
        return layer_of(param, store[origin], old.stack - 1) if old.stack else lazily(param, store[origin])
    return made(
        param, lambda: rows_of(param, before, parts, store, np.arange(shape[0] if len(shape) == 1 else max(shape)))
    )


def rows_of(param: Param, before: Module, parts: Cut, store: Store, ids: np.ndarray) -> Mapping[str, np.ndarray]:
    """What the target's head has for the tokens `ids`."""
    origin = before.params[param.name.removeprefix(f"{PREFIX}.head.")]
    axis = _vocab_axis(origin, parts)
    count = int(str(param.type.shape[axis]))
    whole = store[origin.name].read(0)[""]
    return {"": np.ascontiguousarray(np.take(whole, ids[:count], axis)).astype(_dtype(param))}


def _reading(name: str, shape: tuple[int, ...], depths: int) -> np.ndarray:
    """Ones of a scale; of a matrix half of what is last or a token, and a little noise to tell channels apart."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    which = name.removeprefix(f"{READS}.").split(".")[0]
    number = depths if which == TOKENS else int(which)
    noise = np.random.default_rng(number).standard_normal(shape, np.float32) * 0.02
    return noise + np.eye(shape[1], dtype=np.float32) / 2 * (number >= depths - 1)


def _dtype(param: Param) -> np.dtype:
    return np.dtype(NUMPY[str(param.type.dtype)])


def with_ids(name: str, module: Module, store: Store, ids: np.ndarray) -> Store:
    """The store for a drafter of these tokens: their numbers, and the target's rows for them."""
    parts = cut(name, module)
    rows = [p for n, p in module.params.items() if n.startswith(f"{PREFIX}.head.")]
    fresh = [made(p, lambda p=p: rows_of(p, module, parts, store, ids)) for p in rows]
    return store.replace([made(module.params[IDS], lambda: {"": ids}), *fresh], module)
