"""What a module weighs and costs: parameters, bytes read and kept per token, arithmetic per token.

Costs are those of one more token of one sequence (b = t = 1), the way decoding runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod

from effc.ir.core import Func, Module, Op, Param, Ref, param_uses, walk
from effc.ir.ops import attribute
from effc.ir.rewrite import users
from effc.ir.types import BYTES, Quant, Type, evaluate
from effc.widths import kept_bytes

ONE_TOKEN: Mapping[str, int] = {"b": 1, "t": 1}

_INDEXING = frozenset({"lax.gather", "lax.dynamic_slice", "lax.slice"})
"""Ops that read from a table only what they return."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters of one use (`linear`, `embed+linear` where tied, `unused`) and one dtype."""

    use: str
    dtype: str
    names: tuple[str, ...]
    count: int
    """Numbers in all of them."""
    bytes: int
    """Stored bytes, scales and zero points included."""


def param_groups(module: Module) -> list[ParamGroup]:
    """All parameters by use and dtype, the heaviest first."""
    grouped: dict[tuple[str, str], list[Param]] = {}
    for name, kinds in param_kinds(module).items():
        param = module.params[name]
        grouped.setdefault((kinds, str(param.type.dtype)), []).append(param)
    groups = [
        ParamGroup(use, dtype, tuple(p.name for p in ps), sum(map(numbers, ps)), sum(map(nbytes, ps)))
        for (use, dtype), ps in grouped.items()
    ]
    return sorted(groups, key=lambda group: -group.bytes)


def param_kinds(module: Module) -> dict[str, str]:
    """For each parameter the kinds of ops that read it: `linear`, `embed+linear`, `unused`."""
    uses = param_uses(module)
    return {name: "+".join(sorted({op.kind for _, op, _ in uses[name]})) or "unused" for name in module.params}


def numbers(param: Param) -> int:
    """Numbers it holds, all layers."""
    return param.count * evaluate(param.type.size(), {})


def nbytes(param: Param) -> int:
    """Bytes it is stored in, all layers."""
    return param.count * param.type.nbytes()


def param_count(module: Module) -> int:
    """Numbers in all parameters."""
    return sum(map(numbers, module.params.values()))


def param_bytes(module: Module) -> int:
    """Bytes of all parameters as stored."""
    return sum(map(nbytes, module.params.values()))


def ops_by_kind(module: Module) -> dict[str, Counter[str]]:
    """For each function how many ops of each kind it has, regions included."""
    return {name: Counter(op.kind for op in walk(func)) for name, func in module.funcs.items()}


def runs(module: Module, func: str = "") -> Counter[str]:
    """How often each function runs in one call of `func` (the forward function if not given)."""
    counts: Counter[str] = Counter()
    todo = [(module.funcs[func] if func else module.forward(), 1)]
    while todo:
        current, times = todo.pop()
        counts[current.name] += times
        todo += [(called, times * each) for called, each in _calls(module, current)]
    return counts


def _calls(module: Module, func: Func) -> Iterator[tuple[Func, int]]:
    for op in walk(func):
        times = _times(op)
        for value in op.attrs.values():
            if isinstance(value, Ref) and value.name in module.funcs:
                yield module.funcs[value.name], times


def _times(op: Op) -> int:
    """How often the block of an op runs for a token; of routed runs the share that capacity allows."""
    times, span = attribute(op, "times"), attribute(op, "span")
    if op.kind == "repeat":
        return times if isinstance(times, int) else 1
    capacity = op.attrs.get("capacity")
    if op.kind != "recurse" or not isinstance(capacity, tuple) or not isinstance(span, int):
        return 1
    return round(span * sum(share for share in capacity if isinstance(share, (int, float))))


def weight_bytes_per_token(module: Module, func: str = "") -> int:
    """Bytes of parameters read for a token: rows of tables, everything else whole, each time it is read."""
    return sum(
        times * _read(module, module.funcs[name], op)
        for name, times in runs(module, func).items()
        for op in walk(module.funcs[name])
    )


def _read(module: Module, func: Func, op: Op) -> int:
    """Bytes of parameters that one run of an op reads."""
    if op.kind == "param":
        return _read_as_value(module.params[op.params["value"]].type, func, op)
    tables = ("table",) if op.kind == "embed" else ()
    types = {role: module.params[name].type for role, name in op.params.items()}
    return sum(-(-t.nbytes() // evaluate(t.shape[0], {})) if r in tables else t.nbytes() for r, t in types.items())


def _read_as_value(type: Type, func: Func, op: Op) -> int:
    """A parameter that is only indexed is read as far as the indexing ops return."""
    readers = users(func).get(op.out.name, [])
    if not readers or any(reader.kind not in _INDEXING for reader in readers):
        return type.nbytes()
    return min(type.nbytes(), sum(_bytes(value.type) for reader in readers for value in reader.outputs))


def cache_bytes_per_token(module: Module, func: str = "", dtype: str = "") -> int:
    """Bytes kept for each token of a sequence: keys and values of all layers, in `dtype` or as the program says."""
    return sum(
        times * _cached(kept, kind, dtype)
        for name, times in runs(module, func).items()
        for kept, kind in _kept(module.funcs[name])
    )


def _cached(type: Type, kind: str, dtype: str) -> int:
    """Bytes of a token's rows, one a head, in a cache of that kind."""
    if kind == "float":
        return _bytes(type, dtype)
    *rows, width = _sizes(type)
    return prod(rows) * kept_bytes(width, kind, 4)


def _kept(func: Func) -> Iterator[tuple[Type, str]]:
    """Types of the rows that ops with a cache keep, and how: a `window` its operands, others what they have come to."""
    known = func.types()
    for op in func.ops:
        if op.kind == "attention":
            keyed = attribute(op, "keyed")
            assert isinstance(keyed, int)
            yield from ((known[name], str(attribute(op, "cache"))) for name in op.inputs[1:3])
            yield from ((known[name], "float") for name in op.inputs[3 : 3 + keyed])
        elif op.kind == "window" and attribute(op, "lookback") != 0:
            fixed = attribute(op, "fixed")
            assert isinstance(fixed, int)
            yield from ((known[name], "float") for name in op.inputs[: len(op.inputs) - fixed])
        elif op.kind == "running":
            yield op.out.type, "float"
        elif op.kind == "recur":
            carry = op.attrs["carry"]
            assert isinstance(carry, int)
            yield from ((type, "float") for type in op.regions["body"].result_types()[:carry])


def flops_per_token(module: Module, context: int = 0, func: str = "") -> int:
    """Arithmetic for a token that attends to `context` others: products only, a multiply-add is two.

    Elementwise work, norms and softmax are left out: they are small beside the products.
    """
    return sum(
        times * _flops(module, module.funcs[name], op, context)
        for name, times in runs(module, func).items()
        for op in module.funcs[name].ops
    )


def _flops(module: Module, func: Func, op: Op, context: int) -> int:
    if op.kind == "linear":
        return 2 * prod(_sizes(module.params[op.params["w"]].type))
    if op.kind not in ("attention", "lax.dot_general"):
        return 0
    known = func.types()
    first, second, *rest = (_sizes(known[name]) for name in op.inputs)
    if op.kind == "attention":
        return 2 * first[2] * (second[3] + rest[0][3]) * (context + 1)
    return 2 * prod(_sizes(op.out.type)) * prod(first[axis] for axis in _contracted(op))


def _contracted(op: Op) -> list[int]:
    """Axes of the left operand that a product sums over."""
    match op.attrs.get("contract"):
        case (tuple(axes), _):
            return [axis for axis in axes if isinstance(axis, int)]
        case _:
            return []


def _sizes(type: Type) -> tuple[int, ...]:
    return tuple(evaluate(size, ONE_TOKEN) for size in type.shape)


def _bytes(type: Type, dtype: str = "") -> int:
    """Bytes of a value for one token, as `dtype` where given."""
    stored = dtype or type.dtype
    assert not isinstance(stored, Quant)
    return ceil(prod(_sizes(type)) * BYTES[stored])


__all__ = [
    "ParamGroup", "cache_bytes_per_token", "flops_per_token", "nbytes", "numbers", "ops_by_kind",
    "param_bytes", "param_count", "param_groups", "param_kinds", "runs", "weight_bytes_per_token",
]  # fmt: skip
