"""A smaller student that learns from its teacher, held against one that learned from the text alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from effc import artifact, evaluate
from effc.artifact import effc_version, staged, write_manifest, write_texts
from effc.backend.to_python import emit
from effc.clock import Clock
from effc.driver import described, measured, qualities, speeds_of
from effc.errors import EffcError
from effc.evaluate import Windows, vocab_of
from effc.exclusive import exclusive
from effc.frontend.tokenizer import Tokenizer
from effc.ir.core import Module
from effc.memory import peak_bytes
from effc.opened import Opened
from effc.passes.base import Exactness
from effc.passes.context import Context, Model
from effc.passes.layers import layer_store, stack_of, stepwise, with_layers
from effc.report import PassReport, Report
from effc.running import PROBE_TOKENS
from effc.runtime.train.budget import Budget
from effc.runtime.train.history import Fitted
from effc.runtime.train.objective import Objective
from effc.runtime.train.plan import Batches, Plan
from effc.runtime.train.policy import on_policy
from effc.state import State, placed, scratch, written
from effc.weights import Store, elements, nbytes

ALONE = "text alone"
"""The baseline: same student, same batches, same steps, no teacher."""


@dataclass(frozen=True)
class Distillation:
    """How a student is trained, on what, and how the outcome is measured."""

    objective: Objective = field(default_factory=Objective)
    budget: Budget = field(default_factory=lambda: Budget(minutes=5))
    text: Sequence[Path] = ()
    """To train on; none: samples of the teacher's own."""
    on_policy: float = 0.0
    """Share of the steps in which the student writes and the teacher marks."""
    rows: int = 16
    length: int = 128
    lr: float = 1e-3
    accumulate: int = 1
    seed: int = 0
    baseline: bool = True
    eval_text: Path | None = None
    eval_tokens: int = 4096
    window: int = evaluate.WINDOW
    speed: bool = True
    force: bool = False
    work: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise EffcError(f"on-policy {self.on_policy:g}: want a share of the steps, 0 to 1")
        if self.rows % self.accumulate:
            raise EffcError(f"rows {self.rows}: want a multiple of accumulate={self.accumulate}")
        if not self.budget:
            raise EffcError("budget 0: want some steps, or some time")

    def __str__(self) -> str:
        o = self.objective
        words = [o.kind, *([f"beta={o.beta:g}"] if o.kind == "jsd" else []), f"alpha={o.alpha:g}"]
        words += [f"temperature={o.temperature:g}"] if o.temperature != 1 else []
        words += [f"on_policy={self.on_policy:g}"] if self.on_policy else []
        return f"distill{{{','.join(words)}}}"


def asked(**options: Any) -> Distillation:
    """From plain options: those of `Distillation` and of `Objective` together; a budget or a text may be spelled."""
    goal = {name: options.pop(name) for name in ("kind", "alpha", "temperature", "beta") if name in options}
    budget, text = options.get("budget"), options.get("text")
    if isinstance(budget, str | int):
        options["budget"] = Budget.parse(str(budget))
    if isinstance(text, str | Path):
        options["text"] = [Path(text)]
    return Distillation(**options, objective=Objective(**goal)) if goal else Distillation(**options)


@dataclass(frozen=True)
class Distilled:
    """The report of the student beside its teacher, and of what it learned when."""

    report: Report
    runs: Mapping[str, Fitted]

    def json(self) -> dict[str, Any]:
        """For --json."""
        return self.report.json()

    def table(self) -> Group:
        """For the terminal."""
        return Group(self._looks(), self.report.table())

    def _looks(self) -> Table:
        """Quality before, during and after, a column for each way to train."""
        table = Table(title="perplexity and KL to the teacher as training went on", title_justify="left")
        table.add_column("steps", justify="right")
        for name in self.runs:
            for what in ("perplexity", "KL"):
                table.add_column(f"{name.partition('{')[0]}: {what}", justify="right")
        for rows in zip(*(fitted.looks for fitted in self.runs.values())):
            cells = [f"{look.values['perplexity']:.3f} {look.values['kl']:.4f}".split() for look in rows]
            table.add_row(str(rows[0].step), *(cell for pair in cells for cell in pair))
        return table


def of_layers(teacher: Opened, layers: str) -> Opened:
    """A student of some of the teacher's layers: `5` of them, evenly, or these: `0,3,6,11`."""
    _, _, count = stack_of(teacher.module)
    if not re.fullmatch(r"\d+(,\d+)*,?", layers):
        raise EffcError(f"layers '{layers}': want how many (5), or which (0,3,6,11)")
    numbers = [int(text) for text in layers.split(",") if text]
    ids = tuple(numbers) if "," in layers else stepwise(count, numbers[0])
    module = replace(with_layers(teacher.module, ids), name=f"{teacher.module.name}_{len(ids)}")
    note = f"the student begins as layers {', '.join(map(str, ids))} of the teacher's {count}"
    return Opened(teacher.path, module, layer_store(teacher.module, ids, teacher.store), teacher.files, (note,))


def distill(
    student: Opened, teacher: Opened, out: Path, how: Distillation | None = None, console: Console | None = None
) -> Distilled:
    """Train the student on what the teacher says and write it to `out` as an artifact."""
    how, clock = how or Distillation(), Clock(console)
    artifact.check_free(out, how.force)
    _check_vocabularies(student, teacher)
    folder = how.work or out.with_name(f".{out.name}.effc-work")
    context = _context(teacher, how, folder, console)
    with exclusive(folder), staged(out, how.force) as work:
        with scratch(work) as spool:
            with clock.step("read", nbytes(teacher.module)) as advance:
                origin = written(State(teacher.module, teacher.store), spool / "teacher", advance)
            store, runs = _trained(student, context, how, clock)
            with clock.step("write", nbytes(student.module)) as advance:
                final = placed(State(student.module, store), work, advance)
            tokenizer = student.files or teacher.files
            program = emit(final.module, version=effc_version(), pipeline=str(how))
            files = write_texts(work, final.module, program, tokenizer)
            with clock.step("evaluate", context.heldout.scored) as advance:
                quality = qualities(origin, final, context.heldout, advance)
            notes = [*student.notes, *_notes(how, origin.module, final.module)]
            with clock.step("tokens/s"):
                speeds = speeds_of(origin, final, notes) if how.speed else (None, None)
        report = Report(
            name=f"{student.module.name} from {teacher.module.name}",
            pipeline=str(how),
            exactness=str(Exactness.LOSSY),
            meaning=Exactness.LOSSY.meaning(),
            before=measured(origin.module, quality[0], speeds[0]),
            after=measured(final.module, quality[1], speeds[1]),
            passes=[_reported(name, fitted) for name, fitted in runs.items()],
            text=described(context.heldout),
            notes=notes,
            seconds=dict(clock.seconds),
            peak_bytes=peak_bytes(),
        )
        artifact.write_report(work, report.json(), report.html())
        write_manifest(work, _manifest(teacher, how, report, context.heldout, files, final))
    if how.work is None:
        shutil.rmtree(folder, ignore_errors=True)
    return Distilled(report, runs)


def _trained(student: Opened, context: Context, how: Distillation, clock: Clock) -> tuple[Store, dict[str, Fitted]]:
    """The student's new arrays, and the runs: from the teacher, then from the text alone."""
    model = context.model(student.module, student.store)
    batches = context.batches(how.rows, how.length)
    with clock.timed("distill"):
        fitted = _fit(model, context, how, batches, str(how))
    runs = {str(how): fitted}
    if how.baseline and how.objective.alpha:
        alone = replace(how, objective=Objective(alpha=0.0), on_policy=0.0, budget=Budget(steps=fitted.steps))
        with clock.timed(ALONE):
            runs[ALONE] = _fit(model, context, alone, batches, ALONE)
    return model.store(fitted.params["student"], student.store), runs


def _fit(model: Model, context: Context, how: Distillation, batches: Batches, title: str) -> Fitted:
    teacher, student = context.teacher, model.program
    tree = {"student": model.params, "teacher": teacher.params}
    if how.on_policy:
        batches = on_policy(batches, student.extend, lambda tree: tree["student"], how.on_policy, how.seed)
    plan = Plan(how.budget, lr=how.lr, accumulate=how.accumulate, seed=how.seed)
    look = context.looks(student)
    return context.fit(
        how.objective.loss(teacher.program.forward, student.forward), tree, batches, plan,
        trainable={"student": True, "teacher": False}, evaluate=lambda tree: look(tree["student"]),
        tag=f"{how.objective}|{how.on_policy}|{how.rows}x{how.length}|{[str(file) for file in how.text]}", title=title,
    )  # fmt: skip


def _context(teacher: Opened, how: Distillation, folder: Path, console: Console | None) -> Context:
    tokenizer = Tokenizer(teacher.files, str(teacher.path)) if teacher.files else None
    context = teacher.module.meta.get("context")
    most = context - 1 if isinstance(context, int) and context > 0 else how.length
    return Context(
        name="distill",
        teacher_module=teacher.module,
        teacher_store=teacher.store,
        tokenizer=tokenizer,
        heldout=_heldout(teacher, tokenizer, how),
        calib="\n".join(evaluate.read_text(file)[0] for file in how.text) if how.text else None,
        folder=folder,
        budget=how.budget,
        seed=how.seed,
        window=min(how.length, most),
        console=console,
    )


def _heldout(teacher: Opened, tokenizer: Tokenizer | None, how: Distillation) -> Windows:
    context = teacher.module.meta.get("context")
    window = min(how.window, context) if isinstance(context, int) and context > 0 else how.window
    if tokenizer is None:
        if how.eval_text or how.text:
            raise EffcError(
                f"{teacher.path}: no tokenizer, so no text can be read; want tokenizer.json beside the weights"
            )
        return evaluate.random_windows(vocab_of(teacher.module), window=window, tokens=how.eval_tokens, seed=how.seed)
    text, name = evaluate.read_text(how.eval_text)
    return evaluate.windows(tokenizer, text, window=window, tokens=how.eval_tokens, source=name)


def _check_vocabularies(student: Opened, teacher: Opened) -> None:
    """EffcError where the same number would be another token."""
    ours, theirs = vocab_of(student.module), vocab_of(teacher.module)
    if ours != theirs:
        raise EffcError(f"{student.path}: {ours} tokens, want {theirs} as {teacher.path} has")
    if student.files is None or teacher.files is None:
        return
    one, two = (Tokenizer(x.files, str(x.path)).rust.get_vocab(with_added_tokens=True) for x in (student, teacher))
    odd = min((token for token in {*one, *two} if one.get(token) != two.get(token)), default=None)
    if odd is not None:
        raise EffcError(
            f"{student.path}: token {odd!r} is {one.get(odd, 'none')}, want {two.get(odd, 'none')} as in {teacher.path}"
        )


def _notes(how: Distillation, teacher: Module, student: Module) -> list[str]:
    ours, theirs = elements(student), elements(teacher)
    source = ", ".join(file.name for file in how.text) if how.text else "samples of the teacher's own"
    return [f"{ours:,} parameters of the teacher's {theirs:,}: {ours / theirs:.1%}", f"trained on {source}"]


def _reported(name: str, fitted: Fitted) -> PassReport:
    return PassReport(name, str(Exactness.LOSSY), fitted.seconds, trained=[fitted.json()])


def _manifest(
    teacher: Opened, how: Distillation, report: Report, text: Windows, files: list[str], final: State
) -> Mapping[str, Any]:
    """What the artifact is and how it was made."""
    return {
        "name": report.name,
        "source": {"name": teacher.module.name, "path": teacher.path.name},
        "pipeline": str(how),
        "seed": how.seed,
        "exactness": report.exactness,
        "evaluated_on": {"text": text.source, "sha256": text.sha256, "tokens": text.scored},
        "trained_on": {file.name: artifact.file_hash(file) for file in how.text},
        "metrics": {"before": report.before.json(), "after": report.after.json()},
        "tokenizer": files,
        "probe": evaluate.fingerprint(final.side, text.chunks[0][:, :PROBE_TOKENS]),
    }
