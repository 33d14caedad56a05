"""IR to a Python program a person would write: one function a block, the layer loop, the calls."""

from __future__ import annotations

import linecache
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import libcst as cst

from effc.backend import syntax
from effc.backend.syntax import Expr, Names, call, code, expr, item, literal
from effc.errors import EffcError, nearest
from effc.ir.core import Func, Module, Op, Param, Ref, Value, walk
from effc.ir.types import Dim, Type, depends
from effc.runtime import primitives
from effc.runtime.program import Program

Statements = list[cst.BaseStatement]

LAYERS = frozenset(
    {"embed", "linear", "norm", "rope_table", "rope", "attention", "silu", "gelu", "softcap", "split"}
)
"""Ops that are a call of the function of their name in `effc.runtime.layers`."""

_PRECISE = frozenset({"embed", "linear", "norm"})
"""Those that take the result's dtype."""

_TUPLES = frozenset({"sort", "scan", "split"})
"""Those that give a tuple even of one."""

_CACHED = frozenset({"positions", "attention", "window"})

OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "and": "&", "or": "|", "xor": "^",
}  # fmt: skip

_RESERVED = frozenset(
    {
        "jax",
        "jnp",
        "lax",
        "ops",
        "LAX",
        "Step",
        "run",
        "window",
        "b",
        "t",
        "p",
        "params",
        "cache",
        "valid",
        "step",
    }
    | {"forward", "extend", "main", "PARAMS", "CONTEXT"}
    | LAYERS
)


def emit(module: Module, *, version: str = "", pipeline: str = "") -> str:
    """The source of `program.py`, whose docstring names effc's version and the passes; EffcError for an unknown op."""
    source = _Emitter(module, version, pipeline).source()
    compile(source, "program.py", "exec")
    return source


def load_program(source: str) -> Program:
    """The program that emitted source defines. Runs it: never give it text from an artifact."""
    title = f"<effc program {hash(source) & 0xFFFFFFFF:08x}>"
    linecache.cache[title] = (len(source), None, source.splitlines(True), title)
    space: dict[str, Any] = {"__name__": "effc_program", "__file__": title}
    exec(compile(source, title, "exec"), space)
    return Program(space["extend"], space["PARAMS"], space.get("CONTEXT"))


@dataclass(frozen=True)
class _Block:
    """What a call of an emitted block passes besides its operands."""

    title: str
    group: str  # key of its stacked parameters in `params`; "" where it has none
    shared: bool  # reads unstacked parameters
    steps: bool  # reads or writes the cache

    def arguments(self) -> tuple[list[str], list[str]]:
        """Before and after the operands."""
        before = ["p"] * bool(self.group) + ["params"] * self.shared
        return before, ["step"] * self.steps


class _Emitter:
    """Source of one module: blocks in the order they are met, then `extend` and `forward`."""

    def __init__(self, module: Module, version: str, pipeline: str):
        self.module, self.version, self.pipeline = module, version, pipeline
        self.used: set[str] = set()  # names to import
        self.blocks: dict[str, _Block] = {}
        self.titles = Names(_RESERVED)
        self.tree = _tree(module)

    def source(self) -> str:
        main = self.module.forward()
        bodies = [self._block(func) for func in _reached(self.module, main)]
        extend = _Body(self, main, None).extend()
        forward = syntax.statements(_FORWARD.format(tokens=extend.params.params[1].name.value))[0]
        main_parts = [syntax.statements(text)[0] for text in (_MAIN, _START)]
        functions = [*bodies, extend, forward, *main_parts]
        body = [*self._head(), *(syntax.spaced(part, 2) for part in functions)]
        return cst.Module(body).code

    def _block(self, func: Func) -> cst.FunctionDef:
        stacked = [name for op in walk(func) for name in op.params.values() if self._param(name).stack]
        shared = any(not self._param(name).stack for op in walk(func) for name in op.params.values())
        nested = any(op.kind == "repeat" for op in walk(func))
        steps = _steps(self.module, func)
        title = self.titles.new(func.name)
        self.blocks[func.name] = _Block(
            title, self.place(stacked[0])[0] if stacked else "", shared or nested, steps
        )
        return _Body(self, func, self.blocks[func.name]).block()

    def _param(self, name: str) -> Param:
        if name not in self.module.params:
            raise EffcError(f"emit: no parameter @{name}{nearest(name, self.module.params)}")
        return self.module.params[name]

    def place(self, name: str) -> tuple[str, str]:
        """Group and key of a parameter in the program's `params`; group "" where it is not stacked."""
        self._param(name)
        return self.tree[name]

    def _head(self) -> Statements:
        meta, forward = self.module.meta, self.module.forward()
        source = f", from {meta['source']}" if "source" in meta else ""
        doc = [f"{self.module.name}{source}: written by {f'effc {self.version}'.strip()}."]
        doc += ["", f"Passes: {self.pipeline}."] if self.pipeline else []
        doc += ["", *textwrap.wrap(_TELLS.format(types=_signature(forward)).strip(), syntax.WIDTH)]
        imports = syntax.statements(self._imports())
        doc_line = syntax.statements('"""' + "\n".join(doc) + '\n"""')
        return [*doc_line, syntax.spaced(imports[0], 1), *imports[1:], *self._constants()]

    def _imports(self) -> str:
        layers = sorted(self.used & LAYERS)
        lines = ["import jax"] * ("jax" in self.used) + ["import jax.numpy as jnp"] * ("jnp" in self.used)
        lines += ["from jax import lax"] * ("lax" in self.used) + [""] * bool(lines or "lax" in self.used)
        lines += ["from effc.runtime import primitives as ops"] * ("ops" in self.used)
        lines += ["from effc.runtime.cache import Step"]
        lines += [f"from effc.runtime.layers import {', '.join(layers)}"] * bool(layers)
        lines += ["from effc.runtime.primitives import LAX"] * ("LAX" in self.used)
        lines += ["from effc.runtime.program import run"]
        lines += ["from effc.runtime.window import window"] * ("window" in self.used)
        return "\n".join(lines) + "\n"

    def _constants(self) -> Statements:
        context = f"CONTEXT = {self.module.meta.get('context')!r}  # tokens a sequence may hold"
        return [syntax.spaced(syntax.statements(text)[0], 1) for text in (self._params_table(), context)]

    def _params_table(self) -> str:
        """`PARAMS`: a line a parameter; nested groups are lists of one such dict a layer."""
        groups: dict[str, list[str]] = {}
        for name, param in self.module.params.items():
            group, key = self.place(name)
            stored = f"{group}.{key}" if group else key
            elsewhere = f" = {name}" if stored != name else ""
            count = f"{param.stack} * " if param.stack else ""
            groups.setdefault(group, []).append(
                f"{_quoted(key)}: {_quoted(f'{count}{param.type}{elsewhere}')},"
            )
        lines = [f"    {entry}" for entry in groups.pop("", [])]
        for group, entries in groups.items():
            lines += [f"    {_quoted(group)}: {{", *(f"        {entry}" for entry in entries), "    },"]
        return "\n".join(["PARAMS = {", *lines, "}"]) + "\n"


_TELLS = """
`forward(params, tokens)` is the whole model, {types}. `extend` is the same with a cache of
keys and values: it takes the next t tokens of each sequence, so it serves prefill, decoding a token
and verifying several. `params` are the arrays of `PARAMS`, stacked ones as a list of layers.
"""

_FORWARD = '''
def forward(params, {tokens}):
    """Logits of every token, from the start of each sequence."""
    return extend(params, {tokens})[0]
'''

_MAIN = '''
def main():
    """Continue a prompt: python program.py [--help]."""
    run(__file__, extend, PARAMS, CONTEXT)
'''

_START = """
if __name__ == "__main__":
    main()
"""


class _Body:
    """The statements of one function."""

    def __init__(self, emitter: _Emitter, func: Func, block: _Block | None):
        self.emitter, self.func, self.block_info = emitter, func, block
        self.names = Names([*_RESERVED, *(b.title for b in emitter.blocks.values())])
        self.types = func.types()
        self.scope, self.results = func.ops, func.results
        self.keys: list[str] = []  # names of the attention's keys and values being written
        self.literals: dict[str, Expr] = {}  # scalar constants, written where they are used

    def block(self) -> cst.FunctionDef:
        assert self.block_info is not None
        inputs = [self.names.new(value.name) for value in self.func.inputs]
        before, after = self.block_info.arguments()
        body = [*self._sizes(self.func.inputs, self.func.ops), *self.ops(self.func.ops)]
        body.append(syntax.give([self.value(name) for name in self.func.results]))
        notes = [_signature(self.func)]
        return syntax.function(self.block_info.title, [*before, *inputs, *after], body, notes=notes)

    def extend(self) -> cst.FunctionDef:
        """The forward function over a cache; rows that are not wanted are dropped after the last op that needs them."""
        (tokens,) = self.func.inputs
        title = self.names.new(tokens.name)
        cut = _cut(self.emitter.module, self.func)
        cut = cut if all(_by_token(self.types[n]) for n in self._crossing(cut)) else len(self.func.ops)
        before, after = self.func.ops[:cut], self.func.ops[cut:]
        body = [*syntax.statements(f"step = Step({title}, cache, valid)"), *self._sizes((tokens,), before)]
        body += [*self.ops(before), *self._last_rows(cut), *self.ops(after)]
        (logits,) = self.func.results
        body.append(syntax.give([self.value(logits), expr("step.cache()")]))
        notes = [
            _signature(self.func),
            "valid i32[b]: how many tokens are not padding; then logits of the last one only",
        ]
        return syntax.function("extend", ["params", title, "cache=None", "valid=None"], body, notes=notes)

    def _crossing(self, cut: int) -> list[str]:
        """Values that depend on t, made before the cut and read after it."""
        after = self.func.ops[cut:]
        made = {value.name for op in after for value in op.outputs}
        read = dict.fromkeys([*(name for op in after for name in _reads(op)), *self.func.results])
        return [n for n in read if n in self.types and n not in made and _by_calls(self.types[n])]

    def _last_rows(self, cut: int) -> Statements:
        """`x = step.last(x)` for every value of [b,t,...] that later ops read."""
        rows = self._crossing(cut)
        out = [syntax.assign([self.names[n]], expr(f"step.last({self.names[n]})")) for n in rows]
        return [*out, *self._sizes([Value(n, self.types[n]) for n in rows], self.func.ops[cut:])]

    def _sizes(self, values: Iterable[Value], ops: Iterable[Op]) -> Statements:
        """`b, t = x.shape[:2]` where a formula of these ops needs it."""
        wanted = [size for size in "bt" if any(_mentions(op, size) for op in ops)]
        if not wanted:
            return []
        for value in values:
            if _by_token(value.type):
                return syntax.statements(f"b, t = {self.names[value.name]}.shape[:2]")
        raise EffcError(
            f"emit: @{self.func.name} needs the size {wanted[0]}, want an operand of shape [b,t,...]"
        )

    def ops(self, ops: Iterable[Op]) -> Statements:
        return [statement for op in ops for statement in self.op(op)]

    def op(self, op: Op) -> Statements:
        """The statements of one op."""
        if op.kind == "const" and not op.out.type.shape and self._only_in_operators(op.out.name):
            self.literals[op.out.name] = literal(op.attrs["value"])
            return []
        if op.kind == "repeat":
            return self._repeat(op)
        before: Statements = []
        functions: list[Expr] = []
        for role, region in op.regions.items():
            title = self.names.fresh(f"{op.outputs[0].name}_{role}")
            before.append(self._region(op, title, region))
            functions.append(syntax.name(title))
        if op.kind == "attention":
            before.append(self._append(op))
        value = self._expression(op, functions)
        targets = [self.names.new(v.name) for v in op.outputs]
        single = len(targets) == 1 and op.kind.removeprefix("lax.") in _TUPLES
        return [*before, syntax.assign([f"({targets[0]},)"] if single else targets, value)]

    def _expression(self, op: Op, functions: list[Expr]) -> Expr:
        if op.kind.startswith("lax."):
            return self._primitive(op, functions)
        match op.kind:
            case "attention":
                return self._attention(op, functions)
            case "positions":
                return expr("step.positions")
            case "window":
                self.emitter.used.add("window")
                return call("window", [syntax.name("step"), *functions, *self._inputs(op)])
            case "param":
                return self.param(op.params["value"])
            case "const":
                return self._const(op)
            case kind if kind in LAYERS:
                self.emitter.used.add(kind)
                return call(kind, [*self._inputs(op), *self._positional(op)], self._keywords(op))
        raise EffcError(
            f"{self._where(op)}: the emitter has no Python for '{op.kind}'{nearest(op.kind, LAYERS)}"
        )

    def _where(self, op: Op) -> str:
        return f"@{self.func.name}: {', '.join(f'%{v.name}' for v in op.outputs)}" + (
            f" ({op.loc})" if op.loc else ""
        )

    def value(self, name: str) -> Expr:
        return self.literals[name] if name in self.literals else syntax.name(self.names[name])

    def param(self, name: str) -> Expr:
        """`p["attn.q"]` in a block, `params["embed"]` elsewhere."""
        group, key = self.emitter.place(name)
        if not group:
            return item("params", key)
        if self.block_info is None or self.block_info.group != group:
            raise EffcError(f"emit: @{self.func.name} reads @{name}, one array a layer, outside of its block")
        return item("p", key)

    def _inputs(self, op: Op) -> list[Expr]:
        return [self.value(name) for name in op.inputs]

    def _positional(self, op: Op) -> list[Expr]:
        """The parameters in the runtime function's order; None for one left out before another."""
        order = {
            "linear": ("w", "bias"),
            "norm": ("scale", "bias"),
            "embed": ("table",),
            "rope_table": ("freq",),
        }
        roles = list(order.get(op.kind, ()))
        while roles and roles[-1] not in op.params:
            roles.pop()
        return [self.param(op.params[role]) if role in op.params else syntax.name("None") for role in roles]

    def _keywords(self, op: Op) -> dict[str, Expr]:
        keywords = {
            name: literal(value)
            for name, value in op.attrs.items()
            if (op.kind, name) != ("attention", "mask")
        }
        if op.kind in _PRECISE and op.out.type.dtype != self._natural(op):
            keywords["dtype"] = self._dtype(op.out.type)
        return keywords

    def _natural(self, op: Op) -> object:
        """The dtype its function gives when not told one."""
        if op.kind != "embed":
            return self.types[op.inputs[0]].dtype
        dtype = self.emitter.module.params[op.params["table"]].type.dtype
        return dtype if isinstance(dtype, str) else "f32"

    def _dtype(self, type_: Type) -> Expr:
        self.emitter.used.add("jnp")
        return expr(f"jnp.{primitives.dtype_of(str(type_.dtype)).name.replace('bool', 'bool_')}")

    def _append(self, op: Op) -> cst.BaseStatement:
        """`keys, values = step.append(k, v)`: those of all tokens so far."""
        _, k, v = op.inputs[:3]
        if not _by_token(self.types[k]):
            raise EffcError(f"{self._where(op)}: keys are {self.types[k]}, want one row a token, [b,t,...]")
        self.keys = [self.names.fresh("keys"), self.names.fresh("values")]
        return syntax.assign(self.keys, call("step.append", [self.value(k), self.value(v)]))

    def _attention(self, op: Op, functions: list[Expr]) -> Expr:
        self.emitter.used.add("attention")
        args = [self.value(op.inputs[0]), *map(syntax.name, self.keys), expr("step.positions"), *functions]
        return call("attention", args, self._keywords(op))

    def _const(self, op: Op) -> Expr:
        self.emitter.used.add("jnp")
        value, dtype, shape = literal(op.attrs["value"]), self._dtype(op.out.type), op.out.type.shape
        if not shape:
            return call("jnp.array", [value, dtype])
        return call("jnp.full", [literal(shape), value, dtype])

    def _primitive(self, op: Op, functions: list[Expr]) -> Expr:
        kind, inputs = op.kind.removeprefix("lax."), self._inputs(op)
        natural = kind != "div" or str(op.out.type.dtype).startswith(("f", "bf"))
        if kind in OPERATORS and natural and not op.attrs:
            return syntax.binary(inputs[0], OPERATORS[kind], inputs[1])
        if kind == "neg":
            return expr(f"-{code(inputs[0])}")
        if kind == "convert_element_type":
            return call(f"{code(inputs[0])}.astype", [self._dtype(op.out.type)])
        if kind == "reshape":
            sizes = op.attrs["new_sizes"]
            assert isinstance(sizes, tuple)
            return call(f"{code(inputs[0])}.reshape", [literal(size) for size in sizes])
        return call(self._function(op, kind), [*functions, *inputs], self._keywords(op))

    def _function(self, op: Op, kind: str) -> str:
        """How the program spells a primitive: an adapter of ours, JAX's own, or the table's."""
        known = vars(primitives)
        if (
            kind in known
            and known[kind] is not None
            and getattr(known[kind], "__module__", "") == primitives.__name__
        ):
            self.emitter.used.add("ops")
            return f"ops.{kind}"
        if kind not in primitives.LAX:
            raise EffcError(
                f"{self._where(op)}: the runtime has no primitive '{kind}'{nearest(kind, primitives.LAX)}"
            )
        shapes = {self.types[name].shape for name in op.inputs}
        plain = len(shapes) == 1 and kind not in ("and", "or", "xor", "not") and "scatter" not in kind
        self.emitter.used.add("lax" if plain else "LAX")
        return f"lax.{kind}" if plain else f'LAX["{kind}"]'

    def _only_in_operators(self, name: str) -> bool:
        """Whether every reader of a scalar constant is an operator whose other operand is an array."""
        users = [op for op in self.scope if name in _reads(op)]
        return bool(users) and name not in self.results and all(self._beside_array(op, name) for op in users)

    def _beside_array(self, op: Op, name: str) -> bool:
        kind = op.kind.removeprefix("lax.")
        other = [n for n in op.inputs if n != name]
        dtype = str(op.out.type.dtype)
        natural = kind != "div" or dtype.startswith(("f", "bf"))
        return (
            kind in OPERATORS
            and natural
            and not op.regions
            and len(other) == 1
            and other[0] not in self.literals
        )

    def _region(self, op: Op, title: str, region: Func) -> cst.FunctionDef:
        """A local function; inputs past those its op gives are values of this function or parameters."""
        given = 3 if op.kind == "attention" else len(region.inputs)
        own = [self.names.new(value.name) for value in region.inputs[:given]]
        extra = [*(self.value(n) for n in op.inputs[3:]), *(self.param(n) for n in op.params.values())]
        for value, bound in zip(region.inputs[given:], extra, strict=True):
            self.names.alias(value.name, code(bound))
        outer = self.types, self.scope, self.results
        self.types, self.scope, self.results = {**self.types, **region.types()}, region.ops, region.results
        body = [*self._sizes(region.inputs[:given], region.ops), *self.ops(region.ops)]
        results = [self.value(name) for name in region.results]
        self.types, self.scope, self.results = outer
        whole = op.kind.startswith("lax.") and len(results) == 1
        return syntax.function(
            title, own, [*body, syntax.give([syntax.sequence(results)] if whole else results)]
        )

    def _repeat(self, op: Op) -> Statements:
        target = op.attrs["block"]
        assert isinstance(target, Ref)
        block, carry = self.emitter.blocks[target.name], len(op.outputs)
        outputs = [self.names.new(value.name) for value in op.outputs]
        start = [self.value(name) for name in op.inputs[:carry]]
        before, after = block.arguments()
        rest = [self.value(name) for name in op.inputs[carry:]]
        args = [*map(syntax.name, before), *map(syntax.name, outputs), *rest, *map(syntax.name, after)]
        first = start[0] if carry == 1 else syntax.sequence(start).with_changes(lpar=[], rpar=[])
        over = item("params", block.group) if block.group else expr(f"range({op.attrs['times']})")
        body = [syntax.assign(outputs, call(block.title, args))]
        return [syntax.assign(outputs, first), syntax.loop("p" if block.group else "_", over, body)]


def _quoted(text: str) -> str:
    return syntax.string(text).value


def _signature(func: Func) -> str:
    """`x: f32[b,t,576], cos: f32[b,t,32] -> f32[b,t,576]`."""
    inputs = ", ".join(f"{value.name}: {value.type}" for value in func.inputs)
    return f"{inputs} -> {', '.join(map(str, func.result_types()))}"


def _tree(module: Module) -> dict[str, tuple[str, str]]:
    """Group and key of every parameter: `layers.attn.q` is `params["layers"][i]["attn.q"]`."""
    out = {name: ("", name) for name, param in module.params.items() if not param.stack}
    for func in module.funcs.values():
        mine = [
            n
            for op in walk(func)
            for n in op.params.values()
            if n in module.params and module.params[n].stack
        ]
        heads = {name.partition(".")[0] for name in mine}
        shared = len(heads) == 1 and all("." in name for name in mine) and not heads & out.keys()
        for name in mine:
            head, _, rest = name.partition(".")
            out.setdefault(name, (head, rest) if shared else (func.name, name))
    unread = [name for name in module.params if name not in out]
    return out | {name: ("unread", name) for name in unread}


def _reached(module: Module, func: Func) -> list[Func]:
    """Blocks that `func` repeats, those they repeat first."""
    out: dict[str, Func] = {}
    for op in walk(func):
        target = op.attrs.get("block")
        if op.kind == "repeat" and isinstance(target, Ref):
            if target.name not in module.funcs:
                raise EffcError(
                    f"emit: @{func.name} repeats @{target.name}, want a block{nearest(target.name, module.funcs)}"
                )
            block = module.funcs[target.name]
            out |= {inner.name: inner for inner in _reached(module, block)}
            out[block.name] = block
    return list(out.values())


def _steps(module: Module, func: Func) -> bool:
    return any(op.kind in _CACHED for inner in [func, *_reached(module, func)] for op in walk(inner))


def _cut(module: Module, func: Func) -> int:
    """How many ops there are up to the last that mixes tokens or tells positions."""
    blocks = {block.name: _steps(module, block) for block in _reached(module, func)}

    def mixes(op: Op) -> bool:
        target = op.attrs.get("block")
        return op.kind in _CACHED or (isinstance(target, Ref) and blocks[target.name])

    return max((i + 1 for i, op in enumerate(func.ops) if mixes(op)), default=0)


def _by_calls(type_: Type) -> bool:
    return any(depends(size, "t") for size in type_.shape)


def _by_token(type_: Type) -> bool:
    """Whether it is [b,t,...] with nothing else that depends on t."""
    head, rest = type_.shape[:2], type_.shape[2:]
    return [str(size) for size in head] == ["b", "t"] and not any(depends(size, "t") for size in rest)


def _reads(op: Op) -> list[str]:
    """Values an op reads, through its regions too."""
    return [
        *op.inputs,
        *(name for region in op.regions.values() for inner in region.ops for name in _reads(inner)),
    ]


def _mentions(op: Op, size: str) -> bool:
    """Whether the emitted text of an op names the size."""
    shapes = (op.out.type.shape,) if op.kind == "const" else ()
    return any(_names(value, size) for value in (*op.attrs.values(), *shapes))


def _names(value: object, size: str) -> bool:
    if isinstance(value, tuple):
        return any(_names(item, size) for item in value)
    return isinstance(value, Dim) and depends(value, size)
