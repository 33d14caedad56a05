"""Passes together: every legal pair and triple trains, calibrates and is emitted as what its IR says; the others are
refused before any work."""

from __future__ import annotations

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.errors import EffcError
from effc.ir.stream import run
from effc.pipeline import CONFLICTS, Pipeline
from effc.runtime.engine import Engine
from effc.runtime.generate import generate

TOKENS = np.random.default_rng(5).integers(0, 160, (2, 12)).astype(np.int32)

SPELLED = {"calm": "calm{prompts=8,prompt=4,tokens=4}", "draft": "draft{kind=self,layers=1,gamma=2}"}
"""With little to train and to measure."""

NAMES = ("quant4", "quant8", "calm", "mor", "draft")
TOGETHER = [names for n in (2, 3) for names in combinations(NAMES, n)]
LEGAL = [names for names in TOGETHER if not any(pair <= set(names) for pair in CONFLICTS)]
QUICK = {("calm", "mor", "quant4")}
"""In the default run; the others are slow."""


def steps(machine: Engine) -> np.ndarray:
    """Logits of TOKENS, taken in in pieces."""
    cache, pieces = machine.empty(2, 16), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        piece, cache = machine.extend(jnp.asarray(TOKENS[:, start:stop]), cache)
        pieces.append(np.asarray(piece))
    return np.concatenate(pieces, axis=1)


def greedy(machine: Engine, prompt: list[int], new: int) -> list[int]:
    """One token after the other, by the whole model."""
    cache, out, fed = machine.empty(1, 64), list[int](), prompt
    for _ in range(new):
        logits, cache = machine.extend(jnp.asarray([fed]), cache)
        out.append(int(np.argmax(logits[0, -1])))
        fed = out[-1:]
    return out


def marked(names: tuple[str, ...]) -> object:
    slow = [] if tuple(sorted(names)) in QUICK else [pytest.mark.slow]
    spelled = SPELLED | ({"draft": "draft{gamma=2}"} if "calm" in names else {})
    return pytest.param(",".join(spelled.get(name, name) for name in names), marks=slow, id="-".join(names))


@pytest.mark.parametrize("passes", map(marked, LEGAL))
def test_what_is_legal_is_emitted_as_its_ir_says(passes: str, served) -> None:
    found = served(passes)
    tolerance = 2e-2 if "quant" in passes else 3e-4  # native kernels round activations too
    whole = np.asarray(jax.jit(found.engine.program.forward)(found.engine.params, jnp.asarray(TOKENS)))
    np.testing.assert_allclose(whole, run(found.module, found.store, jnp.asarray(TOKENS)), rtol=0, atol=tolerance)
    np.testing.assert_allclose(steps(found.engine), whole, rtol=0, atol=tolerance)
    prompt = TOKENS[0].tolist()
    full = generate(found.engine, [prompt], max_new_tokens=8, exits=1.0 if "calm" in passes else None)
    assert full.tokens[0] == greedy(found.engine, prompt, 8)
    assert len(generate(found.engine, [prompt], max_new_tokens=8).tokens[0]) == 8
    ordered = [one.name for one in Pipeline.parse(passes).ordered()]
    assert [name for name in found.seen if name in NAMES] == ordered
    if "mor" in passes:
        shared = found.module.params["layers.attn.q"]
        assert shared.stack == 4  # and coded once: 4 arrays for 6 layers
        assert str(shared.type.dtype).startswith("q") == ("quant" in passes)


@pytest.mark.parametrize("names", [names for names in combinations(NAMES, 2) if frozenset(names) in CONFLICTS], ids=str)
def test_what_is_illegal_names_both_and_the_mend(names: tuple[str, str]) -> None:
    with pytest.raises(EffcError) as caught:
        Pipeline.parse(",".join(names))
    told = str(caught.value)
    assert all(f"'{name}'" in told for name in names)
    assert told.endswith(CONFLICTS[frozenset(names)])
