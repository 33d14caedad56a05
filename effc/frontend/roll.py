"""Fold runs of equal layers into one block with stacked parameters: period 1, 2, 6 ..., found in the ops."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from effc.ir.core import Func, Module, Op, Param, Ref, Value

Slot = tuple[int, int]
"""An output of a block: which op of it, which of the op's results."""


@dataclass(frozen=True)
class Run:
    """ops[start : start + times * period] are `times` equal pieces."""

    start: int
    period: int
    times: int


@dataclass(frozen=True)
class Wiring:
    """How the pieces connect: slots fed to the next piece with their first values, and what all share."""

    carried: dict[Slot, str]
    fixed: dict[str, None]
    sources: list[list[tuple[str, object]]]  # of each op's operands: ("in", slot) ("carry", slot) ("fixed", name)


def roll(module: Module, name: str = "forward") -> Module:
    """The module with every run of equal layers of function `name` folded into a `repeat`."""
    func = replace(module.funcs[name], ops=tuple(structural(module.funcs[name])))
    module = module.with_func(func)
    for turn in range(1, 9):
        found = _best(module.funcs[name], module)
        if found is None:
            break
        module = _fold(module, name, *found, block="layer" if turn == 1 else f"layer{turn}")
    return module


# -- order ----------------------------------------------------------------------------------------------
LEAVES = frozenset({"const", "param", "lax.iota"})


def structural(func: Func) -> list[Op]:
    """Ops in the order the results ask for them, so that equal layers read alike; each leaf beside its use."""
    makers = {value.name: op for op in func.ops for value in op.outputs}
    done: set[str] = set()
    out: list[Op] = []
    for op in _postorder(func.results, makers):
        inputs: list[str] = []
        for name in op.inputs:
            maker = makers.get(name)
            if maker is not None and maker.kind in LEAVES:
                copy = f"{name}.{len(out)}"
                out.append(replace(maker, outputs=(replace(maker.out, name=copy),)))
                name = copy
            inputs.append(name)
        out.append(replace(op, inputs=tuple(inputs)))
        done.add(op.outputs[0].name)
    return out


def _postorder(roots: Iterable[str], makers: dict[str, Op]) -> list[Op]:
    done: set[str] = set()
    out: list[Op] = []
    stack: list[tuple[str, bool]] = [(r, False) for r in reversed(list(roots))]
    while stack:
        name, ready = stack.pop()
        op = makers.get(name)
        if op is None or op.outputs[0].name in done or (op.kind in LEAVES and not _is_root(name, roots)):
            continue
        if ready:
            done.add(op.outputs[0].name)
            out.append(op)
            continue
        stack.append((name, True))
        stack.extend((i, False) for i in reversed(op.inputs))
    return _hoisted(out, makers)


def _is_root(name: str, roots: Iterable[str]) -> bool:
    return name in set(roots)


def _hoisted(ops: list[Op], makers: dict[str, Op]) -> list[Op]:
    """What positions and literals alone decide comes first, and what several attentions read of every token:
    it is the same for all layers."""
    early: set[str] = {name for name, op in makers.items() if op.kind in LEAVES - {"param"}}
    shared, first = _read_by_several(ops, makers), list[Op]()
    for op in ops:
        if op.outputs[0].name in shared:
            first.append(op)
        elif op.kind == "positions" or (op.inputs and all(i in early for i in op.inputs)):
            early.update(value.name for value in op.outputs)
            first.append(op)
    return first + [op for op in ops if op.outputs[0].name not in early | shared]


def _read_by_several(ops: Sequence[Op], makers: dict[str, Op]) -> set[str]:
    """First outputs of the ops that make what two attentions or more read beside queries, keys and values."""
    counts = Counter(name for op in ops if op.kind == "attention" for name in dict.fromkeys(op.inputs[3:]))
    return {op.outputs[0].name for op in _needed([name for name, n in counts.items() if n > 1], makers)}


def _needed(names: list[str], makers: dict[str, Op]) -> list[Op]:
    """Ops that these values are made by, leaves aside."""
    found: dict[str, Op] = {}
    while names:
        op = makers.get(names.pop())
        if op is not None and op.kind not in LEAVES and op.outputs[0].name not in found:
            found[op.outputs[0].name] = op
            names.extend(op.inputs)
    return list(found.values())


# -- search ---------------------------------------------------------------------------------------------
def _best(func: Func, module: Module) -> tuple[Run, Wiring] | None:
    """The run of equal pieces that covers most ops, cut where least is carried over."""
    ids = _signatures(func, module)
    runs = sorted(_runs(ids), key=lambda run: (-run.times * run.period, run.period))
    for run in runs[:64]:
        options = [
            (run_at, wiring)
            for shift in range(run.period)
            if (run_at := _shifted(run, shift, len(ids), ids)) is not None
            and (wiring := wire(func, run_at)) is not None
            and _worth(func, run_at)
        ]
        if options:
            return min(options, key=lambda option: (len(option[1].carried), -option[0].times, option[0].start))
    return None


def _signatures(func: Func, module: Module) -> np.ndarray:
    """One number an op: equal where kind, attributes, types and the parameters' types are."""
    known: dict[str, int] = {}
    ids: list[int] = []
    for op in func.ops:
        params = {role: (module.params[p].type, module.params[p].perm) for role, p in op.params.items()}
        text = f"{op.kind} {op.attrs} {params} {[v.type for v in op.outputs]} {op.regions} {len(op.inputs)}"
        ids.append(known.setdefault(text, len(known)))
    return np.array(ids)


def _runs(ids: np.ndarray) -> Iterable[Run]:
    """For each period the longest stretch that repeats with it."""
    n = len(ids)
    for period in range(1, n // 2 + 1):
        equal = np.concatenate([[0], (ids[period:] == ids[:-period]).astype(int), [0]])
        edges = np.flatnonzero(np.diff(equal))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            times = (stop - start) // period + 1
            if times >= 2:
                yield Run(int(start), period, int(times))


def _shifted(run: Run, shift: int, n: int, ids: np.ndarray) -> Run | None:
    """The same run cut `shift` ops later, with as many pieces as are still equal."""
    start, times = run.start + shift, 1
    piece = ids[start : start + run.period]
    while start + (times + 1) * run.period <= n and np.array_equal(
        ids[start + times * run.period : start + (times + 1) * run.period], piece
    ):
        times += 1
    return Run(start, run.period, times) if times >= 2 else None


def _worth(func: Func, run: Run) -> bool:
    """A piece that holds weights or attention is a layer; a lone add is not."""
    piece = func.ops[run.start : run.start + run.period]
    return any(op.kind in {"linear", "attention", "lax.dot_general"} for op in piece)


def wire(func: Func, run: Run) -> Wiring | None:
    """How the pieces of a run connect, or None where they do not connect alike."""
    made = {value.name: (at, k) for at, op in enumerate(func.ops) for k, value in enumerate(op.outputs)}
    start, period, times = run.start, run.period, run.times
    carried: dict[Slot, str] = {}
    fixed: dict[str, None] = {}
    sources: list[list[tuple[str, object]]] = []
    for j in range(period):
        row: list[tuple[str, object]] = []
        for k in range(len(func.ops[start + j].inputs)):
            names = [func.ops[start + r * period + j].inputs[k] for r in range(times)]
            source = _source(names, made, run)
            if source is None:
                return None
            kind, where = source
            if kind == "carry":
                slot: Slot = where  # type: ignore[assignment]
                if carried.setdefault(slot, names[0]) != names[0]:
                    return None
            if kind == "fixed":
                fixed[str(where)] = None
            row.append(source)
        sources.append(row)
    return Wiring(carried, fixed, sources) if _closed(func, run, carried, made) else None


def _source(names: Sequence[str], made: dict[str, Slot], run: Run) -> tuple[str, object] | None:
    """Where one operand comes from in every piece."""
    places: list[tuple[int, Slot] | None] = []
    for name in names:
        at, k = made.get(name, (-1, 0))
        inside = run.start <= at < run.start + run.times * run.period
        places.append(((at - run.start) // run.period, ((at - run.start) % run.period, k)) if inside else None)
    if all(place is None for place in places):
        return ("fixed", names[0]) if len(set(names)) == 1 else None
    slots = {place[1] for place in places[1:] if place is not None}
    if len(slots) != 1 or any(place is None for place in places[1:]):
        return None
    (slot,) = slots
    steps = [r - place[0] for r, place in enumerate(places) if place is not None]
    if all(step == 0 for step in steps) and places[0] is not None and places[0][1] == slot:
        return ("in", slot)
    return ("carry", slot) if places[0] is None and all(step == 1 for step in steps) else None


def _closed(func: Func, run: Run, carried: dict[Slot, str], made: dict[str, Slot]) -> bool:
    """Whether nothing outside reads a piece but what the last one hands on."""
    stop = run.start + run.times * run.period
    last = run.start + (run.times - 1) * run.period
    outside = [name for op in func.ops[stop:] for name in op.inputs] + list(func.results)
    for name in outside:
        at, k = made.get(name, (-1, 0))
        if run.start <= at < stop and (at < last or (at - last, k) not in carried):
            return False
    return bool(carried)


# -- folding --------------------------------------------------------------------------------------------
def _fold(module: Module, name: str, run: Run, wiring: Wiring, block: str) -> Module:
    func = module.funcs[name]
    pieces = [func.ops[run.start + r * run.period : run.start + (r + 1) * run.period] for r in range(run.times)]
    roles, stacked, old = _stack_params(module, pieces)
    types = func.types()
    slots = list(wiring.carried)
    first = [Value(f"x{i}" if i else "x", types[wiring.carried[s]]) for i, s in enumerate(slots)]
    fixed = [Value(n, types[n]) for n in wiring.fixed]
    body = _block(block, pieces[0], wiring, slots, first, fixed, roles)
    outs = tuple(replace(pieces[-1][j].outputs[k], name=pieces[-1][j].outputs[k].name) for j, k in slots)
    attrs = {"block": Ref(block), "times": run.times} | ({"carry": len(slots)} if len(slots) > 1 else {})
    call = Op("repeat", (*wiring.carried.values(), *wiring.fixed), outs, attrs=attrs)
    ops = (*func.ops[: run.start], call, *func.ops[run.start + run.times * run.period :])
    params = {n: p for n, p in module.params.items() if n not in old} | {p.name: p for p in stacked}
    used = {p for op in ops for p in op.params.values()}
    params |= {n: module.params[n] for n in old if n in used}
    funcs = {block: body, **module.funcs, name: replace(func, ops=ops)}
    return replace(module, params=params, funcs=funcs)


def _block(
    name: str, piece: Sequence[Op], wiring: Wiring, slots: Sequence[Slot], first: Sequence[Value],
    fixed: Sequence[Value], roles: dict[tuple[int, str], str],
) -> Func:  # fmt: skip
    entry = {slot: value.name for slot, value in zip(slots, first, strict=True)}
    ops: list[Op] = []
    for j, op in enumerate(piece):
        inputs = tuple(_operand(source, piece, entry) for source in wiring.sources[j])
        params = {role: roles[(j, role)] for role in op.params}
        ops.append(replace(op, inputs=inputs, params=params))
    results = tuple(piece[j].outputs[k].name for j, k in slots)
    return Func(name, (*first, *fixed), tuple(ops), results, block=True)


def _operand(source: tuple[str, object], piece: Sequence[Op], entry: dict[Slot, str]) -> str:
    kind, where = source
    if kind == "fixed":
        return str(where)
    slot: Slot = where  # type: ignore[assignment]
    return entry[slot] if kind == "carry" else piece[slot[0]].outputs[slot[1]].name


def _stack_params(
    module: Module, pieces: Sequence[Sequence[Op]]
) -> tuple[dict[tuple[int, str], str], list[Param], set[str]]:
    """Name of each op's parameter in the block, the stacked parameters, and those they replace."""
    roles: dict[tuple[int, str], str] = {}
    made: dict[tuple[str, ...], Param] = {}
    taken = set(module.params)
    for j, op in enumerate(pieces[0]):
        for role in op.params:
            names = tuple(piece[j].params[role] for piece in pieces)
            if len(set(names)) == 1:
                roles[(j, role)] = names[0]
                continue
            if names not in made:
                made[names] = stack([module.params[n] for n in names], taken - set(names))
                taken.add(made[names].name)
            roles[(j, role)] = made[names].name
    return roles, list(made.values()), {n for names in made for n in names}


def stack(params: Sequence[Param], taken: set[str]) -> Param:
    """One parameter that holds these in order; its path has a `*` where theirs count."""
    path, over = template([p.path for p in params])
    wanted = re.sub(r"[_./]?\[?[:,]*\*\]?", "", path.split("|")[0]).replace("/", ".").strip(".") or "stack"
    suffix = re.search(r"(\.\d+)$", params[0].name)
    name, turn = (
        wanted + (suffix[1] if suffix and "." + params[0].path.rsplit("/", 1)[-1] != suffix[1] else ""),
        2,
    )
    while name in taken:
        name, turn = f"{wanted}.{turn}", turn + 1
    whole = over == (0, len(params), 1)
    return replace(params[0], name=name, stack=len(params), path=path, over=None if whole else over)


def template(paths: Sequence[str]) -> tuple[str, tuple[int, int, int] | None]:
    """A path with `*` and the numbers it stands for; the paths joined by `|` where they do not count evenly."""
    parts = [re.split(r"(\d+)", path) for path in paths]
    if len({len(p) for p in parts}) == 1:
        varying = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        if len(varying) == 1 and all(p[varying[0]].isdigit() for p in parts):
            numbers = [int(p[varying[0]]) for p in parts]
            steps = {b - a for a, b in itertools.pairwise(numbers)}
            if len(steps) == 1 and (step := steps.pop()) > 0:
                row = list(parts[0])
                row[varying[0]] = "*"
                return "".join(row), (numbers[0], numbers[-1] + step, step)
    return "|".join(paths), None


def spelled(param: Param) -> list[str]:
    """The checkpoint paths a parameter is made of, in order."""
    if "|" in param.path:
        return param.path.split("|")
    if not param.stack:
        return [param.path]
    start, stop, step = param.over or (0, param.stack, 1)
    return [param.path.replace("*", str(i)) for i in range(start, stop, step)]
