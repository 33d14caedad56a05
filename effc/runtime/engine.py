"""A program with its weights: compiled prefill and decode steps over a cache that is updated in place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effc.errors import EffcError, nearest
from effc.runtime.answering import answers_of
from effc.runtime.cache import Cache, cache_shapes, empty_cache, kept_as
from effc.runtime.drafters import speculation_of
from effc.runtime.drafting import Choice
from effc.runtime.kernels import on_tpu
from effc.runtime.kernels.region.native import has_packed, packed, regions
from effc.runtime.leaving import counted, exits_of
from effc.runtime.program import Program
from effc.runtime.sampling import Numbers, Sampling, choose, row_keys
from effc.runtime.speculate import rolled_back

ROUND = 128
"""Caches hold a multiple of this many tokens, so that few shapes are compiled."""

BUCKETS = (16, 32, 64, 128, 256, 512)
"""Prompts are padded to one of these; longer ones go in pieces of the last."""

DONE = -1
"""Stands for no token where a sequence has ended."""

_CACHE_OPTION = "jax_compilation_cache_dir"

State = dict[str, Any]
"""Between chunks of decoding: cache; token, done and row [b]; seed; seen bool[b,V] or None."""


@dataclass(frozen=True)
class How:
    """How tokens are chosen and which ones, stops[n], end a text."""

    sampling: Sampling
    numbers: Numbers
    stops: jax.Array
    exits: float | None = None
    """Threshold of early exits; None: the certified one, for plain greedy text."""
    alpha: float | None = None
    """Of a cascade's rule; None: the certified one, likewise, or the one set by hand."""

    @property
    def greedy(self) -> bool:
        return self.sampling.greedy

    @property
    def filters(self) -> frozenset[str]:
        return self.sampling.filters

    @property
    def plain(self) -> bool:
        """Whether it is the likeliest token, whatever was said before."""
        return self.greedy and not self.filters

    @property
    def choice(self) -> Choice:
        """What of it is compiled in."""
        return Choice(self.greedy, self.filters)


CACHES = {"f32": "float", "f16": "f16", "i8": "i8", "i4": "i4"}
"""How keys and values may be kept where the program leaves it open, f32 being as they are computed."""


class Engine:
    """program, params, and eos: ids of tokens that end a text.

    cache: one of CACHES; None keeps keys and values as f16 where native code runs quantized weights, which rounds
    activations more than that, and as computed elsewhere.
    """

    def __init__(self, program: Program, params: Any, eos: tuple[int, ...] = (), cache: str | None = None):
        keep_compiled()
        if cache is not None and cache not in CACHES:
            raise EffcError(f"cache: '{cache}', want one of {', '.join(CACHES)}{nearest(cache, CACHES)}")
        self.program, self.params, self.eos = program, packed(params), eos
        self.cache = cache or ("f16" if has_packed(self.params) else "f32")
        self.context, self.speculation = program.context, speculation_of(program, params)
        self.exits, self.answers = exits_of(program), answers_of(program)
        self.forward = jax.jit(regions(program.forward))
        self.compile_seconds = 0.0
        self._shapes: dict[int, Cache] = {}
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @cached_property
    def small(self) -> Engine:
        """The model that answers first, where there is one; it shares the weights."""
        assert self.answers is not None
        return Engine(self.answers.program(self.program, self.params), self.params, self.eos, self.cache)

    def spelled(self, tokens: jax.Array) -> jax.Array:
        """f32[b,t-1]: log-probability of each of tokens[b,t] but the first after those before it."""
        return self._ready("spelled", partial(_spelled, self.program.extend), (), self.params, tokens)(
            self.params, tokens
        )

    @property
    def spare(self) -> int:
        """Rows of a cache that drafts may take past the last token."""
        return self.speculation.widths.most + 1 if self.speculation else 0

    def read(self, tokens: jax.Array, cache: Cache, valid: jax.Array) -> tuple[jax.Array, jax.Array | None, Cache]:
        """Logits [b,1,V] after the last valid token, features [b,t,d] where a drafter wants them, and the cache."""
        if not (self.speculation and self.speculation.features):
            logits, cache = self.extend(tokens, cache, valid)
            return logits, None, cache
        call = partial(_read, self.speculation.verify)
        run = self._ready("read", call, 2, self.params, tokens, cache, valid)
        return run(self.params, tokens, cache, valid)

    def empty(self, batch: int, tokens: int) -> Cache:
        """A cache with room for at least this many tokens in each sequence."""
        return empty_cache(self.shapes(batch), -(-tokens // ROUND) * ROUND)

    def shapes(self, batch: int) -> Cache:
        """Of a cache of one token a sequence."""
        if batch not in self._shapes:
            start = time.perf_counter()
            shapes = cache_shapes(self.program.extend, self.params, batch)
            self._shapes[batch] = kept_as(shapes, CACHES[self.cache])
            self.compile_seconds += time.perf_counter() - start
        return self._shapes[batch]

    def extend(self, tokens: jax.Array, cache: Cache, valid: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Logits and the cache grown by these tokens; the cache given is used up."""
        run = self._ready("extend", self.program.extend, 2, self.params, tokens, cache, valid)
        return run(self.params, tokens, cache, valid)

    def choose(self, logits: jax.Array, state: State, how: How) -> State:
        """The state with the tokens that follow logits[b,1,V]."""
        call = partial(_choose, greedy=how.greedy, filters=how.filters)
        args = (logits, state, how.numbers, how.stops)
        return self._ready(("choose", how.greedy, how.filters), call, 1, *args)(*args)

    def begin(
        self, state: State, how: How, prompts: Sequence[Sequence[int]], new: int, vocab: int,
        features: jax.Array | None,
    ) -> State:  # fmt: skip
        """The state after the first token, with the first drafts where the program has a drafter."""
        if self.speculation is None:
            return self.exits.begin(self.params, state, new, how.exits, how.plain) if self.exits else state
        speculation = self.speculation.asking(how.alpha, how.exits)
        state = speculation.begin(self.params, state, prompts, new, vocab, features, how.choice)
        args = (self.params, state, how.numbers)
        call = self.speculation.loop(how.choice, len(prompts)).first
        return self._ready(("first", how.choice), call, 1, *args)(*args)

    def decode(self, state: State, how: How, limit: int, chunk: int) -> tuple[State, jax.Array]:
        """The state after up to limit <= chunk more tokens a row, and those i32[b,n], DONE where none.

        With a drafter rounds go on until one row has `chunk` tokens more; n is `chunk` and what a draft may add.
        """
        if self.speculation and "proposal" in state:
            loop = self.speculation.loop(how.choice, state["token"].shape[0])
            call = partial(loop, chunk=chunk)
            args = (self.params, state, how.numbers, how.stops)
            return self._ready(("rounds", chunk, how.choice), call, 1, *args)(*args)
        options = {"chunk": chunk, "greedy": how.greedy, "filters": how.filters}
        advance = partial(_advance, self.program.extend)
        if self.exits and "exits" in state:  # a CPU has the logits anyway, and takes their arg-max in a native region
            advance = partial(self.exits.advance, likeliest=how.plain and on_tpu.wanted())
        call = partial(_decode, advance, **options)
        args = (self.params, state, how.numbers, how.stops, jnp.int32(limit))
        return self._ready(("decode", *options.values()), call, 1, *args)(*args)

    def _ready(
        self, what: Any, call: Callable[..., Any], donate: int | tuple[int, ...], *args: Any
    ) -> Callable[..., Any]:
        """`call` compiled for arguments like these; time spent is counted apart."""
        leaves, tree = jax.tree.flatten(args[1:] if args[0] is self.params else args)
        key = (what, tuple((x.shape, x.dtype) for x in leaves), tree)
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = jax.jit(regions(call), donate_argnums=donate).lower(*args).compile()
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[key]


def _read(
    verify: Callable[..., Any], params: Any, tokens: jax.Array, cache: Cache, valid: jax.Array
) -> tuple[jax.Array, jax.Array, Cache]:
    """`verify` on padded tokens: the caches' lengths are set afterwards, since it gives all rows."""
    logits, features, after = verify(params, tokens, cache)
    index = jnp.maximum(valid - 1, 0)[:, None, None]
    last = jnp.take_along_axis(logits, index, axis=1)
    return last, features, rolled_back(after, cache.lengths + valid)


def _spelled(extend: Callable[..., Any], params: Any, tokens: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(extend(params, tokens)[0][:, :-1].astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[:, :, 0]


def _choose(
    said: jax.Array, state: State, numbers: Numbers, stops: jax.Array, *, greedy: bool, filters: frozenset[str]
) -> State:
    """By logits [b,1,V]; or what is said is tokens [b,1] already."""
    keys = row_keys(state["seed"], state["row"], state["cache"].lengths)
    token = said[:, -1]
    if said.ndim > 2:
        token = choose(token, state["seen"], keys, numbers, greedy=greedy, filters=filters)
    seen = state["seen"]
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return {**state, "token": token, "seen": seen, "done": state["done"] | is_stop(token, stops)}


def _advance(extend: Callable[..., Any], params: Any, state: State) -> tuple[jax.Array, State]:
    """Logits [b,1,V] after the token chosen last."""
    logits, cache = extend(params, state["token"][:, None], state["cache"])
    return logits, {**state, "cache": cache}


def _decode(
    advance: Callable[..., Any], params: Any, state: State, numbers: Numbers, stops: jax.Array,
    limit: jax.Array, *, chunk: int, greedy: bool, filters: frozenset[str],
) -> tuple[State, jax.Array]:  # fmt: skip
    """Each turn takes in the token chosen last and chooses the next; ends early when all rows are done."""

    def unfinished(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        i, state, _ = carry
        return (i < limit) & ~jnp.all(state["done"])

    def turn(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
        i, state, out = carry
        said, state = advance(params, state)
        chosen = _choose(said, state, numbers, stops, greedy=greedy, filters=filters)
        state = counted(chosen, ~state["done"])  # after the choice: a native region goes on up to there
        shown = jnp.where(state["done"], DONE, state["token"])
        return i + 1, state, lax.dynamic_update_slice(out, shown[:, None], (0, i))

    out = jnp.full((state["token"].shape[0], chunk), DONE, jnp.int32)
    _, state, out = lax.while_loop(unfinished, turn, (jnp.int32(0), state, out))
    return state, out


def is_stop(token: jax.Array, stops: jax.Array) -> jax.Array:
    """bool[b]: whether each token is one of stops[n]."""
    return jnp.any(token[:, None] == stops[None, :], axis=1)


def pieces(longest: int, context: int | None) -> list[tuple[int, int]]:
    """(start, size) of the calls that take in a prompt: whole buckets, the last as small as will do."""
    out: list[tuple[int, int]] = []
    start = 0
    while start < longest:
        left = longest - start
        size = next((bucket for bucket in BUCKETS if bucket >= left), BUCKETS[-1])
        # Padding must not run past a table of positions: what lies there may be NaN.
        out.append((start, size if context is None else min(size, context - start)))
        start += out[-1][1]
    return out


def check_length(prompt: int, new: int, context: int | None, where: str = "generate") -> None:
    """Refuses what does not fit: caches and tables of positions would clamp silently."""
    if prompt < 1:
        raise EffcError(f"{where}: a prompt has no tokens, want at least one")
    if new < 1:
        raise EffcError(f"{where}: max_new_tokens is {new}, want at least 1")
    if context is not None and prompt + new > context:
        asked = f"{prompt} prompt tokens and {new} new ones"
        raise EffcError(f"{where}: {asked} are {prompt + new}, want at most the context of {context}")


def keep_compiled() -> None:
    """Have JAX keep compiled programs on disk, where the user has not said otherwise."""
    chosen = getattr(jax.config, _CACHE_OPTION, None)
    if chosen is not None or "JAX_ENABLE_COMPILATION_CACHE" in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update(_CACHE_OPTION, str(Path(base) / "effc" / "jax"))
