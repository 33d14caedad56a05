"""Is a module well-formed? Every fault is found, none stops the search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from effc.errors import EffcError, nearest
from effc.ir.conform import op_faults
from effc.ir.core import Attr, Func, Module, Op, Param, Ref, param_uses, walk
from effc.ir.decoding import strategy_faults
from effc.ir.early import early_faults
from effc.ir.ops import attribute
from effc.ir.printer import attr_text, decode_line, op_line, param_line, ref, return_line
from effc.ir.types import BYTES, Dim, Quant, Type
from effc.widths import BITS


@dataclass(frozen=True)
class Fault:
    """What is wrong: in which part of the module, at which line of its dump, and what was wanted."""

    where: str
    line: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: " + (f"{self.line}\n    " if self.line else "") + self.message


def check(module: Module, where: str = "") -> None:
    """Raise EffcError with all faults; `where` says who made the module."""
    faults = verify(module)
    if faults:
        head = f"{where}: " if where else ""
        count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        raise EffcError("\n".join([f"{head}@{module.name} has {count}", *map(str, faults)]))


def verify(module: Module) -> list[Fault]:
    """All faults of a module, in the order of its dump."""
    return [
        *_meta(module),
        *_params(module),
        *(fault for func in module.funcs.values() for fault in _func(module, func)),
        *(Fault(ref(key), "", f"is filed as @{key}") for key, f in module.funcs.items() if f.name != key),
        *_cycles(module),
        *_decode(module),
    ]


def warnings(module: Module) -> list[Fault]:
    """What is legal but of no use: parameters that nothing reads."""
    named = {r.name for _, r in _module_refs(module)}
    idle = [name for name, uses in param_uses(module).items() if not uses and name not in named]
    return [Fault(ref(name), param_line(module.params[name]), "nothing reads it") for name in idle]


def _meta(module: Module) -> Iterator[Fault]:
    for name, value in module.meta.items():
        if not isinstance(value, (str, int, float, bool)):
            yield Fault("meta", "", f"{name} is {value!r}, want a string, a number, true or false")


# -- parameters ---------------------------------------------------------------------------------------------


def _params(module: Module) -> Iterator[Fault]:
    for key, param in module.params.items():
        for message in _param(key, param):
            yield Fault(ref(key), param_line(param), message)


def _param(key: str, param: Param) -> Iterator[str]:
    if param.name != key:
        yield f"is filed as {ref(key)}"
    yield from _type(param.type)
    if any(isinstance(size, Dim) for size in param.type.shape):
        yield f"is {param.type}, want sizes that are numbers"
    if param.stack < 0:
        yield f"is stacked {param.stack} times, want 0 or more"
    if param.over is not None:
        yield from _over(param.over, param.count)
    if param.perm is not None and sorted(param.perm) != list(range(len(param.perm))):
        yield f"perm is {attr_text(param.perm)}, want each axis once"


def _over(over: tuple[int, ...], count: int) -> Iterator[str]:
    if len(over) != 3 or not over[2]:
        yield f"over is {attr_text(over)}, want (start,stop,step) with a step other than 0"
    elif len(range(*over)) != count:
        yield f"over {attr_text(over)} names {len(range(*over))} arrays, want {count}"


def _type(type: Type) -> Iterator[str]:
    for size in type.shape:
        if isinstance(size, Dim) and not size.names():
            yield f"{type} has a size of {size}, want a whole number"
        if isinstance(size, int) and size < 0:
            yield f"{type} has a size of {size}, want 0 or more"
    if isinstance(type.dtype, Quant):
        yield from _quant(type.dtype, len(type.shape))
    else:
        yield from _dtype(type.dtype)


def _dtype(dtype: str) -> Iterator[str]:
    if dtype not in BYTES:
        yield f"no dtype is called '{dtype}'{nearest(dtype, BYTES)}"


def _quant(quant: Quant, rank: int) -> Iterator[str]:
    if not 2 <= quant.bits <= 8:
        yield f"{quant.bits} bits a code, want 2 to 8"
    if quant.group < 0:
        yield f"group={quant.group}, want more than 0, or channel"
    if not -rank <= quant.axis < 0:
        yield f"axis={quant.axis} of {rank} axes, want {-rank} to -1"
    if quant.form != "int" and (BITS.get(quant.form) != quant.bits or not quant.sym):
        yield f"{quant}: want one of {', '.join(BITS)} without zero points"
    yield from _dtype(quant.scale)


# -- functions ----------------------------------------------------------------------------------------------


def _func(module: Module, func: Func) -> Iterator[Fault]:
    yield from _scope(module, func, func.block, ref(func.name), frozenset())


def _scope(module: Module, func: Func, block: bool, where: str, outer: frozenset[str]) -> Iterator[Fault]:
    """Faults of one function or region; `outer` holds values that a region must not read."""
    known: dict[str, Type] = {}
    later = {value.name for op in func.ops for value in op.outputs}
    for value in func.inputs:
        for message in (*_again(value.name, known), *_type(value.type)):
            yield Fault(where, str(value), message)
        known[value.name] = value.type
    for op in func.ops:
        for message in _op(module, op, known, later, outer, block):
            yield Fault(where, _shown(op), message)
        for role, region in op.regions.items():
            yield from _scope(module, region, block, f"{where}.{role}", outer | known.keys() | later)
        known |= {value.name: value.type for value in op.outputs}
    for name in func.results:
        if name not in known:
            yield Fault(where, return_line(func), _unknown(name, known, set(), outer))


def _op(
    module: Module, op: Op, known: Mapping[str, Type], later: set[str], outer: frozenset[str], block: bool
) -> Iterator[str]:  # fmt: skip
    for name in dict.fromkeys(op.inputs):
        if name not in known:
            yield _unknown(name, known, later, outer)
    names = [value.name for value in op.outputs]
    for at, value in enumerate(op.outputs):
        yield from _again(value.name, known if value.name in known else names[:at])
        yield from _type(value.type)
    for role, name in op.params.items():
        yield from _param_use(module, role, name, block)
    for name, target in _refs(op.attrs):
        yield from _ref(module, name, target)
    inputs = [known[name] for name in op.inputs] if all(name in known for name in op.inputs) else None
    found = [module.params.get(name) for name in op.params.values()]
    types = {r: p.type for r, p in zip(op.params, found, strict=True) if p}
    yield from op_faults(op, inputs, types if len(types) == len(op.params) else None)
    if op.kind in ("repeat", "recurse") and inputs is not None:
        yield from _repeat(module, op, inputs)
    if op.kind == "call" and inputs is not None:
        yield from _call(module, op, inputs)
    if op.kind == "early" and inputs is not None:
        yield from early_faults(module, op, inputs)


def _shown(op: Op) -> str:
    """The op's line; one that cannot be printed is shown by its kind."""
    try:
        return op_line(op)
    except EffcError:
        return f"{op.kind}(...)"


def _again(name: str, known: Iterable[str]) -> Iterator[str]:
    if name in known:
        yield f"%{name} is defined twice, want a new name"


def _unknown(name: str, known: Iterable[str], later: set[str], outer: frozenset[str]) -> str:
    if name in later:
        return f"%{name} is used before it is defined"
    if name in outer:
        return f"%{name} is a value outside the region, want one of the region's own"
    return f"%{name} is not defined{nearest(name, known)}"


def _param_use(module: Module, role: str, name: str, block: bool) -> Iterator[str]:
    param = module.params.get(name)
    if param is None:
        yield f"{role}: no parameter is called {ref(name)}{nearest(name, module.params)}"
    elif param.stack and not block:
        yield f"{role}: {ref(name)} is stacked {param.stack} times, want it read in a block that repeat runs"


# -- references ---------------------------------------------------------------------------------------------


def _refs(attrs: Mapping[str, Attr | Ref]) -> Iterator[tuple[str, Ref]]:
    for name, value in attrs.items():
        if isinstance(value, Ref):
            yield name, value


def _module_refs(module: Module) -> Iterator[tuple[str, Ref]]:
    for func in module.funcs.values():
        for op in walk(func):
            yield from _refs(op.attrs)
    if module.decode:
        yield from _refs(module.decode.attrs)


def _ref(module: Module, name: str, target: Ref) -> Iterator[str]:
    known = [*module.funcs, *module.params]
    if target.name not in known:
        yield f"{name}: nothing is called {target}{nearest(target.name, known)}"


def _repeat(module: Module, op: Op, inputs: list[Type]) -> Iterator[str]:
    """`repeat` or `recurse` against the block it runs."""
    target, (times, start, carry) = op.attrs.get("block"), (attribute(op, n) for n in ("times", "start", "carry"))
    if op.kind == "recurse":
        span, carry = attribute(op, "span"), 1
        times = times * span if isinstance(times, int) and isinstance(span, int) else None
    block = module.funcs.get(target.name) if isinstance(target, Ref) else None
    if block is None or not isinstance(times, int) or not isinstance(carry, int) or not isinstance(start, int):
        return  # said by the op's row or by its reference
    if not block.block:
        yield f"{target} is a func, want a block"
    if times < 1:
        yield f"times={times}, want 1 or more"
    if start < 0:
        yield f"start={start}, want 0 or more"
    yield from _signature(block, inputs, carry)
    order = attribute(op, "order")
    if isinstance(order, tuple) and order:
        yield from _order(module, block, order, start, times)
    else:
        yield from _stacks(module, block, start, times)


def _stacks(module: Module, block: Func, start: int, times: int) -> Iterator[str]:
    """Whether each stacked parameter of the block has an array for every run."""
    span = f"start={start}, times={times}" if start else f"times={times}"
    for name, stack in _stacked(module, block):
        if stack < start + times:
            yield f"{span}, but {ref(name)} in {ref(block.name)} is stacked {stack} times"


def _order(module: Module, block: Func, order: tuple[Attr, ...], start: int, times: int) -> Iterator[str]:
    """Whether `order` tells every run an array that is there."""
    numbers = [number for number in order if isinstance(number, int)]
    if len(order) < start + times:
        yield f"order tells the arrays of {len(order)} layers, want {start + times} (start={start}, times={times})"
    if min(numbers) < 0:
        yield f"order={attr_text(order)}, want numbers of 0 or more"
    for name, stack in _stacked(module, block):
        if stack != len(order) and stack <= max(numbers):
            yield f"order names array {max(numbers)}, but {ref(name)} in {ref(block.name)} is stacked {stack} times"


def _stacked(module: Module, block: Func) -> Iterator[tuple[str, int]]:
    """Stacked parameters that the block reads, and of how many arrays."""
    for name in dict.fromkeys(name for inner in walk(block) for name in inner.params.values()):
        if name in module.params and module.params[name].stack:
            yield name, module.params[name].stack


def _call(module: Module, op: Op, inputs: list[Type]) -> Iterator[str]:
    """`call` against the function it runs."""
    target = op.attrs.get("func")
    func = module.funcs.get(target.name) if isinstance(target, Ref) else None
    if func is None:
        return  # said by its reference
    if func.block:
        yield f"{target} is a block, want a func"
    wanted, known = [value.type for value in func.inputs], func.types()
    if inputs != wanted:
        yield f"operands are ({_types(inputs)}), {target} wants ({_types(wanted)})"
    results = [known[name] for name in func.results if name in known]
    declared = [value.type for value in op.outputs]
    if len(results) == len(func.results) and results != declared:
        yield f"{target} returns ({_types(results)}), declared are ({_types(declared)})"


def _signature(block: Func, inputs: list[Type], carry: int) -> Iterator[str]:
    wanted = [value.type for value in block.inputs]
    if inputs != wanted:
        yield f"operands are ({_types(inputs)}), {ref(block.name)} wants ({_types(wanted)})"
    known = block.types()
    results = [known[name] for name in block.results if name in known]
    if len(results) == len(block.results) and results != wanted[:carry]:
        yield f"{ref(block.name)} returns ({_types(results)}), want ({_types(wanted[:carry])}) to feed back"


def _types(types: Iterable[Type]) -> str:
    return ", ".join(map(str, types))


def _cycles(module: Module) -> Iterator[Fault]:
    """Functions that run themselves, through others or not."""
    calls = {
        key: {r.name for op in walk(func) for _, r in _refs(op.attrs) if r.name in module.funcs}
        for key, func in module.funcs.items()
    }
    for key in calls:
        reached, todo = set[str](), list(calls[key])
        while todo:
            name = todo.pop()
            if name not in reached:
                reached.add(name)
                todo.extend(calls[name])
        if key in reached:
            yield Fault(ref(key), "", "runs itself, want no cycle")


def _decode(module: Module) -> Iterator[Fault]:
    if module.decode is None:
        return
    for name, target in _refs(module.decode.attrs):
        func = module.funcs.get(target.name)
        for message in _ref(module, name, target):
            yield Fault("decode", decode_line(module.decode), message)
        if func and func.block:
            yield Fault("decode", decode_line(module.decode), f"{name}: {target} is a block, want a func")
    for message in strategy_faults(module):
        yield Fault("decode", decode_line(module.decode), message)


__all__ = ["Fault", "check", "verify", "warnings"]
