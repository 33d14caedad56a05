"""IR to text, canonical: `parse(dump(m)) == m`, mappings in their own order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from effc.errors import EffcError
from effc.ir.core import Attr, Decode, Func, Module, Op, Param, Ref, Value
from effc.ir.types import Dim, Type

VERSION = 1

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_TAKEN = frozenset({"true", "false", "none", "inf", "nan"})
_AFTER_OP = frozenset({"at", "return", "func", "block", "param", "meta", "decode"})
_STEP = "  "


def dump(what: Module | Func, *, locs: bool = False) -> str:
    """The text of a module (header and all) or of one function; `locs` adds where ops came from."""
    if isinstance(what, Func):
        return "\n".join(_func(what, "", locs)) + "\n"
    lines = [f"effc {VERSION}", f"module {ref(what.name)} {{"]
    lines += [_STEP + _meta(what.meta)] if what.meta else []
    lines += [_STEP + param_line(param) for param in what.params.values()]
    for func in what.funcs.values():
        lines += _func(func, _STEP, locs)
    lines += [_STEP + decode_line(what.decode)] if what.decode else []
    return "\n".join([*lines, "}"]) + "\n"


def op_line(op: Op, locs: bool = False) -> str:
    """An op without its regions, on one line."""
    text = f"{_outputs(op.outputs)} = {_key(op.kind)}({_names(op.inputs)})"
    if op.params:
        text += f" [{', '.join(f'{_key(role)}={ref(name)}' for role, name in op.params.items())}]"
    if op.attrs:
        text += f" {{{_attrs(op.attrs)}}}"
    return text + (f" at {_quote(str(op.loc))}" if locs and op.loc else "")


def op_lines(op: Op, indent: str = "", locs: bool = False) -> list[str]:
    """An op with its regions, a line each."""
    lines = [indent + op_line(op, locs)]
    for role, region in op.regions.items():
        lines[-1] += f" {_region_head(role, region)}"
        lines += _body(region, indent, locs)
    return lines


def param_line(param: Param) -> str:
    """`param @layers.q: 30 * f32[576,576] = "layers_*/q/kernel"`."""
    stack = f"{param.stack} * " if param.stack else ""
    text = f"param {ref(param.name)}: {stack}{type_text(param.type)}"
    text += f" = {_quote(param.path)}" if param.path else ""
    text += f" over {attr_text(param.over)}" if param.over is not None else ""
    return text + (f" perm {attr_text(param.perm)}" if param.perm is not None else "")


def decode_line(decode: Decode) -> str:
    """`decode greedy { forward=@forward }`."""
    return f"decode {_key(decode.strategy)}" + (f" {{ {_attrs(decode.attrs)} }}" if decode.attrs else "")


def head_line(func: Func) -> str:
    """`func @forward(%tokens: i32[b,t]) {`."""
    return f"{'block' if func.block else 'func'} {ref(func.name)}{_inputs(func)} {{"


def attr_text(value: Attr | Ref) -> str:
    """One attribute value; EffcError for what the text cannot hold."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case int():
            return int.__repr__(value)
        case float():
            return float.__repr__(value)
        case str():
            return str(value) if _is_word(value) else _quote(value)
        case Dim():
            return _dim(value)
        case Type():
            return type_text(value)
        case Ref():
            return ref(value.name)
        case tuple():
            return _tuple(value)
        case _:  # a number of an array library, say: pyright cannot see those
            raise EffcError(f"attribute {value!r} is a {type(value).__name__}, want a plain Python value")


def ref(name: str) -> str:
    """`@name`, quoted where it must be."""
    return "@" + _name(name)


def type_text(type: Type) -> str:
    """A type; its own spelling, which the grammar reads."""
    return str(type)


def _func(func: Func, indent: str, locs: bool) -> list[str]:
    return [indent + head_line(func), *_body(func, indent, locs)]


def _body(func: Func, indent: str, locs: bool) -> list[str]:
    inner = indent + _STEP
    lines = [line for op in func.ops for line in op_lines(op, inner, locs)]
    return [*lines, f"{inner}{return_line(func)}", indent + "}"]


def return_line(func: Func) -> str:
    """`return %logits`."""
    return f"return {_names(func.results)}".rstrip()


def _region_head(role: str, region: Func) -> str:
    own = f" {ref(region.name)}" if region.name != role else ""
    name = _quote(role) if role in _AFTER_OP else _key(role)
    return f"{name}{own}{_inputs(region)} {{"


def _inputs(func: Func) -> str:
    return f"({', '.join(_value(value) for value in func.inputs)})"


def _value(value: Value) -> str:
    return f"%{_name(value.name)}: {type_text(value.type)}"


def _outputs(values: tuple[Value, ...]) -> str:
    if not values:
        return "()"
    return f"{_names(v.name for v in values)}: {', '.join(type_text(v.type) for v in values)}"


def _names(names: Iterable[str]) -> str:
    return ", ".join("%" + _name(name) for name in names)


def _meta(meta: Mapping[str, str | int | float | bool]) -> str:
    fields = [f"{_key(k)}={_quote(v) if isinstance(v, str) else attr_text(v)}" for k, v in meta.items()]
    return f"meta {{ {', '.join(fields)} }}"


def _attrs(attrs: Mapping[str, Attr | Ref]) -> str:
    return ", ".join(f"{_key(name)}={attr_text(value)}" for name, value in attrs.items())


def _tuple(items: tuple[Attr, ...]) -> str:
    return f"({','.join(map(attr_text, items))}{',' if len(items) == 1 else ''})"


def _dim(dim: Dim) -> str:
    """A lone name longer than a letter would read as a word, and `-inf` as a number: `1*batch`."""
    text = str(dim)
    if text in ("-inf", "-nan"):
        return f"-1*{text[1:]}"
    lone = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text)
    return f"1*{text}" if lone and not re.fullmatch(r"[a-z]", text) else text


def _name(name: str) -> str:
    return name if _NAME.fullmatch(name) else _quote(name)


def _key(word: str) -> str:
    return word if _WORD.fullmatch(word) else _quote(word)


def _is_word(text: str) -> bool:
    """A single small letter is a size (`b`), so as a word it is quoted."""
    return bool(_WORD.fullmatch(text)) and text not in _TAKEN and not re.fullmatch(r"[a-z]", text)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
