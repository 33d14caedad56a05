"""When `early` is well-formed: its numbers, and the blocks it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from effc.errors import nearest
from effc.ir.core import Attr, Func, Module, Op, Ref, walk
from effc.ir.ops import array_index, attribute
from effc.ir.printer import ref
from effc.ir.types import Type


def early_faults(module: Module, op: Op, inputs: list[Type]) -> Iterator[str]:
    """`early` against the blocks it runs: x and the rest to x, x to x at an exit, x to logits."""
    yield from _numbers(op)
    if not inputs:
        return  # said by the op's row
    roles = {role: op.attrs.get(role) for role in ("block", "keys", "exit", "head", "after", "say")}
    found = {role: module.funcs.get(r.name) for role, r in roles.items() if isinstance(r, Ref)}
    state = inputs[:1]
    wanted = {"block": (inputs, state), "keys": (inputs, None), "exit": (state, state), "head": (state, None)}
    head = found.get("head")
    wanted |= {"after": ([*state, *inputs], state), "say": (state, None if head is None else [*head.result_types()])}
    if op.attrs.get("measure") == "classifier":
        score = Type("f32", (*inputs[0].shape[:-1], 1))
        wanted["exit"] = (state, [*state, score])
    for role, func in found.items():
        if func is not None:
            yield from _runs(role, func, *wanted[role])
            yield from _stacks(module, role, func, op)
    tokens = Type("i32", inputs[0].shape[:2])
    if head is not None and [value.type for value in op.outputs] != [*head.result_types(), tokens]:
        yield f"defines ({types_text(v.type for v in op.outputs)}), want ({types_text([*head.result_types(), tokens])})"


def _runs(role: str, func: Func, inputs: list[Type], results: list[Type] | None) -> Iterator[str]:
    wanted = [value.type for value in func.inputs]
    if inputs != wanted:
        yield f"{role}: {ref(func.name)} wants ({types_text(wanted)}), is given ({types_text(inputs)})"
    if results is not None and list(func.result_types()) != results:
        yield f"{role}: {ref(func.name)} returns ({types_text(func.result_types())}), want ({types_text(results)})"


def _stacks(module: Module, role: str, func: Func, op: Op) -> Iterator[str]:
    """Stacked parameters: one array a layer, or an exit."""
    exits = op.attrs.get("exits")
    layers = role in ("block", "keys", "after")
    count = attribute(op, "times") if layers else len(exits) if isinstance(exits, tuple) else 0
    order = attribute(op, "order") if layers else ()
    if isinstance(order, tuple) and order and len(order) != count:
        yield f"order tells the arrays of {len(order)} layers, want {count}"
        return
    for name in dict.fromkeys(name for inner in walk(func) for name in inner.params.values()):
        param = module.params.get(name)
        if param and param.stack and isinstance(count, int) and param.stack < needed(order, param.stack, count):
            yield f"{role}: {ref(name)} is stacked {param.stack} times, want {count}"


def needed(order: Attr | Ref, stack: int, layers: int) -> int:
    """How many arrays layers take of a parameter that has `stack`."""
    return 1 + max((array_index(order, stack, layer) for layer in range(layers)), default=-1)


def _numbers(op: Op) -> Iterator[str]:
    """What is wrong with the numbers of an `early`."""
    times, at, threshold = (attribute(op, name) for name in ("times", "exits", "threshold"))
    if not isinstance(times, int) or not isinstance(at, tuple) or not isinstance(threshold, (int, float)):
        return  # said by the op's row
    places = [place for place in at if isinstance(place, int)]
    if not places or places != sorted(set(places)) or not 1 <= places[0] <= places[-1] < times:
        yield f"exits={places}, want rising numbers of layers from 1 to {times - 1}"
    state = op.attrs.get("state")
    if state in ("deferred", "shared") and len(places) > 1:
        why = "tokens wait for all layers after it" if state == "deferred" else "its state is what they all keep"
        yield f"state={state} has exits={places}, want one: {why}"
    if (state == "shared") != ("after" in op.attrs):
        yield f"state={attribute(op, 'state')}, want `after` with state=shared, and with it alone"
    waiting = attribute(op, "waiting")
    if not isinstance(waiting, int) or waiting < 1:
        yield f"waiting={waiting}, want 1 or more tokens"
    if not 0 <= threshold <= 1:
        yield f"threshold={threshold}, want 0 (always leave) to 1 (never)"


SETTINGS: Mapping[str, str] = {
    "forward": "the function from tokens to logits, all layers",
    "early": "the same function with a stack that tokens leave; gives the layers each ran too",
    "layers": "layers of the stack",
    "threshold": "confidence at which tokens leave; 1 never",
    "tokens": "how many tokens of a text it is certified for; later ones run all layers",
    "most": "sequences at once up to which tokens leave, where more were slower by it; 0 any number",
    "delta": "mean loss that is allowed",
    "epsilon": "chance of the calibration that the mean loss is above delta",
    "loss": "mean loss of the calibration prompts",
    "n": "number of calibration prompts",
    "measure": "textual: against the full model's text; risk: against references, less the full model's own",
    "of": "likeness of texts that the loss is 1 less of",
    "bound": "sha256 of weights and settings the threshold was calibrated for",
}
"""Of `decode early`, by name."""


def early_strategy_faults(module: Module, attrs: Mapping[str, Attr | Ref]) -> Iterator[str]:
    """What is wrong with the settings of `decode early`."""
    for name in attrs:
        if name not in SETTINGS:
            yield f"no setting '{name}'{nearest(name, SETTINGS)}"
    most = attrs.get("most", 0)
    if not isinstance(most, int) or isinstance(most, bool) or most < 0:
        yield f"most={most}, want a number of sequences, 0 for any"
    ref, threshold = attrs.get("early"), attrs.get("threshold", 1.0)
    func = module.funcs.get(ref.name) if isinstance(ref, Ref) else None
    found = [op for op in func.ops if op.kind == "early"] if func else []
    if not found:
        yield f"early={ref}, want a function with an op `early`"
    elif attribute(found[0], "threshold") != threshold:
        yield f"threshold={threshold}, but the op `early` has {attribute(found[0], 'threshold')}"
    elif attrs.get("layers") != attribute(found[0], "times"):
        yield f"layers={attrs.get('layers')}, want {attribute(found[0], 'times')}"


def types_text(types: Iterable[Type]) -> str:
    """`f32[b,t,8], i32[b,t]`."""
    return ", ".join(map(str, types))
