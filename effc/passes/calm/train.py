"""Training of exits: distilled from the last layer with the layers frozen, or together with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.ir.core import Decode, Func, Module, Op, Ref, Value
from effc.ir.ops import attribute
from effc.ir.rewrite import names_of, prune
from effc.ir.types import Type
from effc.passes.calm.adapters import GROUP, SCORE
from effc.passes.calm.texts import part
from effc.runtime.train import Plan, Tick, chosen, forward_kl, mean
from effc.runtime.train.plan import Batch, Batches
from effc.weights import Store

if TYPE_CHECKING:
    from effc.passes.calm.calm import Calm
    from effc.passes.context import Context, Model

ROWS, LENGTH = 8, 128
"""Sequences of a step, and tokens of each."""

RATE, TUNING_RATE = 2e-3, 5e-4
"""Learning rates of exits alone, and where the layers learn too."""

SAID, WHOLE_ROWS, WHOLE = 4, 1, 512
"""Where the layers learn, sequences of what the model says, and windows of --calib (or samples) beside them, as long as
a text may be: the layers go on saying what they said, and as far on."""

LOOKED_AT = 4
"""Windows of the evaluation text on which the agreement of exits is told."""


def train(made_by: Calm, module: Module, store: Store, context: Context) -> Store:
    """Arrays of the exits, and of the layers where they are tuned; how good the exits became is in the report."""
    context = replace(context, calib=part(context.calib, learnt=True))
    wide, count = with_exits(module)
    model = context.model(wide, store)
    look = _looks(model.program.extend, context, count, context.teacher if made_by.finetune else None)
    tree: dict[str, Any] = {"student": model.params}
    trainable: dict[str, Any] = {"student": _mask(made_by, model.program.params, module)}
    loss = _loss(model.program.extend, count)
    if made_by.finetune:
        teacher = context.teacher
        loss = _loss(model.program.extend, count, teacher.program.forward)
        tree["teacher"], trainable["teacher"] = teacher.params, False
    rate = made_by.lr or (TUNING_RATE if made_by.finetune else RATE)
    plan = Plan(context.budget, lr=rate, seed=context.seed)
    fitted = context.fit(
        loss, tree, _lessons(made_by, context), plan, trainable=trainable,
        evaluate=lambda tree: look(tree["student"]), tag=_tag(made_by, count), title="calm: exits",
    )  # fmt: skip
    return context.model(module, store).store(fitted.params["student"], store)


def _lessons(made_by: Calm, context: Context) -> Batches:
    """What the model says greedily, which is what exits are asked about; layers that learn read other text too."""
    if not made_by.finetune:
        return context.continued(ROWS, LENGTH, made_by.prompt)
    said, whole = context.continued(SAID, LENGTH, made_by.prompt), context.whole(WHOLE_ROWS, WHOLE)

    def batch(step: int, params: Any) -> Batch:
        other = whole(step, params)
        return {**said(step, params), "whole": other["tokens"], "whole_mask": other["mask"]}

    return batch


def _tag(made_by: Calm, count: int) -> str:
    """What training depends on: a new calibration of the same exits goes on from them."""
    places = (made_by.first, made_by.every, made_by.min_exit, count)
    more = [name for name in (made_by.state, made_by.head) if name in ("shared", "own")]
    more += ["whole"] * made_by.finetune
    told = (places, made_by.adapter, made_by.measure == "classifier", made_by.finetune, made_by.prompt, *more)
    return " ".join(map(str, told))


def with_exits(module: Module) -> tuple[Module, int]:
    """The module with a forward function that gives logits of the last layer, then of every exit, then scores."""
    early = module.funcs[early_name(module)]
    (op,) = (op for op in early.ops if op.kind == "early")
    work = _Spread(module, early, op)
    func = Func(early.name, early.inputs, (*(o for o in early.ops if o is not op), *work.ops), tuple(work.results))
    funcs = {**module.funcs, **work.funcs, func.name: prune(func)}
    return replace(module, funcs=funcs, decode=Decode("greedy", {"forward": Ref(func.name)})), len(work.places)


def early_name(module: Module) -> str:
    """The function that `decode` leaves early by, or drafts by."""
    attrs = module.decode.attrs if module.decode else {}
    ref = attrs.get("early", attrs.get("drafter"))
    assert isinstance(ref, Ref)
    return ref.name


class _Spread:
    """`early` written out for training: the stack in pieces, every exit and the head run on every token."""

    def __init__(self, module: Module, early: Func, op: Op):
        self.op, self.names, self.state = op, names_of(early), early.types()[op.inputs[0]]
        self.logits = op.outputs[0].type
        exits, times = attribute(op, "exits"), attribute(op, "times")
        assert isinstance(exits, tuple) and isinstance(times, int)
        self.places, self.ops = [int(str(at)) for at in exits], list[Op]()
        states = self.pieces([0, *self.places, times])
        self.funcs = self._exit(module)
        outs = [self.run("repeat", x, "block", "exit.state", times=1, start=i) for i, x in enumerate(states[:-1])]
        say = self.ref("say" if "say" in self.op.attrs else "head")
        heads = [self.ref("head"), *[say] * len(outs)]
        self.results = [
            self.run("call", x, "func", head, type=self.logits)
            for x, head in zip([states[-1], *outs], heads, strict=True)
        ]
        if "exit.score" in self.funcs:
            score = self.funcs["exit.score"].result_types()[0]
            self.results += [self.run("call", x, "func", "exit.score", type=score) for x in states[:-1]]

    def ref(self, role: str) -> str:
        target = self.op.attrs[role]
        assert isinstance(target, Ref)
        return target.name

    def _exit(self, module: Module) -> dict[str, Func]:
        """The exit's state as a block, and its score, which reads nothing stacked, as a function."""
        both = module.funcs[self.ref("exit")]
        made = {"exit.state": prune(replace(both, name="exit.state", results=both.results[:1]))}
        if len(both.results) > 1:
            made["exit.score"] = prune(replace(both, name="exit.score", results=both.results[1:], block=False))
        return made

    def pieces(self, cuts: Sequence[int]) -> list[str]:
        """States after each piece of the stack."""
        states, rest = [self.op.inputs[0]], self.op.inputs[1:]
        for start, stop in pairwise(cuts):
            told: dict[str, Any] = {"times": stop - start, "start": start}
            told |= {"order": self.op.attrs["order"]} if "order" in self.op.attrs else {}
            x, after = states[-1], bool(start) and "after" in self.op.attrs
            block, more = (self.ref("after"), (x, *rest)) if after else (self.ref("block"), rest)
            states.append(self.run("repeat", x, "block", block, *more, **told))
        return states[1:]

    def run(self, kind: str, x: str, role: str, name: str, *rest: str, type: Type | None = None, **attrs: int) -> str:
        value = Value(self.names.fresh("out"), type or self.state)
        self.ops.append(Op(kind, (x, *rest), (value,), {}, {role: Ref(name), **attrs}))
        return value.name


# -- what is minimised --------------------------------------------------------------------------------------

Extend = Callable[..., tuple[Any, ...]]


def _mask(made_by: Calm, table: Any, module: Module) -> Any:
    """What learns: parameters of the exits, or all."""
    if made_by.finetune:
        return True
    mine = [name for name in module.params if name.startswith((f"{GROUP}.", f"{GROUP}_", SCORE))]
    return chosen(table, "|".join(mine))


def _loss(extend: Extend, count: int, teacher: Callable[..., jax.Array] | None = None) -> Any:
    """Exits say what the last layer says; where layers learn too, it says what the input model says and exits can."""

    def loss(tree: Any, batch: Mapping[str, Any], tick: Tick) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = [part(tree, batch[name][:, :-1], batch[mask], tick) for name, mask in _PARTS if name in batch]
        counts = jnp.stack([told["count"] for _, told in found])
        shares = counts / counts.sum()
        total = jnp.dot(shares, jnp.stack([value for value, _ in found]))
        told = {n: jnp.dot(shares, jnp.stack([t[n] for _, t in found])) for n in found[0][1]}
        return total, told | {"count": counts.sum()}

    def part(tree: Any, ids: jax.Array, mask: jax.Array, tick: Tick) -> tuple[jax.Array, dict[str, jax.Array]]:
        full, *others, _ = extend(tree["student"], ids)
        exits, scores = others[:count], others[count:]
        divergence = both_ways if teacher else forward_kl
        losses = [mean(divergence(full, logits), mask) for logits in exits]
        told = {f"exit{i}": value for i, value in enumerate(losses)} | {"count": mask.sum()}
        if teacher:
            last = mean(forward_kl(teacher(tree["teacher"], ids), full), mask)
            told["last"] = last
            total = weighted(losses, last, tick.progress)
        else:
            total = sum(losses) / count
        right = [jnp.argmax(logits, -1) == jnp.argmax(full, -1) for logits in exits]
        total = total + sum(mean(_unsure(s[..., 0], r), mask) for s, r in zip(scores, right))
        return jnp.asarray(total), told

    return loss


_PARTS = (("tokens", "mask"), ("whole", "whole_mask"))
"""Of a batch."""


def both_ways(full: jax.Array, exit: jax.Array) -> jax.Array:
    """KL[..] of an exit to the last layer, whose gradient reaches both: they meet."""
    p, q = jax.nn.log_softmax(full.astype(jnp.float32)), jax.nn.log_softmax(exit.astype(jnp.float32))
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def weighted(exits: list[jax.Array], last: jax.Array, progress: jax.Array) -> jax.Array:
    """Weights rise with depth, the last layer's is as much as all others'; exits come in from the deepest on,
    over the first quarter (LayerSkip's gradual curriculum)."""
    count = len(exits)
    weights = [(i + 1) * (4 * progress * count >= count - 1 - i) for i in range(count)]
    most = count * (count + 1) / 2
    return (sum(w * loss for w, loss in zip(weights, exits)) + most * last) / (sum(weights) + most)


def _unsure(score: jax.Array, right: jax.Array) -> jax.Array:
    """Binary cross-entropy of a score (before the sigmoid) that an exit is right; each exit by itself."""
    return jax.nn.softplus(score) - score * jax.lax.stop_gradient(right).astype(jnp.float32)


def _looks(extend: Extend, context: Context, count: int, teacher: Model | None) -> Callable[[Any], Mapping[str, float]]:
    """For `fit`: how often each exit's likeliest token is the last layer's, on the evaluation text; where layers
    learn too, KL of the last to the input model's, nats a token."""
    chunks = context.heldout.chunks
    tokens = jnp.asarray(np.concatenate([chunk for chunk in chunks[:LOOKED_AT] if chunk.shape == chunks[0].shape]))

    @jax.jit
    def told(params: Any, before: Any) -> dict[str, jax.Array]:
        full, *others, _ = extend(params, tokens)
        likeliest = jnp.argmax(full, -1)
        found = {f"agreement{i + 1}": jnp.mean(jnp.argmax(x, -1) == likeliest) for i, x in enumerate(others[:count])}
        if teacher is None:
            return found
        return found | {"last_kl": mean(forward_kl(teacher.program.forward(before, tokens), full))}

    def call(params: Any) -> Mapping[str, float]:
        found = told(params, None if teacher is None else teacher.params)
        return {name: float(value) for name, value in found.items()}

    return call
