"""What exits need of a module, found by dataflow: the stack that can be left, the head, what skipped layers keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from effc.ir.core import Func, Module, Op, Ref, Value, walk
from effc.ir.ops import ELEMENTWISE, attribute
from effc.ir.rewrite import Names, inline_calls, names_of, prune
from effc.ir.types import Type, depends
from effc.passes.base import PassError

BY_TOKEN = frozenset({"embed", "linear", "norm", "silu", "gelu", "softcap", "split", "const", "param"})
"""Ops that a head may be made of, beside the elementwise ones: each token by itself."""

STATEFUL = frozenset({"window", "running", "recur"})
"""Ops that keep something which only running them can tell."""


@dataclass(frozen=True)
class Shape:
    """The stack `repeat` of the forward function and its block, what comes before it, the tail that makes logits of
    it, and the ops of the block that skipped layers still run."""

    forward: Func
    repeat: Op
    before: tuple[Op, ...]
    block: Func
    head: Func
    keys: Func

    @property
    def layers(self) -> int:
        times = attribute(self.repeat, "times")
        assert isinstance(times, int)
        return times

    @property
    def order(self) -> tuple[int, ...]:
        """For every layer the array it takes, where layers share them."""
        told = attribute(self.repeat, "order")
        return tuple(number for number in told if isinstance(number, int)) if isinstance(told, tuple) else ()

    @property
    def state(self) -> Type:
        """Type of x."""
        return self.repeat.outputs[0].type

    @property
    def width(self) -> int:
        size = self.state.shape[-1]
        assert isinstance(size, int)
        return size


def find(module: Module) -> Shape:
    """PassError where tokens cannot leave the model's layers early."""
    forward = module.forward()
    forward = replace(forward, ops=inline_calls(module, forward).ops)
    at, repeat = _stack(module, forward)
    block = _block(module, repeat)
    head = _head(forward, repeat, forward.ops[at + 1 :], module)
    keys = keys_of(block, _free(f"{block.name}.keys", module.funcs))
    return Shape(forward, repeat, forward.ops[:at], block, head, keys)


def _stack(module: Module, forward: Func) -> tuple[int, Op]:
    """The last repeat, which must be all there is: nothing after it may look at other tokens."""
    found = [(at, op) for at, op in enumerate(forward.ops) if op.kind == "repeat"]
    if not found:
        raise PassError(f"calm: @{forward.name} repeats no block, want a stack of like layers to leave early")
    at, op = found[-1]
    for name, plain in (("start", 0), ("carry", 1)):
        if attribute(op, name) != plain:
            raise PassError(f"calm: the stack has {name}={attribute(op, name)}, want layers run once each, in order")
    for later in forward.ops[at + 1 :]:
        if later.kind not in BY_TOKEN | ELEMENTWISE:
            what = f"%{later.outputs[0].name} = {later.kind}"
            raise PassError(f"calm: {what} comes after the stack of layers, want each token by itself from there on")
    return at, op


def _block(module: Module, repeat: Op) -> Func:
    ref = repeat.attrs["block"]
    assert isinstance(ref, Ref)
    block = module.funcs[ref.name]
    names = [name for op in walk(block) for name in op.params.values()]
    short = next((n for n in names if module.params[n].stack not in (0, attribute(repeat, "times"))), None)
    if short and not attribute(repeat, "order"):
        raise PassError(f"calm: @{short} is shared by layers, want arrays of each layer's own")
    return replace(block, ops=inline_calls(module, block).ops)


def _head(forward: Func, repeat: Op, tail: tuple[Op, ...], module: Module) -> Func:
    """The tail as a function of the stack's result; literals and parameters from before come along."""
    x = repeat.outputs[0]
    if len(forward.results) != 1:
        raise PassError(f"calm: @{forward.name} has {len(forward.results)} results, want logits alone")
    loose = [op for op in forward.ops if op.kind in ("const", "param") and not op.inputs and op not in tail]
    whole = Func(_free("head", module.funcs), (x,), (*loose, *tail), forward.results)
    head = prune(whole)
    known = {x.name} | {value.name for op in head.ops for value in op.outputs}
    missing = next((name for op in head.ops for name in op.inputs if name not in known), None)
    if missing or forward.results[0] not in known:
        raise PassError(f"calm: the head reads %{missing or forward.results[0]}, want what the layers give alone")
    if any(depends(size, "t") for op in head.ops if op.kind == "const" for size in op.out.type.shape):
        raise PassError("calm: the head has a literal whose shape depends on the number of tokens")
    return head


# -- what skipped layers still do ---------------------------------------------------------------------------


def keys_of(block: Func, name: str) -> Func:
    """The ops of a block that its attentions' keys and values depend on, and what keeps these: by demand."""
    odd = next((op for op in walk(block) if op.kind in STATEFUL | {"repeat", "early"}), None)
    if odd:
        what = "runs layers of its own" if odd.kind == "repeat" else f"keeps the state of a '{odd.kind}'"
        raise PassError(f"calm: @{block.name} {what}, want attention alone to look at other tokens")
    attentions = [op for op in block.ops if op.kind == "attention"]
    if not attentions:
        raise PassError(f"calm: @{block.name} has no attention, so its layers keep nothing to make for those skipped")
    types, names = block.types(), names_of(block)
    kept = [_keep(op, types, names) for op in attentions]
    results = tuple(value.name for op in kept for value in op.outputs)
    keys = prune(replace(block, name=name, ops=tuple(_placed(block.ops, attentions, kept)), results=results))
    through = next((op for op in keys.ops if op.kind == "attention"), None)
    if through:
        raise PassError(
            f"calm: keys of @{block.name} depend on its attention %{through.outputs[0].name}: a block of several "
            "layers, want one layer a block"
        )
    return keys


def _keep(attention: Op, types: Mapping[str, Type], names: Names) -> Op:
    keyed = attribute(attention, "keyed")
    assert isinstance(keyed, int)
    kept = attention.inputs[1 : 3 + keyed]
    outputs = tuple(Value(names.fresh(f"{name}.kept"), types[name]) for name in kept)
    return Op("keep", kept, outputs)


def _placed(ops: Iterable[Op], attentions: list[Op], kept: list[Op]) -> Iterator[Op]:
    """Each `keep` where its attention stood; attentions stay, to be pruned where nothing reads them."""
    for op in ops:
        for attention, keep in zip(attentions, kept, strict=True):
            if op is attention:
                yield keep
        yield op


def _free(name: str, taken: Iterable[str]) -> str:
    while name in taken:
        name += "_"
    return name
