"""What passes that train or calibrate are given: text, a teacher, a budget, and `fit` with a progress bar."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from effc.backend.to_python import emit, load_program
from effc.errors import EffcError
from effc.evaluate import Windows, prefix, vocab_of
from effc.frontend.tokenizer import Tokenizer
from effc.ir.core import Module
from effc.passes.base import Pass
from effc.runtime.engine import Engine
from effc.runtime.program import Program
from effc.runtime.qarray import QArray
from effc.runtime.train.budget import Budget
from effc.runtime.train.checkpoints import digest
from effc.runtime.train.data import mixed, windows
from effc.runtime.train.history import Fitted, Row
from effc.runtime.train.judge import judge
from effc.runtime.train.loop import Evaluate, fit
from effc.runtime.train.own import Continued, OwnText
from effc.runtime.train.plan import Batches, Loss, Plan, Tree
from effc.runtime.train.tree import by_name
from effc.runtime.weights import load_params
from effc.weights import Lazy, Store, parts, write_safetensors

LOOKED_AT = 4096
"""Tokens of the evaluation text that are scored before, during and after training."""

BESIDE, BESIDE_ROWS = 8, 32
"""Samples of its own, so many times so many, that a model reads beside --calib: 64 k tokens in windows of 256."""

CONTINUED, CONTINUED_ROWS = 128, 64
"""Texts that a model says greedily, likewise: a million tokens in windows of 128, made as training comes to them."""


@dataclass(frozen=True)
class Model:
    """A module ready to run: its program, and its arrays as the program takes them (floats as f32)."""

    module: Module
    program: Program
    params: Tree

    @staticmethod
    def of(module: Module, store: Mapping[str, Lazy]) -> Model:
        """Reads every array once."""
        program = load_program(emit(module))
        with tempfile.TemporaryDirectory(prefix="effc-") as folder:
            file = Path(folder) / "model.safetensors"
            write_safetensors(file, module, store)
            params = load_params(file, program.params)
        return Model(module, program, jax.tree.map(_wide, params, is_leaf=lambda x: isinstance(x, QArray)))

    def store(self, params: Tree, before: Store) -> Store:
        """`before` with every dense array of floats taken from the tree, in the module's own dtypes."""
        arrays = by_name(self.program.params, params)
        floats = [name for name, (one, *_) in arrays.items() if _is_float(one)]
        return before.replace([_lazy(self.module, name, arrays[name]) for name in floats], self.module)


@dataclass(frozen=True)
class Context:
    """Handed to `Pass.train` and `Pass.calibrate`. Nothing in it is computed before it is used."""

    name: str
    teacher_module: Module
    teacher_store: Store
    tokenizer: Tokenizer | None
    heldout: Windows
    """The evaluation text: to look at, not to learn from."""
    calib: str | None
    """Text of --calib; without it models train on samples of their own."""
    folder: Path
    """Survives an interruption: checkpoints, samples."""
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    window: int = 256
    """Tokens of a training sequence, less than the model's context."""
    console: Console | None = None
    later: Sequence[Pass] = ()
    """Passes that come after all that trains here: weights may learn to be what these will make of them."""
    runs: dict[str, list[Fitted]] = field(default_factory=dict[str, list[Fitted]])
    """What was trained, by pass: it goes into the report."""

    def tell(self, text: str) -> None:
        """On the console, where there is one."""
        if self.console:
            self.console.print(text, highlight=False)

    def model(self, module: Module, store: Store) -> Model:
        """A module of the pipeline, ready to run."""
        return Model.of(module, store)

    @cached_property
    def teacher(self) -> Model:
        """The input model."""
        return Model.of(self.teacher_module, self.teacher_store)

    @cached_property
    def head(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text."""
        return tuple(prefix(self.tokenizer)) if self.tokenizer else ()

    @cached_property
    def ids(self) -> np.ndarray | None:
        """Tokens i32[n] of --calib; None where none was given."""
        if self.calib is None:
            return None
        if self.tokenizer is None:
            raise EffcError(f"{self.name}: --calib needs a tokenizer, and the model has none")
        found = self.tokenizer.rust.encode(self.calib, add_special_tokens=False).ids
        return np.asarray(found, np.int32)

    @cached_property
    def own(self) -> OwnText:
        """Samples of the teacher."""
        engine = Engine(self.teacher.program, self.teacher.params)
        folder = self.folder / f"own-{digest(self.teacher.params)}"
        return OwnText(engine, self._starts(), self.window, self.seed, folder=folder)

    def batches(self, rows: int, length: int | None = None) -> Batches:
        """{tokens i32[rows,length+1], mask}: windows of --calib, or the teacher's own samples."""
        length = min(length or self.window, self.window)
        if self.ids is not None:
            return windows(self.ids, length=length, rows=rows, seed=self.seed, head=self.head)
        return replace(self.own, length=length).batches(rows)

    def whole(self, rows: int, most: int) -> Batches:
        """As `batches`, of texts as long as the model takes, up to `most` tokens; its own samples are shorter."""
        if self.ids is None:
            return self.batches(rows)
        limit = self.teacher_module.meta.get("context")
        limit = limit if isinstance(limit, int) and limit > 0 else most
        length = max(1, min(most, limit, len(self.ids) + len(self.head) - 1))
        return windows(self.ids, length=length, rows=rows, seed=self.seed, head=self.head)

    def batches_beside(self, rows: int) -> Batches:
        """As `batches`; with --calib, the teacher's own samples among its windows, each text read equally often.

        A short text is soon learned by heart: what a student gets from samples it can use on other texts too.
        """
        text = self.batches(rows)
        if self.ids is None:
            return text
        own = replace(self.own, length=self.window, rows=BESIDE_ROWS, most=BESIDE)
        made = BESIDE * BESIDE_ROWS * self.window
        return mixed(text, own.batches(rows), made / (made + len(self.ids)), self.seed)

    def continued(self, rows: int, length: int, prompt: int) -> Batches:
        """What the teacher says greedily after windows of --calib and samples of its own, `prompt` tokens of each."""
        own, length = self.own, min(length, self.window)
        more = {"text": self.ids, "head": self.head, "prompt": min(prompt, length), "folder": own.folder}
        said = Continued(own.engine, own.starts, length, own.seed, CONTINUED_ROWS, CONTINUED, **more)
        return said.batches(rows)

    def prompts(self, count: int, length: int) -> np.ndarray:
        """i32[count,length] to calibrate on: of --calib, without overlap as far as it goes, or own samples."""
        if self.ids is None:
            source = replace(self.own, length=length - 1)
            return np.concatenate([source.chunk(i) for i in range(-(-count // source.rows))])[:count]
        body = length - len(self.head)
        places = np.random.default_rng(self.seed).permutation(len(self.ids) // body)[:count] * body
        if len(places) < count:
            raise EffcError(f"{self.name}: {len(self.ids)} tokens of text, want {count} x {body} to calibrate on")
        return np.stack([[*self.head, *self.ids[at : at + body]] for at in places]).astype(np.int32)

    def looks(self, program: Program) -> Evaluate:
        """For `fit`: perplexity of the evaluation text and KL to the teacher, of these parameters."""
        teacher = self.teacher
        tokens, context = _some(self.heldout, LOOKED_AT), self.heldout.context
        return judge(teacher.program.forward, teacher.params, program.forward, tokens, context)

    def fit(
        self, loss: Loss, params: Tree, batches: Batches, plan: Plan, *,
        trainable: Tree = True, evaluate: Evaluate | None = None, tag: str = "", title: str = "",
    ) -> Fitted:  # fmt: skip
        """`effc.runtime.train.fit` with a progress bar, checkpoints in `folder`, and its numbers in the report."""
        plan, tag = replace(plan, folder=self.folder / self.name), f"{self.name}|{title}|{tag}|{self._sources()}"
        told = self._telling(title or self.name, evaluate) if evaluate else None
        with _bar(self.console, title or self.name) as watch:
            fitted = fit(loss, params, batches, plan, trainable=trainable, watch=watch, evaluate=told, tag=tag)
        fitted = replace(fitted, title=title)
        self.runs.setdefault(self.name, []).append(fitted)
        return fitted

    def _telling(self, title: str, evaluate: Evaluate) -> Evaluate:
        """What it says is told as well."""

        def call(params: Tree) -> Mapping[str, float]:
            values = evaluate(params)
            self.tell(f"{title}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            return values

        return call

    def _sources(self) -> str:
        """Of what is learned from and looked at: with other texts it is another run."""
        calib = hashlib.sha256(self.calib.encode()).hexdigest() if self.calib is not None else "own"
        return f"{calib}|{self.heldout.sha256}|{self.seed}"

    def _starts(self) -> list[int]:
        """What a text begins with: what the tokenizer puts there, an end of text, else any token."""
        if self.head:
            return [self.head[-1]]
        ends = self.tokenizer.eos_ids if self.tokenizer else ()
        return list(ends) or list(range(vocab_of(self.teacher_module)))


def _wide(array: jax.Array | QArray) -> jax.Array | QArray:
    """Half floats as f32: small steps would be lost in them."""
    return array.astype(jnp.float32) if _is_float(array) and array.dtype.itemsize == 2 else array


def _is_float(array: Any) -> TypeGuard[jax.Array]:
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jnp.floating)


def _lazy(module: Module, name: str, arrays: list[jax.Array]) -> Lazy:
    param = module.params[name]
    dtype = parts(param.type)[""].dtype
    return Lazy(param, lambda i: {"": np.asarray(arrays[i]).astype(dtype)})


def _some(text: Windows, tokens: int) -> np.ndarray:
    """The first windows as i32[n,length]."""
    count = max(1, tokens // text.chunks[0].shape[1])
    return np.concatenate(text.chunks[:count])


@contextmanager
def _bar(console: Console | None, title: str) -> Iterator[Callable[[Row], None]]:
    """Progress, loss and tokens/s on a terminal."""
    if console is None or not console.is_terminal:
        yield lambda row: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=1.0)

        def show(row: Row) -> None:
            words = f"{title}: step {row.step}, loss {row.loss:.3f}, {row.tokens / max(row.seconds, 1e-9):.0f} tokens/s"
            progress.update(task, completed=row.progress, description=words)

        yield show
