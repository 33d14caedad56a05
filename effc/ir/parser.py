"""Text to IR. The grammar is in grammar.lark; what is legal is the verifier's to say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeVar

from effc.errors import EffcError, nearest
from effc.ir.core import NAN, Attr, Decode, Func, Loc, Module, Op, Param, Ref, Value
from effc.ir.printer import VERSION
from effc.ir.types import Monomial, Quant, Size, Type, polynomial
from effc.widths import BITS

if TYPE_CHECKING:
    from lark import Lark, Token

T = TypeVar("T")

_Named = tuple["Token", str, Any]  # where it stands, its name, the thing

_LITERALS: dict[str, Attr] = {"true": True, "false": False, "none": None}

_SPELLED = {
    "VALUE": "a value like %x", "REF": "a name like @x", "TYPE": "a type like f32[b,t]",
    "INT": "a whole number", "FLOAT": "a number", "WORD": "a word", "ID": "a word", "STRING": "a string",
    "FORMULA": "a size like 2*b", "HEAD": "'func' or 'block'", "$END": "the end",
    "LPAR": "'('", "RPAR": "')'", "LBRACE": "'{'", "RBRACE": "'}'", "LSQB": "'['", "RSQB": "']'",
    "EQUAL": "'='", "COMMA": "','", "COLON": "':'", "STAR": "'*'", "SLASH": "'/'", "PLUS": "'+'",
    "MINUS": "'-'", "CIRCUMFLEX": "'^'",
}  # fmt: skip


class _Fault(Exception):
    """What is wrong with the text at an offset of it."""

    def __init__(self, offset: int, message: str):
        self.offset, self.message = offset, message


def parse(text: str, *, file: str = "<text>") -> Module:
    """The module that `text` spells; EffcError with file, line, column and a caret."""
    try:
        _check_header(text)
        return _read(text, "start")
    except _Fault as fault:
        raise EffcError(_located(text, file, fault)) from None


def parse_func(text: str, *, file: str = "<text>") -> Func:
    """One `func` or `block` by itself."""
    try:
        return _read(text, "func")[2]
    except _Fault as fault:
        raise EffcError(_located(text, file, fault)) from None


def parse_type(text: str) -> Type:
    """The type that `text` spells."""
    try:
        return _type(text)
    except _Fault as fault:
        raise EffcError(_located(text, "<type>", fault)) from None


@lru_cache(maxsize=4096)
def _type(text: str) -> Type:
    return _read(text, "type")


@lru_cache(maxsize=4096)
def _size(text: str) -> Size:
    return _read(text, "size")


def _check_header(text: str) -> None:
    head = re.match(r"(?:\s|#[^\n]*\n)*(effc[ \t]+(\S+))?", text)
    assert head
    if not head[1]:
        raise _Fault(head.end(), f"no header, want 'effc {VERSION}' first")
    if head[2] != str(VERSION):
        raise _Fault(head.start(2), f"IR version {head[2]}, want {VERSION}")


@cache
def _lark() -> Lark:
    """Loaded at the first parse: reading the grammar takes a tenth of a second."""
    from lark import Lark

    grammar = resources.files("effc.ir").joinpath("grammar.lark").read_text(encoding="utf-8")
    starts = ["start", "func", "type", "size"]
    return Lark(grammar, parser="lalr", start=starts, transformer=_Build(), maybe_placeholders=True)


def _read(text: str, start: str) -> Any:
    from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

    try:
        return _lark().parse(text, start=start)
    except UnexpectedToken as error:
        found = "end of text" if error.token.type == "$END" else repr(str(error.token))
        offset = len(text.rstrip()) if error.token.type == "$END" else error.token.start_pos
        raise _Fault(offset or 0, f"unexpected {found}, {_want(error.accepts or error.expected)}") from None
    except UnexpectedCharacters as error:
        found = re.match(r"[^\s,(){}=]+|.", text[error.pos_in_stream :])
        raise _Fault(error.pos_in_stream, f"unexpected '{found[0] if found else ''}', {_want(error.allowed)}") from None
    except UnexpectedInput as error:
        raise _Fault(error.pos_in_stream or 0, "unexpected text") from None


def _want(terminals: Iterable[str]) -> str:
    words = sorted({_SPELLED.get(name, f"'{name.lower()}'") for name in terminals}, key=lambda w: (len(w) > 3, w))
    return f"want {', '.join(words[:-1])}{' or ' if words[:-1] else ''}{words[-1]}" if words else "want nothing"


def _located(text: str, file: str, fault: _Fault) -> str:
    """`m.effc:4:27: message`, the line, and a caret under the place."""
    before = text[: fault.offset]
    line, column = before.count("\n"), fault.offset - (before.rfind("\n") + 1)
    source = text.split("\n")[line]
    return f"{file}:{line + 1}:{column + 1}: {fault.message}\n    {source}\n    {' ' * column}^"


class _Build:
    """What each grammar rule makes of its parts. Named things are (token, name, thing)."""

    def start(self, parts: list[Any]) -> Module:
        _, name, *items = parts
        meta = _only(items, dict, "meta")
        decode = _only(items, Decode, "decode")
        params, funcs = _all(items, Param), _all(items, Func)
        return Module(_name(name), meta or {}, _unique(params), _unique(funcs), decode)

    def meta(self, parts: list[Any]) -> _Named:
        return parts[0], "meta", _unique(parts[1])

    def decode(self, parts: list[Any]) -> _Named:
        word, (_, strategy), attrs = parts
        return word, "decode", Decode(strategy, _unique(attrs or []))

    def param(self, parts: list[Any]) -> _Named:
        ref, stack, type_, path, over, perm = parts
        if over is not None and not _whole(over, 3):
            raise _Fault(ref.start_pos, f"over is {over}, want (start,stop,step)")
        if perm is not None and not _whole(perm, len(perm)):
            raise _Fault(ref.start_pos, f"perm is {perm}, want axes like (1,0)")
        name, where = _name(ref), _string(path) if path else ""
        return ref, name, Param(name, _typed(type_), int(stack or 0), where, over, perm)

    def func(self, parts: list[Any]) -> _Named:
        head, ref, (inputs, ops, results) = parts
        name = _name(ref)
        return ref, name, Func(name, inputs, ops, results, block=head == "block")

    def body(self, parts: list[Any]) -> tuple[Any, tuple[Op, ...], Any]:
        return parts[0], tuple(parts[1:-1]), parts[-1]

    def inputs(self, parts: list[Any]) -> tuple[Value, ...]:
        return tuple(part for part in parts if part is not None)

    def input(self, parts: list[Any]) -> Value:
        return Value(_name(parts[0]), _typed(parts[1]))

    def results(self, parts: list[Any]) -> tuple[str, ...]:
        return tuple(map(_name, parts[0] or ()))

    operands = results

    def names(self, parts: list[Any]) -> list[Token]:
        return parts

    def op(self, parts: list[Any]) -> Op:
        outputs, (_, kind), inputs, roles, attrs, loc, *regions = parts
        return Op(
            kind, inputs, outputs, _unique(roles or []), _unique(attrs or []), _unique(regions), loc
        )  # fmt: skip

    def outputs(self, parts: list[Any]) -> tuple[Value, ...]:
        names, *types = parts
        if len(names) != len(types):
            want = f"{len(names)} values and {len(types)} types, want a type for each value"
            raise _Fault(names[0].start_pos, want)
        return tuple(Value(_name(n), _typed(t)) for n, t in zip(names, types, strict=True))

    def no_outputs(self, parts: list[Any]) -> tuple[Value, ...]:
        return ()

    def attrs(self, parts: list[Any]) -> list[_Named]:
        return [part for part in parts if part is not None]

    roles = attrs

    def attr(self, parts: list[Any]) -> _Named:
        (token, key), value = parts
        return token, key, value

    def role(self, parts: list[Any]) -> _Named:
        (token, key), ref = parts
        return token, key, _name(ref)

    def loc(self, parts: list[Any]) -> Loc:
        found = re.fullmatch(r"(?s)(?:(.*?):(\d+)(?: in |$))?(.*)", _string(parts[0]))
        assert found
        return Loc(found[3], found[1] or "", int(found[2] or 0))

    def region(self, parts: list[Any]) -> _Named:
        (token, role), ref, (inputs, ops, results) = parts
        return token, role, Func(_name(ref) if ref else role, inputs, ops, results)

    def key(self, parts: list[Token]) -> tuple[Token, str]:
        (token,) = parts
        return token, _string(token) if token.type == "STRING" else str(token)

    def integer(self, parts: list[Token]) -> int:
        return int(parts[0])

    def floating(self, parts: list[Token]) -> float:
        return NAN if parts[0].endswith("nan") else float(parts[0])

    def word(self, parts: list[Token]) -> Attr:
        text = str(parts[0])
        if text in _LITERALS:
            return _LITERALS[text]
        return _size(text) if re.fullmatch(r"[a-z]", text) else text

    def string(self, parts: list[Token]) -> str:
        return _string(parts[0])

    def type_value(self, parts: list[Token]) -> Type:
        return _typed(parts[0])

    def formula(self, parts: list[Token]) -> Size:
        return _inside(parts[0], _size)

    def ref(self, parts: list[Token]) -> Ref:
        return Ref(_name(parts[0]))

    def tuple(self, parts: list[Any]) -> tuple[Attr, ...]:
        return (*parts,)

    def type(self, parts: list[Any]) -> Type:
        dtype, fields, *sizes = parts
        shape = tuple(size for size in sizes if size is not None)
        return Type(_quant(dtype, fields) if fields else str(dtype), shape)

    def quant(self, parts: list[Any]) -> list[list[Token]]:
        return parts

    def field(self, parts: list[Any]) -> list[Token]:
        return parts

    def size(self, parts: list[Any]) -> Size:
        sign, total = 1, dict[Monomial, Fraction]()
        for part in parts:
            if isinstance(part, str):
                sign = -1 if part == "-" else 1
            elif part is not None:
                monomial, value = part
                total[monomial] = total.get(monomial, Fraction(0)) + sign * value
        return polynomial(total)

    def term(self, parts: list[Any]) -> tuple[Monomial, Fraction]:
        powers = dict[str, int]()
        for name, power, _ in parts:
            powers[name] = powers.get(name, 0) + power
        value = math.prod((number for *_, number in parts), start=Fraction(1))
        return tuple(sorted((name, power) for name, power in powers.items() if power)), value

    def number(self, parts: list[Token]) -> tuple[str, int, Fraction]:
        return "", 0, Fraction(int(parts[0]))

    def divisor(self, parts: list[Token]) -> tuple[str, int, Fraction]:
        if not int(parts[0]):
            raise _Fault(parts[0].start_pos or 0, "division by 0")
        return "", 0, Fraction(1, int(parts[0]))

    def power(self, parts: list[Token]) -> tuple[str, int, Fraction]:
        exponent = int(parts[1]) if parts[1] else 1
        if exponent < 0:
            raise _Fault(parts[1].start_pos or 0, f"power {exponent}, want 0 or more")
        return str(parts[0]), exponent, Fraction(1)


def _all(items: list[_Named], kind: type) -> list[_Named]:
    return [item for item in items if isinstance(item[2], kind)]


def _only(items: list[_Named], kind: type, what: str) -> Any:
    found = _all(items, kind)
    if len(found) > 1:
        raise _Fault(found[1][0].start_pos or 0, f"a second {what}, want one")
    return found[0][2] if found else None


def _unique(items: Sequence[_Named]) -> dict[str, Any]:
    """A mapping in the order written; a name given twice is a fault."""
    out: dict[str, Any] = {}
    for token, name, thing in items:
        if name in out:
            raise _Fault(token.start_pos or 0, f"{str(token)!r} is given twice, want each name once")
        out[name] = thing
    return out


def _whole(items: tuple[Attr, ...], count: int) -> bool:
    return len(items) == count and all(type(item) is int for item in items)


def _name(token: Token) -> str:
    """The name in `%x`, `@x` or `@"any text"`."""
    return _unquote(token, 1) if token[1] == '"' else token[1:]


def _string(token: Token) -> str:
    return _unquote(token, 0)


def _unquote(token: Token, start: int) -> str:
    try:
        return json.loads(token[start:], strict=False)
    except json.JSONDecodeError as error:
        raise _Fault((token.start_pos or 0) + start + error.pos, f"in the string: {error.msg}") from None


def _typed(token: Token) -> Type:
    return _inside(token, _type)


def _inside(token: Token, read: Callable[[str], T]) -> T:
    """What `read` makes of the token's text; faults are moved to where the token stands."""
    try:
        return read(str(token))
    except _Fault as fault:
        raise _Fault((token.start_pos or 0) + fault.offset, fault.message) from None


def _quant(dtype: Token, fields: list[list[Token]]) -> Quant:
    """`q4{group=64,sym,scale=f16,axis=-1}`; group stands for `channel` too."""
    if not re.fullmatch(r"q[0-9]+", dtype) and str(dtype) not in BITS:
        raise _Fault(dtype.start_pos or 0, f"dtype {dtype} has no settings, want q2 .. q8, {', '.join(BITS)}")
    given: dict[str, Any] = {}
    for name, value in fields:
        field, made = _quant_field(name, value)
        if field in given:
            raise _Fault(name.start_pos or 0, f"{str(name)!r} says {field} again, want it once")
        given[field] = made
    form = str(dtype) if dtype in BITS else "int"
    return Quant(BITS.get(form) or int(dtype[1:]), form=form, **given)


def _quant_field(name: Token, value: Token | None) -> tuple[str, int | str | bool]:
    """Field of Quant and its value for `group=64`, `sym`, ..."""
    setting = str(name)
    if value is None and setting in _BARE:
        return _BARE[setting]
    if value is not None and setting in ("group", "axis") and value.type == "INT":
        return setting, int(value)
    if value is not None and setting == "scale" and value.type == "ID":
        return setting, str(value)
    hint = nearest(setting, [*_BARE, "group", "axis", "scale"])
    want = "want channel or group=N, sym or asym, scale=DTYPE, axis=N"
    raise _Fault(name.start_pos or 0, f"quantization setting '{setting}', {want}{hint}")


_BARE: dict[str, tuple[str, int | bool]] = {
    "channel": ("group", 0), "sym": ("sym", True), "asym": ("sym", False),
}  # fmt: skip
