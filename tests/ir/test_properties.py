"""Properties of random modules: the text round trip, and a verifier that never raises."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from effc.ir import (
    NAN,
    Decode,
    Func,
    Loc,
    Module,
    Op,
    Param,
    Quant,
    Ref,
    Size,
    Type,
    Value,
    deltas,
    diff,
    dump,
    parse,
    verify,
    warnings,
)  # fmt: skip
from effc.ir.core import Attr
from effc.ir.ops import OPS
from effc.ir.types import BYTES, polynomial

TINY = parse((Path(__file__).parent / "tiny.effc").read_text())

quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)

# -- random modules -----------------------------------------------------------------------------------------

words = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,6}", fullmatch=True)
reserved = st.sampled_from(
    "effc module meta param block func decode return over perm at true false none inf nan b t f32 q4".split()  # noqa: SIM905
)
names = words | reserved | st.text(max_size=5) | st.from_regex(r"[0-9][0-9.\-]{0,3}", fullmatch=True)
identifiers = st.sampled_from(["b", "t", "s", "batch", "inf", "nan", "n_1", "e5"])
fractions = st.fractions(-9, 9, max_denominator=6)
monomials = st.dictionaries(identifiers, st.integers(1, 3), max_size=2).map(lambda d: tuple(sorted(d.items())))
sizes = st.integers(-3, 10**12) | st.dictionaries(monomials, fractions, max_size=3).map(polynomial)
quants = st.builds(
    Quant,
    st.integers(2, 8),
    st.integers(0, 128),
    st.booleans(),
    st.sampled_from(list(BYTES)),
    st.integers(-3, 3),
)
types = st.builds(
    Type,
    st.sampled_from(list(BYTES)) | quants,
    st.lists(sizes, max_size=3).map(lambda s: tuple[Size, ...](s)),
)
floats = st.floats().map(lambda x: NAN if x != x else x)
literals = st.none() | st.booleans() | st.integers() | floats | names | sizes | types
attributes = st.recursive(literals, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
refs = st.builds(Ref, names)
attr_maps = st.dictionaries(names, attributes | refs, max_size=3)
values = st.builds(Value, names, types)
locs = st.none() | st.builds(Loc, names, names, st.integers(0, 99))


def value_lists(most: int) -> st.SearchStrategy[tuple[Value, ...]]:
    return st.lists(values, max_size=most).map(lambda items: tuple[Value, ...](items))


def name_lists(most: int) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(names, max_size=most).map(lambda items: tuple[str, ...](items))


def ops(regions: st.SearchStrategy[dict[str, Func]]) -> st.SearchStrategy[Op]:
    roles = st.dictionaries(names, names, max_size=2)
    kinds = names | st.sampled_from(list(OPS))
    return st.builds(Op, kinds, name_lists(3), value_lists(2), roles, attr_maps, regions, locs)


def op_lists(one: st.SearchStrategy[Op]) -> st.SearchStrategy[tuple[Op, ...]]:
    return st.lists(one, max_size=2).map(lambda items: tuple[Op, ...](items))


plain_ops = op_lists(ops(st.just({})))
plain_regions = st.builds(Func, names, value_lists(2), plain_ops, name_lists(2))
deep_ops = op_lists(ops(st.dictionaries(names, plain_regions, max_size=2)))


def by_name(things: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.lists(things, max_size=3).map(lambda items: {item.name: item for item in items})


overs = st.none() | st.tuples(st.integers(-3, 9), st.integers(-3, 9), st.integers(-3, 9))
perms = st.none() | st.lists(st.integers(-1, 3), max_size=3).map(lambda items: tuple[int, ...](items))
params = st.builds(Param, names, types, st.integers(0, 40), st.text(max_size=8), overs, perms)
funcs = st.builds(Func, names, value_lists(2), deep_ops, name_lists(2), st.booleans())
metas = st.dictionaries(names, st.text(max_size=8) | st.integers() | floats | st.booleans(), max_size=3)
modules = st.builds(
    Module, names, metas, by_name(params), by_name(funcs), st.none() | st.builds(Decode, names, attr_maps)
)


@quick
@given(modules)
def test_the_text_of_a_module_reads_back_as_the_module(module: Module):
    text = dump(module)
    again = parse(text)
    assert again == module
    assert dump(again) == text  # order of the mappings, and 1 against 1.0 against true


@quick
@given(modules)
def test_locations_do_not_disturb_the_text(module: Module):
    assert parse(dump(module, locs=True)) == module


@quick
@given(modules)
def test_the_verifier_takes_anything(module: Module):
    assert all(map(str, [*verify(module), *warnings(module)]))


@settings(quick, max_examples=30)
@given(modules, modules)
def test_a_diff_is_empty_exactly_where_modules_are_equal(one: Module, other: Module):
    assert diff(one, one) == "" and deltas(one, one) == {}
    assert (diff(one, other) == "") == (one == other)


# -- a good module with something done to it ----------------------------------------------------------------

sites = st.sampled_from([(f.name, i) for f in TINY.funcs.values() for i in range(len(f.ops))])


def with_ops(func: str, change: Callable[[tuple[Op, ...]], tuple[Op, ...]]) -> Module:
    return TINY.with_func(replace(TINY.funcs[func], ops=change(TINY.funcs[func].ops)))


def with_op(func: str, at: int, *new: Op) -> Module:
    return with_ops(func, lambda old: (*old[:at], *new, *old[at + 1 :]))


def test_the_module_to_break_is_good():
    assert verify(TINY) == [] and warnings(TINY) == []


BREAKS: dict[str, Callable[[Op], list[Op]]] = {
    "unknown kind": lambda op: [replace(op, kind=op.kind.removeprefix("lax.") + "_x")],
    "dropped": lambda op: [],
    "twice": lambda op: [op, op],
    "unknown operand": lambda op: [replace(op, inputs=(*op.inputs[:-1], "nowhere"))],
    "unknown parameter": lambda op: [replace(op, params={**op.params, "w": "nowhere"})],
    "wrong size": lambda op: [replace(op, outputs=tuple(Value(v.name, _wider(v.type)) for v in op.outputs))],
    "no outputs": lambda op: [replace(op, outputs=())],
    "renamed output": lambda op: [replace(op, outputs=(replace(op.outputs[0], name="other"), *op.outputs[1:]))],
}


def _wider(type: Type) -> Type:
    return Type(type.dtype, (*type.shape[:-1], type.shape[-1] + 1) if type.shape else (1,))


@pytest.mark.parametrize("name", BREAKS)
@settings(max_examples=20, deadline=None)
@given(site=sites)
def test_a_broken_op_is_a_fault(name: str, site: tuple[str, int]):
    func, at = site
    module = with_op(func, at, *BREAKS[name](TINY.funcs[func].ops[at]))
    assert verify(module)
    assert parse(dump(module)) == module


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(TINY.params)))
def test_a_parameter_taken_away_is_a_fault(name: str):
    assert verify(replace(TINY, params={n: p for n, p in TINY.params.items() if n != name}))


everything = [op for func in TINY.funcs.values() for op in func.ops]
shapes = st.sampled_from(
    [(), (1,), (64,), (3, 0), (1, 1, 0, 16), *[v.type.shape for op in everything for v in op.outputs]]
)
some_types = st.builds(Type, st.sampled_from(["f32", "i32", "x8"]), shapes) | types
some_inputs = st.lists(st.sampled_from(["x", "cos", "tokens", "x1", "q1", "h"]), max_size=4).map(tuple)
some_attrs: st.SearchStrategy[dict[str, Attr | Ref]] = st.dictionaries(
    st.sampled_from(sorted({name for spec in OPS.values() for name in spec.attrs})),
    st.sampled_from([n for spec in OPS.values() for k in spec.attrs.values() for n in re.split("[=|]", k)])
    | st.integers(-2, 70) | refs | st.sampled_from([Ref("layer"), Ref("forward"), (1, 2), ()]) | attributes,
    max_size=4,
)  # fmt: skip


@st.composite
def tampered(draw: st.DrawFn) -> Module:
    """The good module with several fields of one op, and some types, drawn anew."""
    func, at = draw(sites)
    op = TINY.funcs[func].ops[at]
    outputs = tuple(Value(v.name, draw(some_types)) for v in op.outputs[: draw(st.integers(0, 3))])
    new = Op(
        draw(st.sampled_from([*OPS, "lax.add", "lax.select_n", op.kind])),
        draw(some_inputs | st.just(op.inputs)),
        draw(st.sampled_from([outputs, op.outputs])),
        draw(st.sampled_from([op.params, {}]) | st.dictionaries(
            st.sampled_from(["w", "bias", "scale", "table", "freq", "value"]),
            st.sampled_from(list(TINY.params)), max_size=2)),
        draw(st.just(op.attrs) | some_attrs | some_attrs.map(lambda new: {**op.attrs, **new})),
        draw(st.sampled_from([op.regions, {}])),
    )  # fmt: skip
    block = TINY.funcs["layer"]
    inputs = tuple(Value(v.name, draw(st.just(v.type) | some_types)) for v in block.inputs)
    module = with_op(func, at, new)
    return module.with_func(replace(module.funcs["layer"], inputs=inputs))


@settings(quick, max_examples=200)
@given(tampered())
def test_the_verifier_takes_any_tampering(module: Module):
    assert all(map(str, verify(module)))
