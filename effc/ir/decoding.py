"""What `decode` may say: strategies, their settings, and the functions they name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from effc.errors import nearest
from effc.ir.core import Attr, Func, Module, Ref
from effc.ir.early import early_strategy_faults
from effc.ir.types import Type

STRATEGIES = ("greedy", "speculative", "early", "cascade")

DRAFTERS = ("lookup", "model", "self", "head", "exits")

RULES = ("chow", "diff", "opt", "tokenv1", "tokenv2", "tokenv3", "lossy")

CONFIDENCES = ("mean", "min", "quantile")

CERTIFIED: Mapping[str, str] = {
    "tokens": "how many tokens of a text it is certified for",
    "delta": "mean loss that is allowed",
    "epsilon": "chance of the calibration that the mean loss is above delta",
    "loss": "mean loss of the calibration prompts",
    "n": "number of calibration prompts",
    "measure": "textual: against the large model's text; risk: against references, less the large model's own",
    "likeness": "of texts that the loss is 1 less of",
    "bound": "sha256 of weights and settings that alpha or threshold was calibrated for",
}
"""Of a cascade whose alpha or threshold was certified."""

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
    "rule": f"a cascade: what of the drafter is kept though the target would say other things: {', '.join(RULES)}",
    "alpha": "how much of it",
    **CERTIFIED,
}
"""Of `decode speculative`, by name."""

CASCADE: Mapping[str, str] = {
    "level": "sequence: whole answers of the small model are kept or not; token: each of its tokens",
    "confidence": f"of an answer, from its tokens' probabilities: {', '.join(CONFIDENCES)}",
    "threshold": "confidence at which the small model's answer is kept; 1 never",
}
"""Of `decode cascade`, beside those of `decode speculative`."""


def strategy_faults(module: Module) -> Iterator[str]:
    """What is wrong with the strategy, one message a fault; names that lead nowhere are told elsewhere."""
    decode = module.decode
    if decode is None:
        return
    if decode.strategy not in STRATEGIES:
        yield f"no strategy '{decode.strategy}', want {' or '.join(STRATEGIES)}{nearest(decode.strategy, STRATEGIES)}"
    if decode.strategy == "speculative":
        yield from _speculative(module, decode.attrs, SETTINGS)
    if decode.strategy == "cascade":
        yield from _cascade(module, decode.attrs)
    if decode.strategy == "early":
        yield from early_strategy_faults(module, decode.attrs)


def _cascade(module: Module, attrs: Mapping[str, Attr | Ref]) -> Iterator[str]:
    level, confidence, threshold = attrs.get("level"), attrs.get("confidence", "mean"), attrs.get("threshold", 1)
    if level not in ("sequence", "token"):
        yield f"level={level}, want sequence or token"
    if level == "token" and attrs.get("rule") != "chow":
        yield f"level=token, rule={attrs.get('rule')}, want chow: it alone decides without the large model"
    if level == "sequence" and "rule" in attrs:
        yield "level=sequence has a threshold, want no rule"
    if confidence not in CONFIDENCES:
        yield f"confidence={confidence}, want {' or '.join(CONFIDENCES)}"
    if not _number(threshold) or not 0 <= float(str(threshold)) <= 1:
        yield f"threshold={threshold}, want 0 (always the small model's answer) to 1 (never)"
    if attrs.get("kind") not in ("model", "self") and level == "sequence":
        yield f"kind={attrs.get('kind')}, want model or self: the small model answers by itself"
    yield from _speculative(module, {"gamma": 0, **attrs}, {**SETTINGS, **CASCADE})


def _rule(attrs: Mapping[str, Attr | Ref]) -> Iterator[str]:
    """A cascade's rule and its alpha."""
    rule, alpha = attrs.get("rule"), attrs.get("alpha")
    if "rule" in attrs and rule not in RULES:
        yield f"rule={rule}, want {' or '.join(RULES)}{nearest(str(rule), RULES)}"
    if ("rule" in attrs) != ("alpha" in attrs):
        yield "rule and alpha go together"
    if "alpha" in attrs and not _number(alpha):
        yield f"alpha={alpha}, want a finite number (1e30 is as good as infinite)"
    if "rule" in attrs and attrs.get("kind") == "lookup":
        yield "kind=lookup has no distribution that a rule could weigh, want kind=model, self or head"


def _speculative(module: Module, attrs: Mapping[str, Attr | Ref], settings: Mapping[str, str]) -> Iterator[str]:
    for name in attrs:
        if name not in settings:
            yield f"no setting '{name}'{nearest(name, settings)}"
    yield from _rule(attrs)
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
    if kind == "exits" and drafter is not None and not any(op.kind == "early" for op in drafter.ops):
        yield f"kind=exits has drafter=@{drafter.name}, want a function with an op `early`"
    if kind == "exits" and attrs.get("shared") is not True:
        yield "kind=exits wants shared=true: what skipped layers keep is the target's cache"
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


def _number(value: Attr | Ref) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _types(types: Iterable[Type]) -> str:
    return ", ".join(map(str, types))


__all__ = ["CASCADE", "CONFIDENCES", "DRAFTERS", "RULES", "SETTINGS", "STRATEGIES", "strategy_faults"]
