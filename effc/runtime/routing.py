"""Which tokens go on to the next depth of a recursion, and what routers learn from.

Expert-choice: a router a depth scores tokens, s = x . w[depth-1]; a token goes on where sigmoid(s) > 0.5 and it
was on before. In training a depth takes the best share of them instead (which looks ahead, and so is no way to
decode), and the scores learn to tell that choice. Token-choice: one router of `times` rows says at the start
how many runs a token gets; ties go to the deeper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax


@dataclass
class Training:
    """What a training step tells the routers, capacity (f32[] a depth, by now), and what it hears of them.

    losses: f32[] a depth, of the auxiliary loss; shares: f32[] a depth, tokens that were on.
    """

    capacity: Sequence[jax.Array]
    losses: list[jax.Array] = field(default_factory=list[jax.Array])
    shares: list[jax.Array] = field(default_factory=list[jax.Array])


_TRAINING: ContextVar[Training | None] = ContextVar("training", default=None)


def training() -> Training | None:
    """The training step that is being traced, if one is."""
    return _TRAINING.get()


@contextmanager
def train(capacity: Sequence[jax.Array]) -> Iterator[Training]:
    """Routers choose as they learn to, in what is traced inside."""
    told = Training(capacity)
    token = _TRAINING.set(told)
    try:
        yield told
    finally:
        _TRAINING.reset(token)


@dataclass(frozen=True)
class Choice:
    """on bool[b,t]: tokens that go on; gate f32[b,t]: how far they move, None where that is all the way."""

    on: jax.Array
    gate: jax.Array | None = None


@dataclass(frozen=True)
class Routing:
    """w [times-1,d] (expert) or [times,d] (token); capacity a depth; gates alpha*sigmoid(s), or 1 where alpha is 0."""

    w: jax.Array
    select: str
    capacity: tuple[float, ...]
    alpha: float
    learning: Training | None = None

    def choose(self, depth: int, start: jax.Array, x: jax.Array, on: jax.Array) -> Choice:
        """Of the tokens that were on, those that run `depth` (1 or more); start is x before depth 0."""
        return self._token(depth, start, on) if self.select == "token" else self._expert(depth, x, on)

    def _expert(self, depth: int, x: jax.Array, on: jax.Array) -> Choice:
        s = scores(x, self.w[depth - 1 : depth])[..., 0]
        if self.learning is not None:
            chosen = best(s, on, self.learning.capacity[depth])
            self._note(_told(s, chosen, on), chosen, on)
            return Choice(chosen, self._gate(jax.nn.sigmoid(s)))
        wanted = on if self.capacity[depth] >= 1 else on & (s > 0)
        return Choice(wanted, self.alpha * jax.nn.sigmoid(s) if self.alpha else None)

    def _token(self, depth: int, start: jax.Array, on: jax.Array) -> Choice:
        z = scores(start, self.w)
        times = z.shape[-1]
        runs = times - jnp.argmax(z[..., ::-1], axis=-1)  # 1 to times
        p = jnp.take_along_axis(jax.nn.softmax(z, axis=-1), (runs - 1)[..., None], axis=-1)[..., 0]
        chosen = on & (runs > depth)
        if self.learning is None:
            return Choice(chosen, self.alpha * p if self.alpha else None)
        loss = balance(z, runs - 1, on) + 1e-3 * _mean(jnp.square(jax.nn.logsumexp(z, axis=-1)), on)
        self._note(loss if depth == 1 else jnp.zeros(()), chosen, on)
        return Choice(chosen, self._gate(p))

    def _gate(self, p: jax.Array) -> jax.Array:
        """In training: alpha p; where that is not used 1, with the gradient of p passed through."""
        return self.alpha * p if self.alpha else 1 + p - lax.stop_gradient(p)

    def _note(self, loss: jax.Array, chosen: jax.Array, on: jax.Array) -> None:
        assert self.learning is not None
        self.learning.losses.append(loss)
        self.learning.shares.append(jnp.mean(chosen.astype(jnp.float32)))


def scores(x: jax.Array, w: jax.Array) -> jax.Array:
    """f32[b,t,n] of x[b,t,d] and w[n,d]."""
    return jnp.einsum("btd,nd->btn", x.astype(jnp.float32), w.astype(jnp.float32))


def best(s: jax.Array, on: jax.Array, share: jax.Array | float) -> jax.Array:
    """bool[b,t]: of the tokens that are on the ceil(share*t) with the highest s[b,t]."""
    kept = jnp.where(on, s, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-kept, axis=-1, stable=True), axis=-1)
    return on & (rank < jnp.ceil(share * s.shape[-1] - 1e-4))


def admitted(wanted: jax.Array, before: jax.Array, positions: jax.Array, share: float, slack: int) -> jax.Array:
    """bool[b,t]: of the wanted those that find room: at position p a depth holds at most share*(p+1) + slack.

    before i32[b] are on already; earlier tokens come first, so what is admitted does not depend on later ones.
    """
    room = jnp.ceil(share * (positions + 1).astype(jnp.float32)).astype(jnp.int32) + slack

    def one(held: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        want, limit = token
        on = want & (held < limit)
        return held + on, on

    return lax.scan(one, before, (wanted.T, room.T))[1].T


def _told(s: jax.Array, chosen: jax.Array, on: jax.Array) -> jax.Array:
    """Binary cross-entropy of the scores against the choice made by rank, over the tokens there were to choose of."""
    target = chosen.astype(s.dtype)
    return _mean(jax.nn.softplus(s) - target * s, on)


def balance(z: jax.Array, chosen: jax.Array, on: jax.Array) -> jax.Array:
    """N sum f_i P_i: shares of tokens by choice times mean probability of it; 1 where all are alike."""
    n, p = z.shape[-1], jax.nn.softmax(z, axis=-1)
    f = [_mean((chosen == i).astype(p.dtype), on) for i in range(n)]
    return n * sum((f[i] * _mean(p[..., i], on) for i in range(n)), jnp.zeros(()))


def _mean(values: jax.Array, on: jax.Array) -> jax.Array:
    kept = on.astype(values.dtype)
    return jnp.sum(values * kept) / jnp.maximum(jnp.sum(kept), 1)
