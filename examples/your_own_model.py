"""Compile a model of your own, straight from memory: any Linen or NNX module that maps tokens to logits.

python examples/your_own_model.py out
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp

import effc


class Tiny(nn.Module):
    """Written as for training: no cache, no decode flag."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(64, 32)
        x = embed(tokens)
        for _ in range(2):
            h = nn.LayerNorm()(x)
            mask = nn.make_causal_mask(tokens)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, mask=mask)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def main(out: str) -> None:
    module = Tiny()
    params = module.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    source = effc.load(module, params, name="tiny", context=128)
    report = effc.optimize(source, out, "quant8", speed=False)
    print(f"{report.before.nbytes} -> {report.after.nbytes} bytes, KL {report.after.quality.kl:.2g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
