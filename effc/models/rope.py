"""Rotary position embedding in Hugging Face's half-split layout, with the published length scalings."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """Angles of position p are p * inv_freq; cos and sin are multiplied by scale (1 but for yarn)."""

    inv_freq: tuple[float, ...]
    scale: float = 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,T,H,D] rotated by its position on axis 1; computed in float32."""
        positions = jnp.arange(x.shape[1], dtype=jnp.float32)
        angles = jnp.outer(positions, jnp.array(self.inv_freq, jnp.float32))  # [T,D/2]
        cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
        if self.scale != 1:
            cos, sin = cos * self.scale, sin * self.scale
        lo, hi = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1).astype(x.dtype)


def plain(head_dim: int, theta: float) -> Rope:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return _rope(np.float32(1) / np.float32(theta) ** exponents)


def linear(rope: Rope, factor: float) -> Rope:
    """Positions divided by factor."""
    return replace(rope, inv_freq=tuple(f / factor for f in rope.inv_freq))


def divided(rope: Rope, factors: np.ndarray) -> Rope:
    """One divisor a frequency, as GGUF files carry in rope_freqs.weight."""
    return replace(rope, inv_freq=_rope(np.array(rope.inv_freq, np.float32) / factors).inv_freq)


def llama3(rope: Rope, factor: float, low: float, high: float, original: int) -> Rope:
    """Llama 3.1: long waves divided by factor, short ones kept, a linear blend between."""
    freq = np.array(rope.inv_freq, np.float64)
    wave = 2 * math.pi / freq
    blend = np.clip((original / wave - low) / (high - low), 0, 1)
    return replace(rope, inv_freq=_rope(freq * blend + freq / factor * (1 - blend)).inv_freq)


def yarn(
    rope: Rope,
    theta: float,
    factor: float,
    original: int,
    *,
    beta_fast: float = 32,
    beta_slow: float = 1,
    scale: float | None = None,
    truncate: bool = True,
) -> Rope:
    """arXiv 2309.00071: above beta_fast turns in the original length kept, below beta_slow divided."""
    half = len(rope.inv_freq)

    def dim_of(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dim_of(beta_fast), dim_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    high += 0.001 * (low == high)
    keep = 1 - np.clip((np.arange(half) - low) / (high - low), 0, 1)
    freq = np.array(rope.inv_freq, np.float64)
    if scale is None:
        scale = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return replace(_rope(freq * keep + freq / factor * (1 - keep)), scale=scale)


def _rope(freq: np.ndarray) -> Rope:
    return Rope(tuple(float(f) for f in freq.astype(np.float32)))
