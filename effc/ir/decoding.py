"""What `decode` may say: strategies, their settings, and the functions they name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from effc.errors import nearest
from effc.ir.core import Attr, Func, Module, Ref
from effc.ir.early import early_strategy_faults
from effc.ir.types import Type

STRATEGIES = ("greedy", "speculative", "early")

DRAFTERS = ("lookup", "model", "self", "head")

SETTINGS: Mapping[str, str] = {
    "forward": "the function from tokens to logits",
    "kind": f"what drafts: {', '.join(DRAFTERS)}",
    "drafter": "the function that drafts, from tokens (and features) to logits (and features)",
    "verify": "forward that gives features too, for kind=head",
    "vocab": "i32[n]: the target's number of each token the drafter knows",
    "shared": "true: the drafter's cache is the beginning of the target's",
    "context": "tokens the drafter takes at most",
    "gamma": "tokens drafted at most; 0 was measured to be best, and drafts nothing",
    "curve": "T(n+1)/T(1): what verifying n drafts costs in plain steps",
    "cost": "what a draft token costs in plain steps",
    "curve8": "curve of eight sequences at once, in their plain steps",
    "cost8": "cost of a draft token of each of them",
    "acceptance": "how often drafts of each level were right",
    "predicted": "speed-up that these numbers promise",
    "measured": "speed-up on the calibration prompts",
    "of": "hash of the program the numbers were measured on",
}
"""Of `decode speculative`, by name."""


def strategy_faults(module: Module) -> Iterator[str]:
    """What is wrong with the strategy, one message a fault; names that lead nowhere are told elsewhere."""
    decode = module.decode
    if decode is None:
        return
    if decode.strategy not in STRATEGIES:
        yield f"no strategy '{decode.strategy}', want {' or '.join(STRATEGIES)}{nearest(decode.strategy, STRATEGIES)}"
    if decode.strategy == "speculative":
        yield from _speculative(module, decode.attrs)
    if decode.strategy == "early":
        yield from early_strategy_faults(module, decode.attrs)


def _speculative(module: Module, attrs: Mapping[str, Attr | Ref]) -> Iterator[str]:
    for name in attrs:
        if name not in SETTINGS:
            yield f"no setting '{name}'{nearest(name, SETTINGS)}"
    kind, gamma = attrs.get("kind"), attrs.get("gamma")
    if kind not in DRAFTERS:
        yield f"kind={kind}, want {' or '.join(DRAFTERS)}"
    if not isinstance(gamma, int) or isinstance(gamma, bool) or gamma < 0:
        yield f"gamma={gamma}, want the tokens of a draft, 0 or more"
    for name in ("curve", "curve8", "acceptance"):
        if name in attrs and not _numbers(attrs[name]):
            yield f"{name} is no tuple of numbers"
    drafter, verify = _func(module, attrs.get("drafter")), _func(module, attrs.get("verify"))
    if (drafter is not None) != (kind != "lookup"):
        yield f"kind={kind} {'wants' if kind != 'lookup' else 'has'} a function `drafter`"
    if (verify is not None) != (kind == "head"):
        yield "kind=head and a function `verify` go together"
    if drafter is not None:
        yield from _drafter(module, drafter, verify, attrs.get("vocab"))


def _drafter(module: Module, drafter: Func, verify: Func | None, vocab: Attr | Ref) -> Iterator[str]:
    """Its operands and results against the forward function's."""
    forward = module.forward()
    tokens, logits = forward.inputs[0].type, forward.result_types()[0]
    features = verify.result_types()[1:] if verify else ()
    if verify and verify.result_types()[:1] != (logits,):
        yield f"@{verify.name} gives {verify.result_types()[:1]}, want {logits} first, as @{forward.name}"
    wanted = (tokens, *features)
    if tuple(value.type for value in drafter.inputs) != wanted:
        yield f"@{drafter.name} takes ({_types(v.type for v in drafter.inputs)}), want ({_types(wanted)})"
    first, *rest = drafter.result_types()
    if (verify and tuple(rest) != tuple(features)) or first.shape[:2] != logits.shape[:2] or len(first.shape) != 3:
        given = ", ".join(map(str, ("logits [b,t,V]", *features)))
        yield f"@{drafter.name} returns ({_types(drafter.result_types())}), want ({given})"
    if isinstance(vocab, Ref) and vocab.name in module.params:
        found, want = module.params[vocab.name].type, Type("i32", first.shape[-1:])
        if found != want:
            yield f"vocab: @{vocab.name} is {found}, want {want}: one number for each of the drafter's tokens"


def _func(module: Module, name: Attr | Ref) -> Func | None:
    return module.funcs.get(name.name) if isinstance(name, Ref) else None


def _numbers(value: Attr | Ref) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, int | float) for item in value)


def _types(types: Iterable[Type]) -> str:
    return ", ".join(map(str, types))


__all__ = ["DRAFTERS", "SETTINGS", "STRATEGIES", "strategy_faults"]
