"""Confident early exit: tokens that are sure leave the stack of layers, within a certified loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from effc.ir.core import Attr, Decode, Func, Module, Op, Ref, Value
from effc.ir.rewrite import names_of, prune
from effc.ir.types import Type
from effc.passes.base import Exactness, Notes, Pass, PassError, Phase, check_rate, option
from effc.passes.calm import adapters
from effc.passes.calm.checks import check_head, check_state, check_texts, exits_of
from effc.passes.calm.shape import Shape, find
from effc.passes.calm.sharing import Sharing, fitted, parted, shared
from effc.passes.calm.texts import part
from effc.weights import Lazy, Store

if TYPE_CHECKING:
    from effc.passes.context import Context

TRAINING_MINUTES = 6.0
"""Unless --heal says otherwise."""

FIT_ROWS, FIT_LENGTH, FIT_BATCHES = 8, 128, 32
"""Text that matrices are fitted to in closed form: 32 thousand tokens."""


@dataclass(frozen=True)
class Calm(Pass):
    """Early exits with a guarantee (CALM): a token whose exit is confident skips the remaining layers."""

    name: ClassVar[str] = "calm"
    phase: ClassVar[Phase] = Phase.EXITS
    exactness: ClassVar[Exactness] = Exactness.GUARANTEED
    writes: ClassVar[frozenset[str]] = frozenset({"*"})

    first: int = option(0, "layers before the first exit; 0 is a third of them")
    every: int = option(0, "layers between exits; 0 is a third of them")
    min_exit: int = option(1, "no exit before so many layers")
    measure: Literal["softmax", "softmax_max", "state", "classifier"] = option(
        "softmax", "confidence: top-1 less top-2, top-1, likeness of states, or a trained classifier"
    )
    adapter: Literal["mlp", "linear", "none"] = option("mlp", "what is trained in front of the head at each exit")
    head: Literal["model", "own"] = option(
        "model", "exits are read by the model's head, or by a copy of it that learns with them"
    )
    finetune: bool = option(False, "train the layers too, for exits and last layer together")
    lr: float = option(0.0, "learning rate; 0 is 0.002 for exits alone, 0.0005 where the layers learn too")
    state: Literal["propagate", "deferred", "shared"] = option(
        "propagate",
        "skipped layers keep what the exit's state gives them, or run later beside a token that takes all, "
        "or all tokens keep what the exit's state gives (with finetune)",
    )
    waiting: int = option(3, "state=deferred: tokens that may wait for that")
    rows: Literal["masked", "wait"] = option("masked", "in a batch each row leaves by itself, or all wait for all")
    decay: Literal["none", "paper", "t5x"] = option("none", "how the threshold falls along a text")
    tau: float = option(4.0, "how fast it falls")
    delta: float = option(0.1, "mean loss of text against the full model's that is allowed, 0 to 1")
    epsilon: float = option(0.05, "chance of the calibration that the guarantee may fail")
    loss: Literal["rouge_l", "token_f1", "agreement"] = option("rouge_l", "likeness of texts; the loss is 1 less it")
    risk: bool = option(False, "hold texts against what follows in --calib, not against the full model's")
    prompts: int = option(200, "calibration prompts")
    prompt: int = option(32, "tokens of each")
    tokens: int = option(32, "tokens generated from each; later ones run the full model")

    def __post_init__(self) -> None:
        if self.finetune:  # the layers change, and by how much is measured only
            object.__setattr__(self, "exactness", Exactness.LOSSY)

    def requires(self, module: Module) -> None:
        check_rate(self.name, self.lr)
        if module.decode is None or module.decode.strategy != "greedy":
            told = module.decode.strategy if module.decode else "nothing"
            raise PassError(f"calm: the module decodes by {told}, want greedy: calm comes first")
        shape = find(module)
        exits_of(self, shape.layers, shape.order)
        check_state(self, shape)
        check_head(self, shape, module)
        check_texts(self, module)

    def run(self, module: Module, notes: Notes) -> Module:
        shape = find(module)
        at = exits_of(self, shape.layers, shape.order)
        params, exit = adapters.block(self, shape, len(at), module)
        roles = {"exit": exit, "head": shape.head, "keys": shape.keys}
        if self.head == "own":
            param, roles["say"] = adapters.own_head(shape.head, module)
            params = [*params, param]
        funcs = dict(module.funcs)
        if sharing := self._sharing(shape, module):
            roles["after"] = sharing.after
            forward = parted(shape, at[0], sharing.after.name)
            funcs[forward.name] = forward
        early = _early(self, shape, at, roles, _free("early", module))
        first = (shape.keys, shape.head, exit)
        funcs |= {func.name: func for func in (*first, *roles.values(), early)}
        assert module.decode is not None
        decode = Decode("early", {**module.decode.attrs, "early": Ref(early.name), "layers": shape.layers})
        notes.chose(f"exits after layers {', '.join(map(str, at))} of {shape.layers}, confidence by {self.measure}")
        notes.chose(
            f"{len(params)} parameters of exits; skipped layers run @{shape.keys.name}, {len(shape.keys.ops)} ops"
        )
        return replace(module.with_params(*params), funcs=funcs, decode=decode)

    def made(self, before: Module, after: Module, store: Store) -> list[Lazy]:
        return adapters.made(before, after, store)

    def arrays(self, before: Module, after: Module, store: Store, context: Context, notes: Notes) -> Store:
        """Where keys are shared, the matrices that make them are fitted to what the layers kept before."""
        shape = find(before)
        sharing, store = self._sharing(shape, before), self.weights(before, after, store)
        if sharing is None:
            return store
        at = exits_of(self, shape.layers, shape.order)[0]
        texts = replace(context, calib=part(context.calib, learnt=True)).batches(FIT_ROWS, FIT_LENGTH)
        tokens = [texts(step, None)["tokens"][:, :-1] for step in range(FIT_BATCHES)]
        lazies, left = fitted(sharing, shape, at, before, store, tokens)
        notes.chose(
            f"{len(lazies)} matrices of layers {at} to {shape.layers - 1} begin as keys and values of the state at the "
            f"exit: {left:.0%} of their squares is not told by it"
        )
        return store.replace(lazies, after)

    def reads_text(self) -> bool:
        return self.state == "shared"

    def _sharing(self, shape: Shape, module: Module) -> Sharing | None:
        if self.state != "shared":
            return None
        return shared(shape.block, shape.keys, _free(f"{shape.block.name}.after", module))

    def training_minutes(self) -> float:
        return (
            0.0 if self.adapter == "none" and self.measure != "classifier" and not self.finetune else TRAINING_MINUTES
        )

    def train(self, module: Module, store: Store, context: Context) -> Store:
        from effc.passes.calm.train import train

        return train(self, module, store, context)

    def calibrates(self) -> bool:
        return True

    def calibrate(self, module: Module, store: Store, context: Context, notes: Notes) -> Module:
        if module.decode and module.decode.strategy == "speculative":
            notes.chose("nothing to certify: exits draft, and all layers verify what they say")
            return module
        from effc.passes.calm.calibrate import calibrate

        return calibrate(self, module, store, context, notes)


def _early(made_by: Calm, shape: Shape, at: tuple[int, ...], roles: Mapping[str, Func], name: str) -> Func:
    """The forward function with a stack that tokens leave, and how many layers each ran."""
    (logits,) = shape.head.results
    types = shape.head.types()
    tokens = Value(names_of(shape.forward).fresh("layers"), Type("i32", shape.state.shape[:2]))
    told: dict[str, Attr | Ref] = {"measure": made_by.measure, "rows": made_by.rows}
    told |= {"decay": made_by.decay, "tau": made_by.tau} if made_by.decay != "none" else {}
    told |= {"state": made_by.state} if made_by.state != "propagate" else {}
    told |= {"waiting": made_by.waiting} if made_by.state == "deferred" else {}
    attrs: dict[str, Attr | Ref] = {
        "block": shape.repeat.attrs["block"], "times": shape.layers, **({"order": shape.order} if shape.order else {}),
        "exits": at, **{role: Ref(func.name) for role, func in roles.items()}, **told, "threshold": 1.0,
    }  # fmt: skip
    op = Op("early", shape.repeat.inputs, (Value(logits, types[logits]), tokens), {}, attrs, {}, shape.repeat.loc)
    return prune(Func(name, shape.forward.inputs, (*shape.before, op), (logits, tokens.name)))


def _free(name: str, module: Module) -> str:
    while name in module.funcs:
        name += "_"
    return name


__all__ = ["Calm"]
