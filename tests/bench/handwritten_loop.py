"""Emitted program against a decode loop written by hand, on the same weights in one process.

    python tests/bench/handwritten_loop.py ARTIFACT [--tokens 64] [--rounds 7]

ARTIFACT is a Llama-like one in f32 without passes. The two take turns, so that whatever else the
machine does meets both; the ratio of their medians is what counts, and the tokens must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effc.artifact import MODEL, WEIGHTS, read_module
from effc.backend.to_python import emit, load_program
from effc.errors import EffcError
from effc.ir.core import Module, Ref
from effc.runtime.cache import Cache
from effc.runtime.engine import DONE, Engine, How
from effc.runtime.sampling import Sampling
from effc.runtime.weights import load_params

LIMIT = 0.95
PROMPT = 32


def shapes(module: Module) -> dict[str, Any]:
    """Sizes, constants and parameter names of a Llama-like module, by the order of its ops."""
    forward = module.forward()
    (repeat,) = [op for op in forward.ops if op.kind == "repeat"]
    target = repeat.attrs["block"]
    assert isinstance(target, Ref)
    block = module.funcs[target.name]
    linears = [op.params["w"] for op in block.ops if op.kind == "linear"]
    norms = [op for op in block.ops if op.kind == "norm"]
    (attention,) = [op for op in block.ops if op.kind == "attention"]
    if len(linears) != 7 or len(norms) != 2:
        raise EffcError(f"{len(linears)} linears and {len(norms)} norms a layer, want a Llama-like module, 7 and 2")
    types = block.types()
    (table,) = [op for op in forward.ops if op.kind == "rope_table"]
    (final,) = [op for op in forward.ops if op.kind == "norm"]
    names = dict(zip(("q", "k", "v", "o", "gate", "up", "down"), linears, strict=True))
    names |= {"n1": norms[0].params["scale"], "n2": norms[1].params["scale"]}
    heads, dim = types[attention.inputs[0]].shape[2:]
    return {
        "names": names, "heads": heads, "groups": types[attention.inputs[1]].shape[2], "dim": dim,
        "theta": table.attrs["theta"], "eps": final.attrs["eps"], "norm": final.params["scale"],
    }  # fmt: skip


def by_hand(sizes: dict[str, Any], params: Any, embed: jax.Array) -> tuple[Any, Any]:
    """Weights in plain dicts, and the jitted loop over them: (weights, caches, length, token) -> tokens."""
    heads, groups, dim, eps, theta = (sizes[k] for k in ("heads", "groups", "dim", "eps", "theta"))
    (layers,) = [value for value in params.values() if isinstance(value, list)]
    keys = {role: name.partition(".")[2] for role, name in sizes["names"].items()}
    weights = {
        "embed": embed, "norm": params[sizes["norm"]],
        "layers": [{role: layer[key] for role, key in keys.items()} for layer in layers],
    }  # fmt: skip

    def rms(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * lax.rsqrt(jnp.mean(x * x) + eps) * scale

    def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        left, right = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    def token_step(weights: Any, caches: Any, length: jax.Array, token: jax.Array) -> tuple[jax.Array, Any]:
        x = weights["embed"][token]
        angle = length.astype(jnp.float32) * theta ** (-jnp.arange(0, dim, 2) / dim)
        cos, sin = jnp.cos(angle)[None], jnp.sin(angle)[None]
        new = []
        for w, (k_cache, v_cache) in zip(weights["layers"], caches, strict=True):
            h = rms(x, w["n1"])
            q = turn((h @ w["q"]).reshape(heads, dim), cos, sin)
            k = turn((h @ w["k"]).reshape(groups, dim), cos, sin)
            v = (h @ w["v"]).reshape(groups, dim)
            k_cache = lax.dynamic_update_slice(k_cache, k[:, None], (0, length, 0))
            v_cache = lax.dynamic_update_slice(v_cache, v[:, None], (0, length, 0))
            new.append((k_cache, v_cache))
            scores = jnp.einsum("grd,gsd->grs", q.reshape(groups, -1, dim), k_cache) * dim**-0.5
            seen = jnp.arange(k_cache.shape[1]) <= length
            probs = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            x = x + jnp.einsum("grs,gsd->grd", probs, v_cache).reshape(-1) @ w["o"]
            h = rms(x, w["n2"])
            x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return jnp.argmax(weights["embed"] @ rms(x, weights["norm"])), new

    @partial(jax.jit, donate_argnums=1, static_argnums=4)
    def loop(weights: Any, caches: Any, length: jax.Array, token: jax.Array, count: int) -> tuple[Any, jax.Array]:
        def body(i: jax.Array, carry: Any) -> Any:
            caches, token, out = carry
            token, caches = token_step(weights, caches, length + i, token)
            return caches, token.astype(jnp.int32), out.at[i].set(token.astype(jnp.int32))

        caches, _, out = lax.fori_loop(0, count, body, (caches, token, jnp.zeros(count, jnp.int32)))
        return caches, out

    return weights, loop


def compare(folder: Path, tokens: int, rounds: int) -> float:
    """Emitted tokens/s over those of the loop by hand; EffcError where the tokens differ."""
    module = read_module(folder / MODEL)
    program = load_program(emit(module))
    engine = Engine(program, load_params(folder / WEIGHTS, program.params))
    sizes = shapes(module)
    (embedding,) = [op.params["table"] for op in module.forward().ops if op.kind == "embed"]
    weights, loop = by_hand(sizes, engine.params, engine.params[embedding])
    prompt = jnp.asarray([[1 + i % 7 for i in range(PROMPT)]], jnp.int32)
    logits, cache = engine.extend(prompt, engine.empty(1, PROMPT + tokens))
    first = logits[:, -1].argmax(-1).astype(jnp.int32)
    hand = [entry.values for entry in jax.tree.map(jnp.copy, cache.entries)]
    how = How(Sampling(), Sampling().numbers(), jnp.array([DONE]))
    times: dict[str, list[float]] = {"emitted": [], "by hand": []}
    for turn in range(rounds + 1):
        cache = Cache(jnp.array([PROMPT], jnp.int32), cache.entries)
        state = {
            "cache": cache, "token": first + 0, "done": first < 0, "row": first * 0,
            "seed": jax.random.key(0), "seen": None,
        }  # fmt: skip
        begin = time.perf_counter()
        state, out = engine.decode(state, how, tokens, tokens)
        got = np.asarray(out)[0]
        middle = time.perf_counter()
        hand, out = loop(weights, hand, jnp.int32(PROMPT), first[0], tokens)
        wanted = np.asarray(out)
        end = time.perf_counter()
        cache = state["cache"]
        if (got != wanted).any():
            raise EffcError(f"token {int((got != wanted).argmax())} differs: {got.tolist()}, want {wanted.tolist()}")
        if turn:  # the first round compiles
            times["emitted"].append(middle - begin)
            times["by hand"].append(end - middle)
    rates = {name: tokens / statistics.median(seconds) for name, seconds in times.items()}
    print(", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rates.items()))
    return rates["emitted"] / rates["by hand"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Emitted program against a loop written by hand.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    ratio = compare(options.artifact, options.tokens, options.rounds)
    print(f"ratio {ratio:.3f}, want at least {LIMIT}")
    sys.exit(ratio < LIMIT)


if __name__ == "__main__":
    main()
