"""An op against its row of the table: operands, parameters, attributes, regions and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from effc.errors import EffcError, nearest
from effc.ir.core import Attr, Op, Ref
from effc.ir.ops import ELEMENTWISE, OPS, OpSpec, ShapeError, spec_of
from effc.ir.printer import attr_text
from effc.ir.types import Dim, Type


def op_faults(op: Op, inputs: Sequence[Type] | None, params: Mapping[str, Type] | None) -> Iterator[str]:
    """What is wrong with an op by itself; None where an operand or parameter is not known.

    The shape rule runs only on an op that is otherwise sound: it may count on its row.
    """
    spec = spec_of(op.kind)
    if spec is None:
        yield f"no op is named '{op.kind}'{nearest(op.kind, [*OPS, *ELEMENTWISE])}"
        return
    found = [
        *_operands(op, spec), *_roles(op, spec), *_attributes(op, spec), *_regions(op, spec),
    ]  # fmt: skip
    yield from found
    if not found and inputs is not None and params is not None:
        yield from _shapes(op, spec, inputs, params)


@dataclass(frozen=True)
class Slot:
    """A name of the table: `w`, `bias?` (may be left out), `extra*` (any number, names begin so)."""

    name: str
    optional: bool = False
    many: bool = False

    def takes(self, given: str) -> bool:
        """Whether a role or region called `given` fills it."""
        return given == self.name or (self.many and given.startswith(self.name))


def slots(names: Sequence[str]) -> list[Slot]:
    """The slots that a row's names stand for."""
    return [Slot(n.rstrip("?*"), n.endswith(("?", "*")), n.endswith("*")) for n in names]


def _operands(op: Op, spec: OpSpec) -> Iterator[str]:
    wanted = slots(spec.inputs)
    least = sum(not slot.optional for slot in wanted)
    most = None if any(slot.many for slot in wanted) else len(wanted)
    count = len(op.inputs)
    if count < least or (most is not None and count > most):
        names = f" ({', '.join(spec.inputs)})" if spec.inputs else ""
        bound = f"{least} or more" if most is None else str(most) if most == least else f"{least} to {most}"
        yield f"{count} operand{'s' * (count != 1)}, want {bound}{names}"


def _roles(op: Op, spec: OpSpec) -> Iterator[str]:
    yield from _names("parameter", op.params, slots(spec.params), "[{}=@...]")


def _regions(op: Op, spec: OpSpec) -> Iterator[str]:
    yield from _names("region", op.regions, slots(spec.regions), "{}(...) {{ ... }}")
    for role, region in op.regions.items():
        if region.block:
            yield f"region '{role}' is a block, want a plain function"


def _names(what: str, given: Mapping[str, object], wanted: list[Slot], spelled: str) -> Iterator[str]:
    for name in given:
        if not any(slot.takes(name) for slot in wanted):
            known = [slot.name for slot in wanted]
            yield f"no {what} is called '{name}', want {_listed(known)}{nearest(name, known)}"
    for slot in wanted:
        if not slot.optional and slot.name not in given:
            yield f"{what} '{slot.name}' is missing, want {spelled.format(slot.name)}"


def _listed(names: list[str]) -> str:
    return " or ".join(names) if names else "none"


def _attributes(op: Op, spec: OpSpec) -> Iterator[str]:
    for name, value in op.attrs.items():
        wanted = spec.attrs.get(name, spec.attrs.get("*"))
        if wanted is None:
            known = list(spec.attrs)
            yield f"no attribute is called '{name}', want {_listed(known)}{nearest(name, known)}"
        else:
            yield from _attribute(name, value, wanted.partition("=")[0])
    for name, wanted in spec.attrs.items():
        kind, _, default = wanted.partition("=")
        if name not in op.attrs and name != "*" and not default:
            yield f"attribute '{name}' is missing, want {{{name}=...}} ({_spelled(kind)})"


def _attribute(name: str, value: Attr | Ref, kind: str) -> Iterator[str]:
    try:
        text = attr_text(value)
    except EffcError as error:
        yield f"{name}: {error}"
        return
    if not _fits(value, kind):
        words = kind.split("|") if "|" in kind and isinstance(value, str) else []
        yield f"{name}={text}, want {_spelled(kind)}{nearest(text, words)}"


def _fits(value: Attr | Ref, kind: str) -> bool:
    match kind:
        case "any":
            return True
        case "bool":
            return isinstance(value, bool)
        case "int":
            return _whole(value)
        case "ints":
            return isinstance(value, tuple) and all(map(_whole, value))
        case "size":
            return _whole(value) or isinstance(value, Dim)
        case "float":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "ref":
            return isinstance(value, Ref)
        case _:
            return isinstance(value, str) and value in kind.split("|")


def _whole(value: Attr | Ref) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS = {
    "any": "any value", "bool": "true or false", "int": "a whole number", "ints": "whole numbers like (1,2)",
    "size": "a size like 8 or 2*b", "float": "a number", "str": "a word or string", "ref": "a name like @x",
}  # fmt: skip


def _spelled(kind: str) -> str:
    return _KINDS.get(kind) or " or ".join(kind.split("|"))


def _shapes(op: Op, spec: OpSpec, inputs: Sequence[Type], params: Mapping[str, Type]) -> Iterator[str]:
    try:
        inferred = spec.infer(op, inputs, params)
    except ShapeError as error:
        yield str(error)
        return
    if len(inferred) != len(op.outputs):
        yield f"defines {len(op.outputs)} values, want {len(inferred)}"
        return
    for value, type in zip(op.outputs, inferred, strict=True):
        if value.type != type:
            yield f"%{value.name} is declared {value.type}, want {type}"


__all__ = ["Slot", "op_faults", "slots"]
