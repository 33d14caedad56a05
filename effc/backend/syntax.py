"""Pieces of Python source as libcst nodes: names, literals, calls, statements, functions."""

from __future__ import annotations

import builtins
import keyword
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import libcst as cst

from effc.errors import EffcError
from effc.ir.core import Attr, Dim, Ref, Type

WIDTH = 100
"""Longer calls get an argument a line."""

Expr = cst.BaseExpression
Statement = cst.SimpleStatementLine | cst.BaseCompoundStatement


class Names:
    """Python names for IR values: kept where they are valid and free, else altered until they are."""

    def __init__(self, taken: Iterable[str]):
        self._taken = {*taken, *dir(builtins)} | set(keyword.kwlist)
        self._of: dict[str, str] = {}

    def __getitem__(self, value: str) -> str:
        return self._of[value]

    def new(self, value: str) -> str:
        """The name for a value not seen before."""
        self._of[value] = self.fresh(value)
        return self._of[value]

    def alias(self, value: str, name: str) -> None:
        """Call `value` what something else is called already."""
        self._of[value] = name

    def known(self) -> dict[str, str]:
        """What every value is called now, for `restore`."""
        return dict(self._of)

    def restore(self, known: dict[str, str]) -> None:
        """Call values what they were called before a region that has values of the same names."""
        self._of = known

    def fresh(self, wanted: str) -> str:
        """A name like `wanted` that nothing has."""
        base = re.sub(r"\W", "_", wanted)
        name = base = base if base[:1].isidentifier() else f"v{base}"
        count = 2
        while name in self._taken:
            name, count = (f"{base}_", count) if name == base else (f"{base}_{count}", count + 1)
        self._taken.add(name)
        return name


def expr(text: str) -> Expr:
    """A parsed expression."""
    return cst.parse_expression(text)


def name(text: str) -> cst.Name:
    """A plain name."""
    return cst.Name(text)


def string(text: str) -> cst.SimpleString:
    """A literal in double quotes where it can be."""
    body = repr(text)
    if body[0] == "'" and '"' not in body:
        body = f'"{body[1:-1]}"'
    return cst.SimpleString(body)


def literal(value: Attr | Ref) -> Expr:
    """An attribute's value; sizes are formulas of the local b and t."""
    match value:
        case bool() | None | int():
            return expr(repr(value))
        case float():
            return expr(_float(value))
        case str():
            return string(value)
        case Dim():
            return expr(_formula(value))
        case tuple():
            return sequence([literal(item) for item in value])
        case Ref() | Type():
            raise EffcError(f"emit: {value} as an attribute, want a number, word, size or tuple")


def _float(value: float) -> str:
    if math.isnan(value):
        return "jnp.nan"
    if math.isinf(value):
        return "jnp.inf" if value > 0 else "-jnp.inf"
    return repr(value)


def _formula(size: Dim) -> str:
    """`2*b*t+1`; quotients are whole whenever the size is."""
    if not size.names() <= {"b", "t"}:
        raise EffcError(f"emit: the size {size} depends on more than b and t")
    return str(size).replace("^", "**").replace("/", "//")


def sequence(items: Sequence[Expr]) -> cst.Tuple:
    """A tuple, `(a,)` when single."""
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    last = cst.Comma() if len(items) == 1 else cst.MaybeSentinel.DEFAULT
    marks = [comma] * (len(items) - 1) + [last]
    return cst.Tuple([cst.Element(item, mark) for item, mark in zip(items, marks, strict=False)])


def item(of: str, *keys: str | int) -> Expr:
    """`params["embed"]`, `params["layers"][0]`."""
    text = of + "".join(f"[{string(k).value}]" if isinstance(k, str) else f"[{k}]" for k in keys)
    return expr(text)


def call(function: str, args: Sequence[Expr], keywords: Mapping[str, Expr] | None = None) -> cst.Call:
    """`function(args, key=value)`, broken into lines where it would be wide."""
    tight = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    for key in keywords or {}:
        if not key.isidentifier():
            raise EffcError(f"emit: '{key}' as a keyword of {function}, want an identifier")
    all_args = [cst.Arg(a) for a in args]
    all_args += [cst.Arg(v, keyword=name(k), equal=tight) for k, v in (keywords or {}).items()]
    node = cst.Call(expr(function), all_args)
    return node if len(code(node)) <= WIDTH else _broken(node)


def _broken(node: cst.Call) -> cst.Call:
    def newline(indent: str) -> cst.ParenthesizedWhitespace:
        return cst.ParenthesizedWhitespace(indent=True, last_line=cst.SimpleWhitespace(indent))

    inner = [a.with_changes(comma=cst.Comma(whitespace_after=newline("    "))) for a in node.args[:-1]]
    last = node.args[-1].with_changes(comma=cst.Comma(whitespace_after=newline("")))
    return node.with_changes(args=[*inner, last], whitespace_before_args=newline("    "))


def binary(left: Expr, operator: str, right: Expr) -> Expr:
    """`left operator right` of two simple operands."""
    return expr(f"{code(left)} {operator} {code(right)}")


def assign(targets: Sequence[str], value: Expr) -> cst.SimpleStatementLine:
    """`a, b = value`."""
    template = cst.parse_statement(f"{', '.join(targets)} = 0")
    made = cst.ensure_type(cst.ensure_type(template, cst.SimpleStatementLine).body[0], cst.Assign)
    return line(made.with_changes(value=value))


def line(small: cst.BaseSmallStatement) -> cst.SimpleStatementLine:
    """One statement on a line of its own."""
    return cst.SimpleStatementLine([small])


def give(values: Sequence[Expr]) -> cst.SimpleStatementLine:
    """`return a, b`."""
    bare = sequence(values).with_changes(lpar=[], rpar=[]) if len(values) > 1 else values[0]
    return line(cst.Return(bare))


def docstring(lines: Sequence[str]) -> cst.SimpleStatementLine:
    """Lines of text as a module's first statement; whatever they hold, they stay a string."""
    body = "\n".join(" ".join(text.splitlines()) for text in lines)
    body = body.replace("\\", "\\\\").replace('"', '\\"') if '"' in body or "\\" in body else body
    return line(cst.Expr(cst.SimpleString(f'"""{body}\n"""')))


def loop(targets: Sequence[str], over: Expr, body: Sequence[Statement]) -> cst.For:
    """`for a, b in over:`."""
    target = name(targets[0]) if len(targets) == 1 else cst.Tuple([cst.Element(name(t)) for t in targets], [], [])
    return cst.For(target, over, cst.IndentedBlock(list(body)))


def function(
    title: str,
    parameters: Sequence[str],
    body: Sequence[Statement],
    *,
    doc: str = "",
    notes: Sequence[str] = (),
) -> cst.FunctionDef:
    """`def title(parameters):` with a docstring and comments on entry; `a=None` is a default."""
    head = cst.parse_statement(f"def {title}({', '.join(parameters)}): pass")
    assert isinstance(head, cst.FunctionDef)
    statements = [line(cst.Expr(cst.SimpleString(f'"""{doc}"""')))] if doc else []
    return head.with_changes(body=cst.IndentedBlock([*statements, *commented(body, notes)]))


def commented(body: Sequence[Statement], notes: Sequence[str]) -> list[Statement]:
    """`body` with comment lines before its first statement."""
    marks = [cst.EmptyLine(comment=cst.Comment("# " + " ".join(note.splitlines()))) for note in notes]
    return [_after_lines(body[0], marks), *body[1:]]


def spaced(statement: Statement, lines: int) -> Statement:
    """`statement` after blank lines."""
    return _after_lines(statement, [cst.EmptyLine(indent=False)] * lines)


def _after_lines(statement: Statement, lines: Sequence[cst.EmptyLine]) -> Statement:
    match statement:
        case cst.SimpleStatementLine() | cst.FunctionDef() | cst.For() | cst.If():
            return statement.with_changes(leading_lines=[*lines, *statement.leading_lines])
    raise TypeError(f"{type(statement).__name__} has no leading lines")


def statements(text: str) -> list[Statement]:
    """Parsed statements of a template."""
    return list(cst.parse_module(text.strip() + "\n").body)


def code(node: cst.CSTNode) -> str:
    """Its source."""
    return cst.Module([]).code_for_node(node)
