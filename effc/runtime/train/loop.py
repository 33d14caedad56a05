"""fit(): an optimizer on some leaves of a tree; checkpoints, a history, a clean end on Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effc.errors import EffcError
from effc.runtime.engine import keep_compiled
from effc.runtime.train.checkpoints import Checkpoints, fingerprint
from effc.runtime.train.history import Fitted, Look, Row
from effc.runtime.train.plan import Batch, Batches, Loss, Plan, Tick, Tree
from effc.runtime.train.step import State, compiled, optimizer
from effc.runtime.train.tree import put, take

WORTH = 20
"""Training between two checkpoints takes at least so many times what one takes."""

Watch = Callable[[Row], None]
Evaluate = Callable[[Tree], Mapping[str, float]]


def fit(
    loss: Loss,
    params: Tree,
    batches: Batches,
    plan: Plan,
    *,
    trainable: Tree = True,
    watch: Watch | None = None,
    evaluate: Evaluate | None = None,
    tag: str = "",
) -> Fitted:
    """Train the leaves that `trainable` (a mask; True is all) marks; the arrays given stay as they are.

    Ctrl-C, or a polite kill, ends it after the step that runs: a checkpoint is kept in plan.folder, then
    KeyboardInterrupt. A second one ends it at once. `tag` tells runs apart whose loss or data differ.
    """
    keep_compiled()
    if not take(params, trainable):
        raise EffcError("train: no parameter is trainable, want some")
    folder = plan.folder / fingerprint(plan, params, trainable, tag) if plan.folder else None
    checkpoints = Checkpoints(folder)
    try:
        return _Run(loss, params, batches, plan, trainable, checkpoints).go(watch, evaluate)
    finally:
        checkpoints.close()


class _Run:
    """One training. `state` is what a step uses up and makes anew."""

    def __init__(self, loss: Loss, params: Tree, batches: Batches, plan: Plan, mask: Tree, checkpoints: Checkpoints):
        self.batches, self.plan, self.mask, self.checkpoints = batches, plan, mask, checkpoints
        kept, make = take(params, mask), optimizer(plan)
        # copies: a step uses up what it is given, and the caller's arrays may lie in a mapped file
        weights = {path: jnp.array(array, copy=True) for path, array in kept.items()}
        self.state: State = {"weights": weights, "optimizer": make.init(weights)}
        self.rest = put(params, dict.fromkeys(kept, jnp.zeros(())), mask)
        self.once = compiled(loss, make, mask, plan)
        self.key = jax.random.key(plan.seed)
        self.step, self.resumed, self.tokens = 0, 0, 0
        self.seconds, self.compile_seconds, self.saved, self.cost = 0.0, 0.0, 0.0, 0.0
        self.history, self.looks = list[Row](), list[Look]()

    @property
    def progress(self) -> float:
        return self.plan.budget.spent(self.step, self.seconds)

    @property
    def params(self) -> Tree:
        """All of them as they are now."""
        return put(self.rest, self.state["weights"], self.mask)

    def go(self, watch: Watch | None, evaluate: Evaluate | None) -> Fitted:
        self._resume()
        with _asked_to_stop() as stop:
            while self.progress < 1:
                self._look(evaluate)
                self._advance()
                if watch:
                    watch(self.history[-1])
                if stop():
                    self._save()
                    raise KeyboardInterrupt(self._kept())
                if self.seconds - self.saved > self._pause():
                    self._save()
        self._look(evaluate)
        self._save()
        counts = (self.step, self.seconds, self.compile_seconds, self.tokens)
        return Fitted(self.params, *counts, self.history, self.looks, self.resumed)

    def _kept(self) -> str:
        """What Ctrl-C leaves."""
        folder = self.checkpoints.folder
        return (
            f"training is kept at step {self.step} in {folder}: the same command goes on from there" if folder else ""
        )

    def _advance(self) -> None:
        """One step, timed; the first compiles."""
        start, progress = time.perf_counter(), self.progress
        batch = self._batch()
        lr = self.plan.rate(self.step, progress)
        key = jax.random.fold_in(self.key, self.step)
        tick = Tick(key, jnp.int32(self.step), jnp.float32(progress))
        self.state, loss, metrics = self.once(self.state, self.rest, batch, tick, jnp.float32(lr))
        told, scalars = float(loss), {name: float(value) for name, value in metrics.items()}
        if not np.isfinite(told):
            raise EffcError(f"train: the loss is {told} at step {self.step}, want a number: try a smaller lr")
        spent = time.perf_counter() - start
        if self.step == self.resumed:
            self.compile_seconds += spent
        self.step, self.seconds = self.step + 1, self.seconds + spent
        self.tokens += batch["tokens"].size
        self.history.append(Row(self.step, self.progress, told, lr, self.seconds, self.tokens, scalars))

    def _batch(self) -> Batch:
        """The next batch; EffcError where it does not divide into the parts it is to be cut into."""
        batch = self.batches(self.step, self.params)
        rows, parts = batch["tokens"].shape[0], self.plan.accumulate
        if rows % parts:
            raise EffcError(f"train: a batch of {rows} sequences, want a multiple of accumulate={parts}")
        return batch

    def _look(self, evaluate: Evaluate | None) -> None:
        """Evaluate where the next of the planned looks is due; its time is not the budget's."""
        due = len(self.looks) / (self.plan.looks + 1)
        if evaluate and self.progress >= due and (not self.looks or self.looks[-1].step < self.step):
            values = {name: float(value) for name, value in evaluate(self.params).items()}
            self.looks.append(Look(self.step, self.progress, values))

    def _save(self) -> None:
        counts = {name: getattr(self, name) for name in _COUNTS}
        rows, looks = [asdict(row) for row in self.history], [asdict(look) for look in self.looks]
        start = time.perf_counter()
        self.checkpoints.save(self.step, self.state, {**counts, "history": rows, "looks": looks})
        self.saved, self.cost = self.seconds, time.perf_counter() - start

    def _pause(self) -> float:
        """Seconds until the next checkpoint: those of large models are rarer, or they would take most of the time."""
        return max(self.plan.every, WORTH * self.cost) if self.plan.every else 0.0

    def _resume(self) -> None:
        found = self.checkpoints.latest(self.state)
        if found is None:
            return
        self.state, facts = found
        for name in _COUNTS:
            setattr(self, name, facts[name])
        self.resumed, self.saved = self.step, self.seconds
        self.history = [Row(**row) for row in facts["history"]]
        self.looks = [Look(**look) for look in facts["looks"]]


_COUNTS = ("step", "seconds", "compile_seconds", "tokens")


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a polite kill came: told between steps, so that no step is torn; the second one raises."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
