"""What `effc eval` and `effc bench` measure of opened models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from effc import evaluate
from effc.errors import EffcError
from effc.evaluate import Quality, Windows, vocab_of
from effc.generator import engine_of
from effc.ir.core import all_ops
from effc.opened import Opened
from effc.plan import token_bytes
from effc.runtime.cache import Cache, Rows
from effc.runtime.engine import Engine
from effc.runtime.generate import Drafted, Result, generate
from effc.runtime.kernels.region.bandwidth import bandwidth
from effc.runtime.kernels.region.native import regions
from effc.weights import nbytes

PROMPT, NEW = 512, 128
"""What llama-bench measures; less where the model's context is shorter."""


# -- quality ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Quality on a text; with `against`, first that of the other model."""

    text: str
    tokens: int
    rows: dict[str, Quality]

    def json(self) -> dict[str, Any]:
        models = {name: quality.json() for name, quality in self.rows.items()}
        return {"text": self.text, "tokens": self.tokens, "models": models}

    def table(self) -> Table:
        """A rich renderable."""
        table = Table(caption=f"{self.tokens} tokens of {self.text}", caption_justify="left")
        table.add_column("model")
        for title in ("perplexity", "bits a byte", "KL, nats a token", "same likeliest token"):
            table.add_column(title, justify="right")
        for name, q in self.rows.items():
            cells = (_number(q.bits_per_byte, ".4f"), _number(q.kl, ".5f"), _number(q.top1, ".2%"))
            table.add_row(name, f"{q.perplexity:.3f}", *cells)
        return table


def evaluation(
    model: Opened,
    file: Path | None,
    other: Opened | None = None,
    *,
    tokens: int = 4096,
    window: int = evaluate.WINDOW,
    console: Console | None = None,
) -> Evaluation:
    """Perplexity and bits a byte of `model`, and its distance from `other` where there is one."""
    text = text_windows(model, file, tokens, window)
    if other and vocab_of(other.module) != vocab_of(model.module):
        raise EffcError(f"{other.path}: {vocab_of(other.module)} tokens, want {vocab_of(model.module)} as {model.path}")
    with Progress(console=console, transient=True, disable=console is None) as bar:
        task = bar.add_task("evaluate", total=text.scored)
        rows = _qualities(model, other, text, lambda done: bar.advance(task, done))
    return Evaluation(text.source, text.scored, rows)


def _qualities(model: Opened, other: Opened | None, text: Windows, progress: Any) -> dict[str, Quality]:
    side = (model.module, model.store)
    if other is None:
        return {str(model.path): evaluate.quality(side, text, progress)}
    first, second = evaluate.compare((other.module, other.store), side, text, progress)
    return {f"{other.path} (against)": first, str(model.path): second}


def text_windows(model: Opened, file: Path | None, tokens: int, window: int) -> Windows:
    """The start of a text as the model's own tokens."""
    text, source = evaluate.read_text(file)
    window = min(window, context_of(model) or window)
    return evaluate.windows(model.tokenizer(), text, window=window, tokens=tokens, source=source)


def context_of(model: Opened) -> int | None:
    """The most positions a sequence may have; None where nothing limits it."""
    context = model.module.meta.get("context")
    return context if isinstance(context, int) and context > 0 else None


# -- speed --------------------------------------------------------------------------------------------------


@dataclass
class Timings:
    """Tokens a second of each run, all sequences together; bytes of weights read for a step, and of one cache.

    cache: how keys and values are kept.
    """

    name: str
    weight_bytes: int
    token_bytes: int
    cache: str = ""
    cache_bytes: int = 0
    pp: list[float] = field(default_factory=list[float])
    tg: list[float] = field(default_factory=list[float])
    draft: Drafted | None = None
    """What drafts came to in the last run, where the model has a drafter."""

    def bandwidth(self, batch: int) -> float:
        """Bytes a second while generating: weights once a step, each sequence's cache up to its token."""
        return (self.token_bytes / batch + self.cache_bytes) * statistics.mean(self.tg)

    def json(self) -> dict[str, Any]:
        """Means, spreads (standard deviations), and every run."""
        return asdict(self) | {
            "draft": self.draft.json() if self.draft else None,
            "pp_mean": statistics.mean(self.pp),
            "pp_spread": statistics.pstdev(self.pp),
            "tg_mean": statistics.mean(self.tg),
            "tg_spread": statistics.pstdev(self.tg),
        }


@dataclass(frozen=True)
class Benchmark:
    """Models run in turn, so that what disturbs the machine disturbs all of them."""

    prompt: int
    new: int
    batch: int
    runs: int
    models: list[Timings]
    stream: list[float | None]
    curves: list[dict[int, float]]

    def json(self) -> dict[str, Any]:
        sizes = {"prompt": self.prompt, "new": self.new, "batch": self.batch, "runs": self.runs}
        models = [self._json(model, curve) for model, curve in zip(self.models, self.curves)]
        limit = None if self.limit is None else self.limit / 1e9
        return sizes | {"models": models, "ratios": self.ratios(), "limit_gb_per_second": limit}

    def _json(self, model: Timings, curve: dict[int, float]) -> dict[str, Any]:
        speeds = {"gb_per_second": self._bandwidth(model), "share_of_limit": self.share(model)}
        return model.json() | speeds | {"verify": {str(k): ratio for k, ratio in curve.items()}}

    @property
    def limit(self) -> float | None:
        """Bytes a second that this machine reads, measured between the runs; None without native code."""
        known = [speed for speed in self.stream if speed is not None]
        return statistics.median(known) if known else None

    def share(self, model: Timings) -> float | None:
        """Of that limit, what generating reaches."""
        return None if self.limit is None else self._bandwidth(model) * 1e9 / self.limit

    def ratios(self) -> dict[str, float]:
        """The first model's speed over the second's, run by run, in the middle."""
        if len(self.models) < 2:
            return {}
        one, two = self.models
        return {kind: _ratio(getattr(one, kind), getattr(two, kind)) for kind in ("pp", "tg")}

    def table(self) -> Table:
        """A rich renderable."""
        ratios = "".join(f", {kind} x{value:.2f}" for kind, value in self.ratios().items())
        what = f"{self.batch} sequence{'s' * (self.batch > 1)}"
        limit = "" if self.limit is None else f"; memory is read at {self.limit / 1e9:.1f} GB/s"
        caption = f"tokens/s of {what}, mean ± spread of {self.runs} runs{ratios}{limit}"
        for model, curve in zip(self.models, self.curves):
            times = ", ".join(f"{k}: {ratio:.2f}" for k, ratio in curve.items())
            caption += f"\n{model.name}: time of k tokens over that of one, {times}"
            caption += f"\n{model.name}: {model.draft}" if model.draft else ""
        table = Table(caption=caption, caption_justify="left")
        table.add_column("model")
        for title in (f"pp{self.prompt}", f"tg{self.new}", "weights MB", "MB a token", "cache MB", "GB/s", "of limit"):
            table.add_column(title, justify="right")
        for m in self.models:
            sizes = (f"{m.weight_bytes / 1e6:.1f}", f"{m.token_bytes / 1e6:.1f}")
            sizes += (f"{m.cache_bytes / 1e6:.1f} {m.cache}", f"{self._bandwidth(m):.2f}")
            table.add_row(m.name, _spread(m.pp), _spread(m.tg), *sizes, _number(self.share(m), ".0%"))
        return table

    def _bandwidth(self, model: Timings) -> float:
        """GB/s read: weights once a step, whatever the batch, and the rows of every cache."""
        return model.bandwidth(self.batch) / 1e9


def benchmark(
    models: Sequence[Opened],
    *,
    prompt: int | None = None,
    new: int | None = None,
    runs: int = 5,
    batch: int = 1,
    cache: str | None = None,
    console: Console | None = None,
) -> Benchmark:
    """Every model once to warm up, then `runs` times in turn; random prompts, greedy, nothing ends early."""
    prompt, new = _sizes(models, prompt, new)
    engines = [engine_of(model, cache=cache) for model in models]
    stream = list[float | None]()
    timings = [Timings(str(m.path), nbytes(m.module), token_bytes(m.module)) for m in models]
    with Progress(console=console, transient=True, disable=console is None) as bar:
        for number in bar.track(range(runs + 1), description="bench"):
            for model, engine, timing in zip(models, engines, timings):
                pp, tg, timing.draft = _run(engine, vocab_of(model.module), prompt, new, batch)
                timing.cache, timing.cache_bytes = engine.cache, cache_read(model, engine, prompt + new // 2)
                stream.append(bandwidth(timing.token_bytes + timing.cache_bytes))
                if number:
                    timing.pp.append(pp)
                    timing.tg.append(tg)
    curves = [verification(engine, prompt) for engine in engines]
    return Benchmark(prompt, new, batch, runs, timings, stream, curves)


def cache_read(model: Opened, engine: Engine, length: int) -> int:
    """Bytes of one sequence's cache that a token after `length` others reads; of windows the least counts."""
    windows = [op.attrs.get("window", 0) for _, op in all_ops(model.module) if op.kind == "attention"]
    rows = min([length, *(window for window in windows if isinstance(window, int) and window > 0)])
    kept = [x for entry in engine.shapes(1).entries if isinstance(entry, Rows) for x in entry.values]
    return sum(x.size // x.shape[1] * x.dtype.itemsize * rows for x in kept if x.ndim > 1)


def verification(engine: Engine, length: int = 32, runs: int = 7) -> dict[int, float]:
    """What taking in k tokens at once costs over taking in one, k = 1, 2, 4, 8, after `length` tokens; medians."""
    room = PROMPT if engine.context is None else engine.context - length
    calls = {k: _calls(engine, k, length) for k in (1, 2, 4, 8) if k <= room}
    times = {k: list[float]() for k in calls}
    for _ in range(runs):  # in turn, so that what disturbs the machine disturbs all
        for k, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[k].append(time.perf_counter() - start)
    return {k: statistics.median(seconds) / statistics.median(times[1]) for k, seconds in times.items()}


REPEATED = 10
"""Calls that one timing holds: they run in one program, as speculative decoding runs them."""


def _calls(engine: Engine, count: int, length: int) -> Callable[[], Any]:
    """A compiled function that extends by `count` tokens REPEATED times, from the same length each time."""
    tokens, lengths = jnp.ones((1, count), jnp.int32), jnp.asarray([length], jnp.int32)
    entries = engine.empty(1, length + count).entries

    def loop(params: Any, tokens: jax.Array, lengths: jax.Array, entries: Any) -> Any:
        def turn(_: Any, carry: Any) -> Any:
            tokens, entries = carry
            logits, cache = engine.program.extend(params, tokens, Cache(lengths, entries))
            # What is read next depends on every row of logits: none may be left out.
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache.entries

        return jax.lax.fori_loop(0, REPEATED, turn, (tokens, entries))

    compiled = jax.jit(regions(loop)).lower(engine.params, tokens, lengths, entries).compile()
    jax.block_until_ready(compiled(engine.params, tokens, lengths, entries))
    return lambda: compiled(engine.params, tokens, lengths, entries)


def _sizes(models: Sequence[Opened], prompt: int | None, new: int | None) -> tuple[int, int]:
    """As asked; else llama-bench's, cut to the shortest context."""
    context = min((context_of(model) or PROMPT + NEW for model in models), default=PROMPT + NEW)
    new = new or min(NEW, max(2, context // 4))
    prompt = prompt or min(PROMPT, context - new)
    if new < 2:
        raise EffcError("bench: -n 1, want 2 or more: the first token comes with the prompt")
    return prompt, new


def _run(engine: Engine, vocab: int, prompt: int, new: int, batch: int) -> tuple[float, float, Drafted | None]:
    tokens = np.random.default_rng(0).integers(0, vocab, (batch, prompt)).tolist()
    result: Result = generate(engine, tokens, max_new_tokens=new, stop_ids=())
    return result.stats.prefill_rate, result.stats.decode_rate, result.stats.draft


def _ratio(one: Sequence[float], two: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, two))


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
