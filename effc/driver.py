"""optimize(): load -> lower -> passes -> weights -> check -> emit -> evaluate -> report."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from effc import artifact, evaluate, healing, speed
from effc.artifact import WEIGHTS, effc_version, staged, write_manifest, write_texts
from effc.backend.to_python import emit, load_program
from effc.clock import Clock
from effc.comparing import compare_apart
from effc.edited import edited_module
from effc.errors import EffcError
from effc.evaluate import Quality, Windows
from effc.exclusive import exclusive
from effc.frontend.check import check
from effc.frontend.lowering import lower
from effc.frontend.source import Source
from effc.frontend.tokenizer import Tokenizer
from effc.ir.core import Module, Ref
from effc.memory import peak_bytes
from effc.passes import runner
from effc.passes.base import Exactness
from effc.passes.context import Context
from effc.passes.runner import Step, Watch
from effc.passes.weight_rules import coded
from effc.pipeline import Pipeline
from effc.plan import Plan, side
from effc.predict import Prediction, predict, step_seconds
from effc.report import Report, Side, Speed
from effc.running import PROBE_TOKENS, run_passes
from effc.runtime.train.budget import Budget
from effc.runtime.weights import load_params
from effc.state import State, placed, scratch, written
from effc.weights import elements, nbytes

TRAIN_WINDOW = 256
"""Tokens of a training sequence; one less than the context where that is shorter: the last one is only told."""

EXPORT_TOKENS = 1024


@dataclass(frozen=True)
class Settings:
    """What `effc optimize` is asked for beside the model and where to write."""

    passes: str = ""
    seed: int = 0
    eval_text: Path | None = None
    calib: Path | None = None
    eval_tokens: int = 4096
    window: int = evaluate.WINDOW
    ir: Path | None = None
    force: bool = False
    export: bool = False
    speed: bool = True
    dump: Path | None = None
    print_ir: bool = False
    heal: str = ""
    """Training of all passes together: `500` steps, `10m`, `90s`; empty is what each pass takes by default."""
    work: Path | None = None
    """Where checkpoints of training go; without it a folder beside the artifact that goes when all is done."""
    max_memory: int = 0
    """Bytes that the process, or one that it starts, may hold; 0 for as many as it takes."""


def optimize(source: Source, out: Path, settings: Settings | None = None, console: Console | None = None) -> Report:
    """Compile `source` into an artifact at `out`; nothing is left there unless all goes well."""
    settings = settings or Settings()
    pipeline, asked = _asked(settings)
    artifact.check_free(out, settings.force)
    with _work(out, settings, pipeline) as folder:
        return _optimized(source, out, settings, pipeline, asked, folder, console)


def _optimized(
    source: Source, out: Path, settings: Settings, pipeline: Pipeline, asked: Budget | None, folder: Path,
    console: Console | None,
) -> Report:  # fmt: skip
    clock = Clock(console, settings.max_memory)
    text, calib = evaluation_text(source, settings), _hash_of(settings.calib)
    with clock.step("lower"):
        lowered = lower(source)
        edited = edited_module(lowered.module, settings.ir)
    text = text or _random_text(lowered.module, settings)
    with clock.step("check"):
        checked = check(lowered, source, text.ids(), seed=settings.seed)
        lowered = replace(lowered, traced=None)  # the model's own program is large and has been compared
    notes = _notes(pipeline, settings, source, lowered.notes)
    began, steps = time.perf_counter(), runner.run(edited or lowered.module, pipeline.ordered())
    after = steps[-1].after if steps else edited or lowered.module
    foretold = _foretold(lowered.module, after, pipeline, asked, text.scored)
    with staged(out, settings.force) as work:
        with scratch(work) as spool:
            origin = State(lowered.module, lowered.store)
            if settings.speed:
                with clock.step("read", nbytes(origin.module)) as advance:
                    origin = written(origin, spool / "input", advance)
            start = _start(origin, edited)
            context = _context(source, start, settings, text, folder, console)
            final, passes = run_passes(start, pipeline, context, asked, spool, _watcher(settings), clock, steps)
            with clock.step("write", nbytes(final.module)) as advance:
                final = placed(final, work, advance)
                origin = final if final.module == origin.module else origin
            with clock.step("emit"):
                program = emit(final.module, version=effc_version(), pipeline=str(pipeline))
                files = write_texts(work, final.module, program, source.tokenizer)
            if settings.export:
                with clock.step("export"):
                    _export(work, program)
            with clock.step("evaluate", text.scored) as advance:
                quality = qualities(origin, final, text, advance)
            with clock.step("tokens/s"):
                speeds = speeds_of(origin, final, notes) if settings.speed else (None, None)
        exactness = _exactness(pipeline, edited)
        report = Report(
            name=lowered.module.name,
            pipeline=str(pipeline),
            exactness=str(exactness),
            meaning=exactness.meaning(),
            before=measured(origin.module, quality[0], speeds[0]),
            after=measured(final.module, quality[1], speeds[1]),
            passes=passes,
            text=described(text),
            notes=[*notes, *checked],
            seconds=dict(clock.seconds),
            peak_bytes=peak_bytes(),
        )
        planned = foretold.beside(
            report, time.perf_counter() - began + sum(clock.seconds[n] for n in ("lower", "check"))
        )
        report = replace(report, notes=[*report.notes, planned], planned=foretold.json())
        artifact.write_report(work, report.json(), report.html())
        write_manifest(work, _manifest(source, settings, report, text, calib, files, final))
    return report


@contextmanager
def _work(out: Path, settings: Settings, pipeline: Pipeline) -> Iterator[Path]:
    """Where training keeps its work, this run's alone; a folder that was not asked for goes when all is done."""
    folder = work_folder(out, settings)
    used = healing.training(pipeline.passes) or healing.calibrating(pipeline.passes)
    with exclusive(folder) if used else nullcontext():
        yield folder
    if settings.work is None:
        shutil.rmtree(folder, ignore_errors=True)


def plan(source: Source, settings: Settings | None = None) -> Plan:
    """What `optimize` would do; reads no weights and writes nothing but dumps that are asked for."""
    settings = settings or Settings()
    pipeline, asked = _asked(settings)
    lowered = lower(source)
    edited = edited_module(lowered.module, settings.ir)
    start = edited or lowered.module
    steps = runner.run(start, pipeline.ordered(), _watcher(settings))
    after = steps[-1].after if steps else start
    exactness, notes = _exactness(pipeline, edited), _notes(pipeline, settings, source, lowered.notes)
    sizes = side(lowered.module), side(after)
    phases = pipeline.phases(bool(healing.training(pipeline.passes)), bool(healing.calibrating(pipeline.passes)))
    foretold = _foretold(lowered.module, after, pipeline, asked, settings.eval_tokens)
    return Plan(lowered.module.name, str(pipeline), str(exactness), *sizes, steps, notes, phases, foretold)


def _minutes(before: Module, pipeline: Pipeline, asked: Budget | None) -> dict[str, float]:
    """Of training by pass."""
    found = healing.budgets(pipeline.passes, asked)
    return {n: budget.minutes or budget.steps * step_seconds(before) / 60 for n, budget in found.items()}


def _foretold(before: Module, after: Module, pipeline: Pipeline, asked: Budget | None, scored: int) -> Prediction:
    """What a run would take."""
    return predict(before, after, _minutes(before, pipeline, asked), scored, len(healing.calibrating(pipeline.passes)))


def transform(
    module: Module, passes: str, *, dump: Path | None = None, print_ir: bool = False
) -> tuple[Module, list[Step]]:
    """Passes on structure alone."""
    runner.check_module("input", module)
    watch = _watcher(Settings(dump=dump, print_ir=print_ir))
    steps = runner.run(module, Pipeline.parse(passes).ordered(), watch)
    return (steps[-1].after if steps else module), steps


def _asked(settings: Settings) -> tuple[Pipeline, Budget | None]:
    """The pipeline, and the budget for its training where one was given."""
    pipeline = Pipeline.parse(settings.passes)
    for one in pipeline.passes:
        one.check_files()
    asked = Budget.parse(settings.heal) if settings.heal else None
    healing.check_asked(pipeline, asked)
    return pipeline, asked


def work_folder(out: Path, settings: Settings) -> Path:
    """What training leaves there survives an interruption; the same command goes on from it."""
    return settings.work or out.with_name(f".{out.name}.effc-work")


def _context(
    source: Source, start: State, settings: Settings, text: Windows, folder: Path, console: Console | None
) -> Context:
    """For passes that train or calibrate."""
    context = start.module.meta.get("context")
    window = min(TRAIN_WINDOW, context - 1) if isinstance(context, int) and context > 0 else TRAIN_WINDOW
    return Context(
        name="",
        teacher_module=start.module,
        teacher_store=start.store,
        tokenizer=Tokenizer(source.tokenizer, source.name) if source.tokenizer else None,
        heldout=text,
        calib=evaluate.read_text(settings.calib)[0] if settings.calib else None,
        folder=folder,
        seed=settings.seed,
        window=window,
        console=console,
    )


def _watcher(settings: Settings) -> Watch:
    watches = [runner.dumper(settings.dump)] if settings.dump else []
    return runner.both(*watches, *([runner.printer(sys.stderr.write)] if settings.print_ir else []))


def _exactness(pipeline: Pipeline, edited: Module | None) -> Exactness:
    """That of the pipeline; a module edited by hand promises nothing."""
    return Exactness.LOSSY if edited else pipeline.exactness()


def _start(origin: State, edited: Module | None) -> State:
    """What the passes begin with: the checkpoint's arrays, coded where an edited module says so."""
    if edited is None:
        return origin
    made = coded(origin.module, edited, origin.store, "mse")
    return State(edited, origin.store.replace(made, edited))


def _export(work: Path, program: str) -> None:
    """Programs for one sequence, as long as the context allows and at most EXPORT_TOKENS."""
    from effc.backend.to_stablehlo import export_programs  # jax.export and what it needs, for who asks for it

    loaded = load_program(program)
    room = min(loaded.context or EXPORT_TOKENS, EXPORT_TOKENS)
    weights = load_params(work / WEIGHTS, loaded.params)
    export_programs(loaded, weights, work / "stablehlo", prompt=min(128, room), capacity=room)


# ---- numbers


def evaluation_text(source: Source, settings: Settings) -> Windows | None:
    """The text to evaluate on as tokens; None where the model has no tokenizer to make them."""
    if source.tokenizer is None:
        if settings.eval_text:
            raise EffcError(
                f"{source.name}: no tokenizer, so {settings.eval_text} cannot be evaluated; "
                "want tokenizer.json beside the weights"
            )
        return None
    text, name = evaluate.read_text(settings.eval_text)
    window = min(settings.window, source.context or settings.window)
    tokenizer = Tokenizer(source.tokenizer, source.name)
    return evaluate.windows(tokenizer, text, window=window, tokens=settings.eval_tokens, source=name)


def _random_text(module: Module, settings: Settings) -> Windows:
    context = module.meta.get("context", settings.window)
    window = min(settings.window, context) if isinstance(context, int) else settings.window
    vocab = evaluate.vocab_of(module)
    return evaluate.random_windows(vocab, window=window, tokens=settings.eval_tokens, seed=settings.seed)


def qualities(origin: State, final: State, text: Windows, advance: Any) -> tuple[Quality, Quality]:
    """Of both: apart where both are on disk, else here."""
    if origin.files and final.files:
        return compare_apart(origin.files[0].parent, final.files[0].parent, text, advance)
    return evaluate.compare(origin.side, final.side, text, advance)


def speeds_of(origin: State, final: State, notes: list[str]) -> tuple[Speed | None, Speed | None]:
    """Of both, one process after the other; measured once where nothing changed."""
    after = speed.measure(final.module, final.files[0].parent / WEIGHTS)
    if origin.module == final.module:
        return after, after
    why = speed.too_large(origin.module, 4 * elements(origin.module))
    if why:
        notes.append(f"tokens/s of the input model is not measured: {why}")
        return None, after
    return speed.measure(origin.module, origin.files[0].parent / WEIGHTS), after


def measured(module: Module, quality: Quality, speed: Speed | None) -> Side:
    sizes = side(module)
    return Side(sizes.parameters, sizes.nbytes, sizes.token_bytes, quality, speed)


def described(text: Windows) -> str:
    count, length = len(text.chunks), text.chunks[0].shape[1]
    return f"{text.source}: {text.scored} tokens in {count} window{'s' * (count > 1)} of {length}"


def _notes(pipeline: Pipeline, settings: Settings, source: Source, lowering: Sequence[object]) -> list[str]:
    """What a reader should know that no number says."""
    notes = [pipeline.order_note()] if pipeline.order_note() else []
    if source.tokenizer is None:
        notes.append("the model has no tokenizer: only the comparison with the input model means something")
    asked = Budget.parse(settings.heal) if settings.heal else None
    notes += healing.notes(pipeline, asked)
    reading = [one for one in pipeline.passes if one.reads_text() or one.calibrates() or one.training_minutes()]
    if settings.calib and not reading:
        notes.append(f"{settings.calib.name} is not used: no pass of this pipeline calibrates")
    if settings.ir:
        notes.append(f"the IR is that of {settings.ir.name}, edited by hand")
    return [*notes, *map(str, lowering)]


def _hash_of(file: Path | None) -> str:
    """sha256 of a text that may have been given."""
    return hashlib.sha256(evaluate.read_text(file)[0].encode()).hexdigest() if file else ""


def _decoding(module: Module) -> Mapping[str, Any]:
    """The strategy and its settings, what is certified included; functions by name."""
    if module.decode is None:
        return {}
    attrs = {name: value.name if isinstance(value, Ref) else value for name, value in module.decode.attrs.items()}
    return {"strategy": module.decode.strategy, **attrs}


def _manifest(
    source: Source,
    settings: Settings,
    report: Report,
    text: Windows,
    calib: str,
    files: list[str],
    final: State,
) -> Mapping[str, Any]:
    """What the artifact is and how it was made."""
    return {
        "name": report.name,
        "source": {"name": source.name, **source.meta},
        "pipeline": report.pipeline,
        "decode": _decoding(final.module),
        "seed": settings.seed,
        "exactness": report.exactness,
        "evaluated_on": {"text": text.source, "sha256": text.sha256, "tokens": text.scored},
        "calibrated_on": calib or None,
        "metrics": {"before": report.before.json(), "after": report.after.json()},
        "tokenizer": files,
        "probe": evaluate.fingerprint(final.side, text.chunks[0][:, :PROBE_TOKENS]),
    }
