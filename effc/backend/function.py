"""One IR function as a Python function, a statement an op."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import libcst as cst

from effc.backend import exits, narrow, recursion, syntax
from effc.backend.plan import Block, Plan, by_call, by_token, last_mixing, mentions, reads, steps
from effc.backend.syntax import Expr, Names, Statement, call, code, expr, item, literal
from effc.errors import EffcError, nearest
from effc.ir.core import Attr, Func, Op, Ref, Value
from effc.ir.ops import attribute, kept, rows_beside
from effc.ir.types import Type
from effc.runtime import primitives

Statements = list[Statement]

LAYERS = frozenset(
    {
        "embed", "linear", "norm", "rope_table", "rope", "attention", "fake_quant", "silu", "gelu", "softcap", "split",
    }
)  # fmt: skip
"""Ops that are a call of the function of their name in `effc.runtime.layers`."""

_PRECISE = frozenset({"embed", "linear", "norm"})
"""Those that take the result's dtype."""

_TUPLES = frozenset({"sort", "scan", "split"})
"""Those that give a tuple even of one."""

OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "and": "&", "or": "|", "xor": "^",
}  # fmt: skip

RESERVED = frozenset(
    {
        "jax", "jnp", "lax", "ops", "LAX", "Step", "run", "window", "running", "recur", "recurse", "early", "Stack",
        "top", "normed", "threshold", "progress", "likeliest", "b", "t", "p", "params", "cache", "valid", "step",
    }
    | {"forward", "extend", "main", "PARAMS", "CONTEXT", "ENTRIES", "DECODE"}
    | LAYERS
)  # fmt: skip


class Body:
    """The statements of one function."""

    def __init__(self, plan: Plan, func: Func, block: Block | None):
        self.plan, self.func, self.block_info = plan, func, block
        self.names = Names([*RESERVED, *(b.title for b in plan.blocks.values())])
        self.types = func.types()
        self.scope, self.results = func.ops, func.results
        self.rows = "step.positions"  # of the tokens that attention asks for
        self.last: Op | None = None  # the last op that mixes tokens, of which last rows are wanted
        self.keys: list[str] = []  # names of the attention's keys and values being written
        self.literals: dict[str, Expr] = {}  # scalar constants, written where they are used

    def block(self) -> cst.FunctionDef:
        assert self.block_info is not None
        inputs = [self.names.new(value.name) for value in self.func.inputs]
        before, after = self.block_info.arguments()
        body = self._narrowed(found) if (found := narrow.parts(self.func)) else self._whole()
        body.append(syntax.give([self.value(name) for name in self.func.results]))
        notes = [signature(self.func)]
        return syntax.function(self.block_info.title, [*before, *inputs, *after], body, notes=notes)

    def _whole(self) -> Statements:
        return [*self._sizes(self.func.inputs, self.func.ops), *self.ops(self.func.ops)]

    def _narrowed(self, parts: narrow.Parts) -> Statements:
        """First what is kept, of all rows; then the rest, of the rows that are wanted."""
        self.rows = "step.wanted(step.positions)"
        read = {name for op in parts.keeps for name in reads(op)}
        out = self._sizes([value for value in self.func.inputs if value.name in read], parts.keeps)
        out += self.ops(parts.keeps)
        out += [syntax.assign([self.names[n]], expr(f"step.wanted({self.names[n]})")) for n in parts.narrowed]
        values = [Value(n, self.types[n]) for n in parts.narrowed]
        return [*out, *self._sizes(values, parts.others), *self.ops(parts.others)]

    def extend(self, name: str = "extend") -> cst.FunctionDef:
        """A function of tokens over a cache; rows not wanted end after the last op that needs them."""
        tokens = self.func.inputs[0]
        operands = [self.names.new(value.name) for value in self.func.inputs]
        title = operands[0]
        cut = last_mixing(self.plan.module, self.func)
        cut = cut if all(by_token(self.types[n]) for n in self._crossing(cut)) else len(self.func.ops)
        before, after = self.func.ops[:cut], self.func.ops[cut:]
        body = [*syntax.statements(f"step = Step({title}, cache, valid)"), *self._sizes((tokens,), before)]
        self.last = before[-1] if before and cut < len(self.func.ops) else None
        body += [*self.ops(before), *self._last_rows(cut), *self.ops(after)]
        body.append(syntax.give([*map(self.value, self.func.results), expr("step.cache()")]))
        notes = [
            signature(self.func),
            "valid i32[b]: how many tokens are not padding; then logits of the last one only",
        ]
        return syntax.function(
            name, ["params", *operands, "cache=None", "valid=None", *exits.keywords(self.func)], body, notes=notes
        )

    def _crossing(self, cut: int) -> list[str]:
        """Values that depend on t, made before the cut and read after it."""
        after = self.func.ops[cut:]
        made = {value.name for op in after for value in op.outputs}
        read = dict.fromkeys([*(name for op in after for name in reads(op)), *self.func.results])
        return [n for n in read if n in self.types and n not in made and by_call(self.types[n])]

    def _last_rows(self, cut: int) -> Statements:
        """`x = step.last(x)` for every value of [b,t,...] that later ops read."""
        rows = self._crossing(cut)
        out = [syntax.assign([self.names[n]], expr(f"step.last({self.names[n]})")) for n in rows]
        return [*out, *self._sizes([Value(n, self.types[n]) for n in rows], self.func.ops[cut:])]

    def _sizes(self, values: Iterable[Value], ops: Iterable[Op]) -> Statements:
        """`b, t = x.shape[:2]` where a formula of these ops needs it."""
        wanted = [size for size in "bt" if any(mentions(op, size) for op in ops)]
        if not wanted:
            return []
        for value in values:
            if by_token(value.type):
                return syntax.statements(f"b, t = {self.names[value.name]}.shape[:2]")
        raise EffcError(f"emit: @{self.func.name} needs the size {wanted[0]}, want an operand of shape [b,t,...]")

    def ops(self, ops: Iterable[Op]) -> Statements:
        return [statement for op in ops for statement in self.op(op)]

    def op(self, op: Op) -> Statements:
        """The statements of one op."""
        if op.kind == "const" and not op.out.type.shape and self._only_in_operators(op.out.name):
            self.literals[op.out.name] = literal(op.attrs["value"])
            return []
        if op.kind == "repeat":
            return self._repeat(op)
        if op.kind == "recurse":
            return recursion.recurse(self, op)
        if op.kind == "early":
            return exits.early(self, op)
        if op.kind == "keep":
            return self._keep(op)
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
            case "call":
                return self._call(op)
            case "positions":
                return expr("step.positions")
            case "window" | "running" | "recur":
                self.plan.used.add(op.kind)
                told = {name: literal(value) for name, value in op.attrs.items() if name != "why"}
                return call(op.kind, [syntax.name("step"), *functions, *self._inputs(op)], told)
            case "param":
                return self.param(op.params["value"])
            case "const":
                return self._const(op)
            case kind if kind in LAYERS:
                kind = "normed" if kind == "norm" and self._multiplied(op) else kind
                self.plan.used.add(kind)
                return call(kind, [*self._inputs(op), *self._positional(op)], self._keywords(op))
        raise EffcError(f"{self._where(op)}: the emitter has no Python for '{op.kind}'{nearest(op.kind, LAYERS)}")

    def _multiplied(self, norm: Op) -> bool:
        """Whether products with coded weights are all that reads a norm: they may take it."""
        name, params = norm.out.name, self.plan.module.params
        users = [op for op in self.scope if name in reads(op)]
        coded = all(op.kind == "linear" and not isinstance(params[op.params["w"]].type.dtype, str) for op in users)
        wide = {str(norm.out.type.dtype), str(self.types[norm.inputs[0]].dtype)} == {"f32"}
        return coded and wide and bool(users) and name not in self.results and list(norm.params) == ["scale"]

    def _where(self, op: Op) -> str:
        return f"@{self.func.name}: {', '.join(f'%{v.name}' for v in op.outputs)}" + (f" ({op.loc})" if op.loc else "")

    def value(self, name: str) -> Expr:
        return self.literals[name] if name in self.literals else syntax.name(self.names[name])

    def param(self, name: str) -> Expr:
        """`p["attn.q"]` in a block, `params["embed"]` elsewhere."""
        group, key = self.plan.place(name)
        if not group:
            return item("params", key)
        mine = self.block_info.layer_names() if self.block_info else {}
        if group not in mine:
            raise EffcError(f"emit: @{self.func.name} reads @{name}, one array a layer, outside of its block")
        return item(mine[group], key)

    def _inputs(self, op: Op) -> list[Expr]:
        return [self.value(name) for name in op.inputs]

    def _positional(self, op: Op) -> list[Expr]:
        """The parameters in the runtime function's order; None for one left out before another."""
        order = {
            "linear": ("w", "bias"),
            "norm": ("scale", "bias"),
            "embed": ("table",),
            "fake_quant": ("scale",),
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
            if op.kind != "attention" or name not in {"mask", "keyed", "asked", "cache"}
        }
        if any("jnp." in code(value) for value in keywords.values()):
            self.plan.used.add("jnp")  # not a number
        if op.kind in _PRECISE and op.out.type.dtype != self._natural(op):
            keywords["dtype"] = self._dtype(op.out.type)
        return keywords

    def _natural(self, op: Op) -> object:
        """The dtype its function gives when not told one."""
        if op.kind != "embed":
            return self.types[op.inputs[0]].dtype
        dtype = self.plan.module.params[op.params["table"]].type.dtype
        return dtype if isinstance(dtype, str) else "f32"

    def _dtype(self, type_: Type) -> Expr:
        self.plan.used.add("jnp")
        return expr(f"jnp.{primitives.dtype_of(str(type_.dtype)).name.replace('bool', 'bool_')}")

    def _append(self, op: Op) -> Statement:
        """`keys, values = step.append(k, v)`: those of all tokens so far."""
        k, *others = kept(op)
        if not by_token(self.types[k]):
            raise EffcError(f"{self._where(op)}: keys are {self.types[k]}, want one row a token, [b,t,...]")
        self.keys = [self.names.fresh(n) for n in ("keys", "values", *("kept" for _ in others[1:]))]
        return syntax.assign(self.keys, call("step.append", [self.value(name) for name in (k, *others)], _cache(op)))

    def _keep(self, op: Op) -> Statements:
        """`step.append(k, v)`; what comes of it is what went in."""
        for value, name in zip(op.outputs, op.inputs, strict=True):
            self.names.alias(value.name, code(self.value(name)))
        return [syntax.line(cst.Expr(call("step.append", self._inputs(op), _cache(op))))]

    def _attention(self, op: Op, functions: list[Expr]) -> Expr:
        self.plan.used.add("attention")
        keyed, asked = rows_beside(op)
        keys, values, *mine = map(syntax.name, self.keys)
        args = [self.value(op.inputs[0]), keys, values, expr(self.rows), *functions]
        sinks = op.params.get("sinks")
        if keyed or asked or sinks:
            args += [] if functions else [syntax.name("None")]
            others = [self.value(name) for name in op.inputs[3 + keyed : 3 + keyed + asked]]
            args += [syntax.sequence(mine), syntax.sequence(others)]
            args += [self.param(sinks)] if sinks else []
        return call("attention", args, self._keywords(op))

    def _const(self, op: Op) -> Expr:
        self.plan.used.add("jnp")
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
        if kind in known and known[kind] is not None and getattr(known[kind], "__module__", "") == primitives.__name__:
            self.plan.used.add("ops")
            return f"ops.{kind}"
        if kind not in primitives.LAX:
            raise EffcError(f"{self._where(op)}: the runtime has no primitive '{kind}'{nearest(kind, primitives.LAX)}")
        shapes = {self.types[name].shape for name in op.inputs}
        plain = len(shapes) == 1 and kind not in ("and", "or", "xor", "not") and "scatter" not in kind
        self.plan.used.add("lax" if plain else "LAX")
        return f"lax.{kind}" if plain else f'LAX["{kind}"]'

    def _only_in_operators(self, name: str) -> bool:
        """Whether every reader of a scalar constant is an operator whose other operand is an array."""
        users = [op for op in self.scope if name in reads(op)]
        return bool(users) and name not in self.results and all(self._beside_array(op, name) for op in users)

    def _beside_array(self, op: Op, name: str) -> bool:
        kind = op.kind.removeprefix("lax.")
        other = [n for n in op.inputs if n != name]
        dtype = str(op.out.type.dtype)
        natural = kind != "div" or dtype.startswith(("f", "bf"))
        return kind in OPERATORS and natural and not op.regions and len(other) == 1 and other[0] not in self.literals

    def _region(self, op: Op, title: str, region: Func) -> cst.FunctionDef:
        """A local function; inputs past those that its op gives are values of this one."""
        given = 3 + sum(rows_beside(op)) if op.kind == "attention" else len(region.inputs)
        bound_here = [code(self.value(name)) for name in op.inputs[given:]] if op.kind == "attention" else []
        known, outer = self.names.known(), (self.types, self.scope, self.results, self.literals)
        own = [self.names.new(value.name) for value in region.inputs[:given]]
        for value, bound in zip(region.inputs[given:], bound_here, strict=True):
            self.names.alias(value.name, bound)
        self.types, self.scope, self.results = {**self.types, **region.types()}, region.ops, region.results
        self.literals = {}
        # In a window the region sees whole sequences: a step of its own, with no cache.
        start = [f"step = Step({own[0]})"] if op.kind == "window" and steps(self.plan.module, region) else []
        body = [*(syntax.statements(text)[0] for text in start)]
        sizes = [] if op.kind.startswith("lax.") else self._sizes(region.inputs[:given], region.ops)
        body += [*sizes, *self.ops(region.ops)]
        results = [self.value(name) for name in region.results]
        self.types, self.scope, self.results, self.literals = outer
        self.names.restore(known)
        whole = op.kind.startswith("lax.") and len(results) == 1
        return syntax.function(title, own, [*body, syntax.give([syntax.sequence(results)] if whole else results)])

    def _repeat(self, op: Op) -> Statements:
        target, times, start, order = (attribute(op, name) for name in ("block", "times", "start", "order"))
        assert (
            isinstance(target, Ref) and isinstance(times, int) and isinstance(start, int) and isinstance(order, tuple)
        )
        block, carry = self.plan.blocks[target.name], len(op.outputs)
        outputs = [self.names.new(value.name) for value in op.outputs]
        first = [self.value(name) for name in op.inputs[:carry]]
        rest = [self.value(name) for name in op.inputs[carry:]]
        args = self._arguments(block, [*map(syntax.name, outputs), *rest])
        if op is self.last and narrow.parts(self.plan.module.funcs[target.name]):
            args = [*args[:-1], expr("step.asked()")]
        begin = first[0] if carry == 1 else syntax.sequence(first).with_changes(lpar=[], rpar=[])
        over = [self.layers(group, start, times, order) for group in block.groups] or [expr(f"range({times})")]
        body = [syntax.assign(outputs, call(block.title, args))]
        names = list(block.layer_names().values()) or ["_"]
        return [
            syntax.assign(outputs, begin),
            syntax.loop(names, over[0] if len(over) == 1 else call("zip", over), body),
        ]

    def layers(self, group: str, start: int, times: int, order: tuple[Attr, ...]) -> Expr:
        """`params["layers"]`, the part of it that is run, or what the order names of it."""
        whole = item("params", group)
        if order and self.plan.length(group) != len(order):
            names = code(literal(order[start : start + times]))
            return expr(f"[{code(whole)}[i] for i in {names}]")
        return (
            whole if (start, times) == (0, self.plan.length(group)) else expr(f"{code(whole)}[{start}:{start + times}]")
        )

    def _arguments(self, block: Block, operands: Sequence[Expr]) -> list[Expr]:
        before, after = block.arguments()
        return [*map(syntax.name, before), *operands, *map(syntax.name, after)]

    def _call(self, op: Op) -> Expr:
        target = op.attrs["func"]
        assert isinstance(target, Ref)
        block = self.plan.blocks[target.name]
        return call(block.title, self._arguments(block, self._inputs(op)))


def _cache(op: Op) -> dict[str, Expr]:
    """How its keys and values are kept, where that is other than as computed."""
    kind = attribute(op, "cache")
    return {} if kind == "float" else {"cache": literal(str(kind))}


def signature(func: Func) -> str:
    """`x: f32[b,t,576], cos: f32[b,t,32] -> f32[b,t,576]`."""
    inputs = ", ".join(f"{value.name}: {value.type}" for value in func.inputs)
    return f"{inputs} -> {', '.join(map(str, func.result_types()))}"
