"""Which parameters a weight quantizer codes, with how many bits, and why it leaves the others."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from effc.errors import nearest
from effc.ir.core import Func, Module, Op, Param, Ref, param_uses
from effc.ir.ops import ELEMENTWISE
from effc.ir.types import Quant, Type
from effc.passes.base import Notes, PassError
from effc.passes.quant.rules import FORMATS, Rule, check_used, first
from effc.passes.quantizer import Method, quantize
from effc.weights import Arrays, Lazy, Store, elements, nbytes

SMALL = 32
"""Matrices of fewer outputs (routers, gates) are left alone: they cost nothing and decide much."""

SMALLEST_GROUP = 8


@dataclass(frozen=True)
class Rules:
    """Options that the quantizers share; bits of 0 leave a parameter as it is."""

    name: str
    bits: int
    group: int
    sym: bool
    scale: str
    embed: int
    head: int
    only: str
    skip: str
    rules: tuple[Rule, ...] = ()
    form: str = "int"


@dataclass(frozen=True)
class _Role:
    """What reads a parameter: along which axis, and whether it is a table, the head or both."""

    axis: int
    table: bool
    head: bool

    def kinds(self) -> set[str]:
        """As rules speak of it."""
        return {*["@embed"] * self.table, *["@head"] * self.head} or {"@linear"}


def plan(module: Module, rules: Rules, notes: Notes) -> dict[str, Quant]:
    """How each parameter that is to be coded is coded; the rest is explained in `notes`."""
    names = _selected(module, rules)
    head, uses = head_params(module), param_uses(module)
    out: dict[str, Quant] = {}
    used: set[Rule] = set()
    for name in names:
        param, role = module.params[name], _role(uses[name], name in head)
        why = role if isinstance(role, str) else _unfit(param, role)
        if why or isinstance(role, str):
            notes.skip(name, why)
            continue
        rule = first(rules.rules, name, role.kinds())
        used |= {rule} if rule else set()
        kept = _kept_by(rule) if rule else _kept(role, rules)
        if kept:
            notes.skip(name, kept)
        else:
            out[name] = _ruled(param, role, rule, rules, notes) if rule else _quant(param, role, rules, notes)
    check_used(f"{rules.name}: rules", rules.rules, used, list(module.params))
    summarize(module, out, notes)
    return out


def recoded(module: Module, quants: Mapping[str, Quant]) -> Module:
    """The module with these parameters coded."""
    changed = [replace(module.params[n], type=Type(q, module.params[n].type.shape)) for n, q in quants.items()]
    return module.with_params(*changed)


def coded(before: Module, after: Module, store: Store, method: Method, notes: Notes | None = None) -> list[Lazy]:
    """Lazily quantized arrays for every parameter whose dtype became a coded one; their errors to `notes`."""
    changed = [
        p for n, p in after.params.items() if isinstance(p.type.dtype, Quant) and p.type != before.params[n].type
    ]
    return [Lazy(param, _reader(store[param.name], param, method, notes)) for param in changed]


def shrinks(name: str, before: Module, after: Module) -> None:
    """Raise PassError where coding did not save bytes: of every array that is coded, and of all together."""
    for was, param in ((before.params.get(n), p) for n, p in after.params.items()):
        if was and was.type != param.type and param.type.nbytes() >= was.type.nbytes():
            raise PassError(f"{name}: {param.name} takes {param.type.nbytes()} bytes as {param.type}, "
                            f"{was.type.nbytes()} before: want fewer bits or wider groups")  # fmt: skip
    if before != after and nbytes(after) >= nbytes(before):
        raise PassError(f"{name}: {nbytes(after)} bytes of weights after, {nbytes(before)} before: nothing was saved")


def bytes_by_dtype(module: Module) -> str:
    """`q4 12.3 MB, f32 0.1 MB, 4.9 bits a weight`."""
    sizes: dict[str, int] = {}
    for param in module.params.values():
        dtype = param.type.dtype
        short = dtype.dtype if isinstance(dtype, Quant) else dtype
        sizes[short] = sizes.get(short, 0) + param.count * param.type.nbytes()
    told = [f"{dtype} {size / 1e6:.2f} MB" for dtype, size in sorted(sizes.items(), key=lambda item: -item[1])]
    return f"{', '.join(told)}, {8 * sum(sizes.values()) / max(elements(module), 1):.2f} bits a weight"


def head_params(module: Module) -> frozenset[str]:
    """Matrices of the linears whose output reaches the logits through elementwise ops and calls alone."""
    return frozenset(_last_linears(module, module.forward())) if module.funcs else frozenset()


def _last_linears(module: Module, func: Func) -> Iterator[str]:
    makers = {value.name: op for op in func.ops for value in op.outputs}
    wanted = list(func.results)
    while wanted:
        op = makers.get(wanted.pop())
        if op is None:
            continue
        called = op.attrs.get("func" if op.kind == "call" else "head")
        if isinstance(called, Ref):
            yield from _last_linears(module, module.funcs[called.name])
        elif op.kind == "linear":
            yield op.params["w"]
        elif op.kind in ELEMENTWISE | {"softcap"}:
            wanted += op.inputs


def matching(patterns: str, names: Sequence[str], where: str) -> set[str]:
    """Names that one of `a|b` globs fits; PassError for a glob that fits none."""
    out: set[str] = set()
    for pattern in filter(None, patterns.split("|")):
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise PassError(f"{where}: '{pattern}' matches none of {len(names)} names{nearest(pattern, names)}")
        out.update(hits)
    return out


def _selected(module: Module, rules: Rules) -> list[str]:
    """Matrices the patterns leave, in the module's order."""
    names = list(module.params)
    wanted = matching(rules.only, names, f"{rules.name}: only") if rules.only != "*" else set(names)
    wanted -= matching(rules.skip, names, f"{rules.name}: skip")
    return [name for name in names if name in wanted and len(module.params[name].type.shape) > 1]


def kinds(module: Module, names: Iterable[str]) -> dict[str, set[str]]:
    """What reads each of these parameters, as rules speak of it."""
    head, uses = head_params(module), param_uses(module)
    roles = {name: _role(uses[name], name in head) for name in names}
    return {name: set() if isinstance(role, str) else role.kinds() for name, role in roles.items()}


def _role(uses: Sequence[tuple[Func, Op, str]], head: bool) -> _Role | str:
    """The role, or why there is none."""
    axes = {_axis(op, role) for _, op, role in uses}
    if None in axes:
        odd = next(op.kind for _, op, role in uses if _axis(op, role) is None)
        return f"read by '{odd}', not only by linears and embeddings"
    if len(axes) != 1:
        return "read along both of its axes" if axes else "read by no op"
    (axis,) = axes
    assert axis is not None
    return _Role(axis, any(role == "table" for _, _, role in uses), head)


def _axis(op: Op, role: str) -> int | None:
    """The axis that is summed over; a table's rows are read whole."""
    if op.kind == "linear" and role == "w":
        return -2 if op.attrs.get("layout", "kn") == "kn" else -1
    return -1 if op.kind == "embed" else None


def _unfit(param: Param, role: _Role) -> str:
    dtype = param.type.dtype
    if isinstance(dtype, Quant):
        return f"is {dtype} already"
    if dtype not in ("f32", "f16", "bf16", "f64"):
        return f"holds {dtype}, not floats"
    outputs = param.type.shape[-3 - role.axis]
    small = isinstance(outputs, int) and outputs < SMALL
    return f"has {outputs} outputs, fewer than {SMALL}: a gate or router" if small else ""


def _bits(role: _Role, rules: Rules) -> int:
    """A table that is the head too gets the more careful of the two."""
    asked = [rules.embed] * role.table + [rules.head] * role.head
    return 0 if 0 in asked else max(asked, default=rules.bits)


def _kept(role: _Role, rules: Rules) -> str:
    options = [
        f"{n}=0"
        for n, on, bits in (("embed", role.table, rules.embed), ("head", role.head, rules.head))
        if on and not bits
    ]
    return f"left as it is by {options[0]}" if options else ""


def _kept_by(rule: Rule) -> str:
    return "" if rule.bits else f"left as it is by the rule {rule.text}"


def _ruled(param: Param, role: _Role, rule: Rule, rules: Rules, notes: Notes) -> Quant:
    group, sym = (rules.group if rule.group is None else rule.group), (rules.sym if rule.sym is None else rule.sym)
    if rule.form != "int":
        return _formatted(param, role, rule.form, rule.group, rules, notes)
    return Quant(rule.bits, _fitted(param, role, group, notes), sym, rules.scale, role.axis)


def _formatted(param: Param, role: _Role, name: str, group: int | None, rules: Rules, notes: Notes) -> Quant:
    """In one of FORMATS, whose own group and scales go before those of the options."""
    form = FORMATS[name]
    wanted = form.group if group is None and form.group >= 0 else rules.group if group is None else group
    fitted = _fitted(param, role, wanted, notes)
    return Quant(form.bits, fitted, True, form.scale or rules.scale, role.axis, form.form)


def _quant(param: Param, role: _Role, rules: Rules, notes: Notes) -> Quant:
    bits = _bits(role, rules)
    special = " and ".join(["embedding"] * role.table + ["head"] * role.head)
    if special and bits > rules.bits:
        notes.chose(f"{param.name}: {special}, {bits} bits with one scale a row")
        return Quant(bits, 0, rules.sym, rules.scale, role.axis)
    if rules.form != "int":
        return _formatted(param, role, rules.form, None, rules, notes)
    return Quant(bits, _fitted(param, role, rules.group, notes), rules.sym, rules.scale, role.axis)


def _fitted(param: Param, role: _Role, wanted: int, notes: Notes) -> int:
    """The group that the parameter's axis allows."""
    extent = param.type.shape[role.axis]
    assert isinstance(extent, int)
    group = fitting_group(extent, wanted)
    if group != wanted:
        notes.chose(f"{param.name}: {wanted} does not divide {extent}, groups of {group or extent}")
    return group


def fitting_group(extent: int, group: int) -> int:
    """`group` where it divides `extent`, else the divisor nearest to it; 0 for the whole axis."""
    if not group or extent % group == 0:
        return 0 if group == extent else group
    divisors = [n for n in range(min(SMALLEST_GROUP, extent), extent + 1) if extent % n == 0]
    near = min(divisors, key=lambda n: (abs(n - group), n))
    return 0 if near == extent else near


def summarize(module: Module, quants: Mapping[str, Quant], notes: Notes) -> None:
    """How many parameters are coded how, to `notes`."""
    by_code: dict[str, int] = {}
    for quant in quants.values():
        by_code[str(quant)] = by_code.get(str(quant), 0) + 1
    for code, count in by_code.items():
        notes.chose(f"{_counted(count, 'parameter')} as {code}")
    for form in sorted({quant.form for quant in quants.values()} - {"int"}):
        notes.chose(f"{form}: no native kernel takes it, products run through XLA on weights as floats, slower")
    vectors = [n for n, p in module.params.items() if len(p.type.shape) < 2]
    if vectors:
        notes.chose(f"{_counted(len(vectors), 'vector')} (norm scales, biases) left as they are")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _reader(lazy: Lazy, param: Param, method: Method, notes: Notes | None) -> Callable[[int], Arrays]:
    quant = param.type.dtype
    assert isinstance(quant, Quant)
    errors: list[float] = []

    def read(layer: int) -> Arrays:
        where = f"{param.name}[{layer}]" if param.stack else param.name
        if notes is None:
            return quantize(lazy.read(layer)[""], quant, method, where)
        made = quantize(lazy.read(layer)[""], quant, method, where, off=errors.append)
        tell_errors(notes, param, errors, "weights")
        return made

    return read


def tell_errors(notes: Notes, param: Param, errors: Sequence[float], what: str) -> None:
    """Once all layers are there: how far they are off, as shares of their own size."""
    if len(errors) == param.count:
        worst = f", {max(errors):.2%} in layer {errors.index(max(errors))}" if param.stack else ""
        notes.chose(f"{param.name}: {what} off by {sum(errors) / len(errors):.2%}{worst}")
