"""What `effc inspect` shows of a module: its structure, what its parameters take, what was understood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from effc.ir.core import Func, Module, Op, Param, Ref, all_ops, param_uses
from effc.ir.ops import attribute
from effc.ir.types import evaluate
from effc.passes.weight_rules import head_params
from effc.weights import parts


@dataclass(frozen=True)
class Row:
    """All parameters of one use and one dtype."""

    use: str
    dtype: str
    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True)
class Outline:
    """A function or block: what it takes and gives, its ops in order, how often `repeat` runs it."""

    name: str
    times: int
    inputs: list[str]
    results: list[str]
    ops: list[str]


@dataclass(frozen=True)
class Summary:
    """raised: transformer ops by count; primitive: traced ones left; unraised: those that look like
    part of a transformer op, where and why; whole: ops that see all tokens."""

    name: str
    meta: dict[str, Any]
    decode: str
    parameters: list[Row]
    structure: list[Outline]
    raised: dict[str, int]
    primitive: dict[str, int]
    unraised: list[str]
    whole: list[str]
    notes: list[str]

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"weights": self.weights, "bytes": self.bytes}

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(row.weights for row in self.parameters)

    @property
    def bytes(self) -> int:
        """Bytes they take."""
        return sum(row.bytes for row in self.parameters)

    def table(self) -> Any:
        """A rich renderable."""
        from rich.console import Group

        return Group(*_head(self), _parameters(self), "", *_structure(self), *_understood(self))


def summarize(module: Module, notes: Sequence[str] = ()) -> Summary:
    """Reads no arrays."""
    kinds = Counter(op.kind for _, op in all_ops(module))
    decode = module.decode
    return Summary(
        module.name,
        dict(module.meta),
        decode.strategy if decode else "none",
        _rows(module),
        [_outline(func, _times(module, func)) for func in module.funcs.values()],
        {kind: n for kind, n in sorted(kinds.items()) if not kind.startswith("lax.")},
        {kind: n for kind, n in sorted(kinds.items()) if kind.startswith("lax.")},
        unraised(module),
        [_whole(func, op) for func, op in all_ops(module) if op.kind == "window" and attribute(op, "lookback") == -1],
        list(notes),
    )


_ALMOST = {
    "lax.dot_general": ("linear", "neither operand is a parameter"),
    "lax.rsqrt": (
        "norm",
        "what it scales is not a mean square over the last axis, or more than one scale and bias follow",
    ),
    "lax.sqrt": ("norm", "what is divided by it is not centred or squared as a norm does it, or is no last axis"),
    "lax.gather": ("embed", "it takes other than whole rows of a parameter"),
    "lax.exp": ("attention", "no softmax over keys times values reads it"),
    "lax.sin": ("rope", "no pairs of one value are turned by it"),
    "lax.cos": ("rope", "no pairs of one value are turned by it"),
}
"""Primitives that transformer ops are made of: which, and what was missing where one is left."""


def unraised(module: Module) -> list[str]:
    """Where such primitives are left, outside of what attentions add to scores: a line a place."""
    found: Counter[str] = Counter()
    for func in module.funcs.values():
        for op in _outside_biases(func):
            if op.kind in _ALMOST:
                wanted, why = _ALMOST[op.kind]
                place = str(op.loc) if op.loc and str(op.loc) else f"@{func.name}: %{op.outputs[0].name}"
                found[f"{op.kind} at {place}: no {wanted}: {why}"] += 1
    return [f"{text} ({n} times)" if n > 1 else text for text, n in found.items()]


def _outside_biases(func: Func) -> Iterator[Op]:
    for op in func.ops:
        yield op
        for region in op.regions.values() if op.kind != "attention" else ():
            yield from _outside_biases(region)


def _rows(module: Module) -> list[Row]:
    uses, heads = param_uses(module), head_params(module)
    labels = {name: _use([(op.kind, role) for _, op, role in uses[name]], name in heads) for name in module.params}
    groups: dict[tuple[str, str], list[Param]] = {}
    for name, param in module.params.items():
        groups.setdefault((labels[name], str(param.type.dtype)), []).append(param)
    return [_row(use, dtype, params) for (use, dtype), params in groups.items()]


def _use(roles: Sequence[tuple[str, str]], head: bool) -> str:
    """`linear`, `embedding + head`, `norm scale` ...: what reads a parameter."""
    found = {
        "head" if head and kind == "linear" and role == "w" else _ROLES.get((kind, role), f"{kind} {role}")
        for kind, role in roles
    }
    return " + ".join(sorted(found)) or "unused"


_ROLES = {("embed", "table"): "embedding", ("linear", "w"): "linear", ("param", "value"): "table or constant"}


def _row(use: str, dtype: str, params: Sequence[Param]) -> Row:
    size = sum(p.count * part.nbytes for p in params for part in parts(p.type).values())
    return Row(
        use,
        dtype,
        sum(p.count for p in params),
        sum(p.count * evaluate(p.type.size(), {}) for p in params),
        size,
    )


def _times(module: Module, func: Func) -> int:
    """Runs of a block in all `repeat`s of the module; 1 for a function."""
    found = [op for _, op in all_ops(module) if op.kind == "repeat" and op.attrs["block"] == Ref(func.name)]
    return sum(times for op in found if isinstance(times := op.attrs["times"], int)) if func.block else 1


def _outline(func: Func, times: int) -> Outline:
    types = func.types()
    results = [f"%{name}: {types[name]}" for name in func.results]
    return Outline(func.name, times, [str(v) for v in func.inputs], results, [_op(op) for op in func.ops])


def _op(op: Op) -> str:
    if op.kind == "repeat":
        return f"repeat {op.attrs['block']} x{op.attrs['times']}"
    kind, window = op.attrs.get("kind"), op.attrs.get("window")
    detail = f"({kind})" if op.kind == "norm" else f"(window {window})" if window and op.kind == "attention" else ""
    return op.kind + detail


def _whole(func: Func, op: Op) -> str:
    place = f" ({op.loc})" if op.loc and str(op.loc) else ""
    return f"@{func.name}: %{op.outputs[0].name}: {op.attrs.get('why', 'no rule of its own')}{place}"


# -- as a table ---------------------------------------------------------------------------------------------


def _head(summary: Summary) -> list[str]:
    size = f"{summary.weights:,} weights, {summary.bytes / 1e6:.2f} MB, decode {summary.decode}"
    meta = ", ".join(f"{key} {value}" for key, value in summary.meta.items() if value != "")
    return [f"[bold]@{summary.name}[/]  {size}", f"  {_plain(meta)}", ""]


def _parameters(summary: Summary) -> Any:
    from rich.table import Table

    table = Table("parameters", "dtype", box=None, pad_edge=False)
    for title in ("tensors", "weights", "MB", "share"):
        table.add_column(title, justify="right")
    for row in sorted(summary.parameters, key=lambda row: -row.bytes):
        share = row.bytes / max(summary.bytes, 1)
        cells = (f"{row.tensors}", f"{row.weights:,}", f"{row.bytes / 1e6:.2f}", f"{share:.1%}")
        table.add_row(row.use, _plain(row.dtype), *cells)
    return table


def _structure(summary: Summary) -> list[str]:
    lines = []
    for part in summary.structure:
        times = f" x{part.times}" if part.times != 1 else ""
        lines += [f"[bold]@{part.name}{times}[/]({_listed(part.inputs)}) -> {_listed(part.results)}"]
        lines += [f"  {_plain(_runs(part.ops))}", ""]
    return lines


def _runs(ops: Sequence[str]) -> str:
    """`linear, linear, rope` -> `2 linear, rope`."""
    counted = [(kind, len(list(group))) for kind, group in groupby(ops)]
    return ", ".join(f"{n} {kind}" if n > 1 else kind for kind, n in counted)


def _understood(summary: Summary) -> list[str]:
    lines = [f"raised: {_counts(summary.raised) or 'nothing'}"]
    lines += [f"left as traced: {_counts(summary.primitive) or 'nothing'}"]
    lines += [f"not raised: {_plain(text)}" for text in summary.unraised]
    lines += [f"runs over all tokens each step: {_plain(text)}" for text in summary.whole]
    return lines + [f"note: {_plain(note)}" for note in summary.notes]


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def _listed(values: Sequence[str]) -> str:
    return _plain(", ".join(values))


def _plain(text: str) -> str:
    """Brackets that rich is not to read as markup."""
    return text.replace("[", "\\[")
