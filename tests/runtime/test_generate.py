"""Generation on a small random model: ragged batches, lengths, stopping, seeds, streaming."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.errors import EffcError
from effc.runtime.cache import Cache, cache_shapes, empty_cache
from effc.runtime.engine import DONE, Engine, How, pieces
from effc.runtime.generate import Request, Result, Stats, generate, stream
from effc.runtime.sampling import Sampling

PROMPTS = [[5, 9, 2, 33, 8, 1, 60], [7], list(range(20)), [3, 3, 3]]


def reference(engine: Engine, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens by running the whole forward again for each (padded: it is causal)."""
    tokens, out = np.zeros((1, 64), np.int32), list(prompt)
    for _ in range(count):
        tokens[0, : len(out)] = out
        out.append(int(engine.forward(engine.params, jnp.asarray(tokens))[0, len(out) - 1].argmax()))
    return out[len(prompt) :]


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(engine: Engine) -> None:
    batch = generate(engine, PROMPTS, max_new_tokens=12, chunk=5)
    assert batch.tokens == [reference(engine, prompt, 12) for prompt in PROMPTS]
    assert batch.finish == ["length"] * 4
    assert (batch.stats.prompt_tokens, batch.stats.new_tokens, batch.stats.decoded) == (31, 48, 44)


def test_sampling_does_not_depend_on_the_rest_of_the_batch(engine: Engine) -> None:
    how = Sampling(temperature=1.0, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    batch = generate(engine, PROMPTS[:2], max_new_tokens=10, sampling=how, seed=3)
    alone = generate(engine, PROMPTS[:1], max_new_tokens=10, sampling=how, seed=3)
    chunked = generate(engine, PROMPTS[:2], max_new_tokens=10, sampling=how, seed=3, chunk=3)
    other = generate(engine, PROMPTS[:2], max_new_tokens=10, sampling=how, seed=4)
    assert batch.tokens[0] == alone.tokens[0] and batch.tokens == chunked.tokens != other.tokens


def test_a_strong_penalty_never_repeats(engine: Engine) -> None:
    how = Sampling(repetition_penalty=1e6)
    result = generate(engine, [[1, 2, 3]], max_new_tokens=30, sampling=how)
    assert len(set(result.tokens[0]) | {1, 2, 3}) == 33


def test_stop_ids_end_a_row_and_are_not_part_of_it(engine: Engine) -> None:
    free = generate(engine, PROMPTS, max_new_tokens=12).tokens
    stop = free[0][4]
    result = generate(engine, PROMPTS, max_new_tokens=12, stop_ids=[stop])
    for row, tokens in enumerate(free):
        want = tokens[: tokens.index(stop)] if stop in tokens else tokens
        assert result.tokens[row] == want
        assert result.finish[row] == ("stop" if stop in tokens else "length")


def test_the_loop_ends_early_when_all_rows_are_done(engine: Engine) -> None:
    free = generate(engine, PROMPTS[:1], max_new_tokens=5).tokens[0]
    stats = generate(engine, PROMPTS[:1], max_new_tokens=150, stop_ids=free).stats
    assert stats.new_tokens == 0 and stats.decode_seconds == 0


def spell(ids: Sequence[int]) -> str:
    """Every token is two letters, so that stop strings cut across tokens."""
    return "".join("abcdefgh"[i // 8] + "abcdefgh"[i % 8] for i in ids)


def test_stop_strings_never_show(engine: Engine) -> None:
    free = spell(generate(engine, PROMPTS[:1], max_new_tokens=30).tokens[0])
    stop = free[13:16]  # from the second letter of one token
    seen: list[int] = []
    result = generate(
        engine, PROMPTS[:1], max_new_tokens=30, stop=[stop], decode=spell, chunk=4,
        on_tokens=lambda row, new: seen.extend(new),
    )  # fmt: skip
    assert result.texts == [free[: free.index(stop)]] and result.finish == ["stop"]
    assert seen == result.tokens[0] and stop not in spell(seen)
    assert free.startswith(spell(seen))


def test_what_might_become_a_stop_string_is_held_back_then_given(engine: Engine) -> None:
    free = generate(engine, PROMPTS[:1], max_new_tokens=9).tokens[0]
    almost = spell(free)[-2:] + "zz"
    seen: list[int] = []
    request = Request(PROMPTS[:1], 9, chunk=4, stop=[almost], decode=spell)
    result = Result([[]], ["length"], Stats())
    for news in stream(engine, request, result):
        seen += news[0]
    assert seen == free == result.tokens[0]


def test_chunks_stream_as_they_come(engine: Engine) -> None:
    request = Request(PROMPTS[:2], 11, chunk=4)
    result = Result([[], []], ["length"] * 2, Stats())
    sizes = [[len(new) for new in news] for news in stream(engine, request, result)]
    assert sizes == [[1, 1], [4, 4], [4, 4], [2, 2]]


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1] * 150], 51, "150 prompt tokens and 51 new ones are 201, want at most the context of 200"),
        ([[1], []], 5, "a prompt has no tokens, want at least one"),
        ([[1]], 0, "max_new_tokens is 0, want at least 1"),
        ([], 5, "no prompts, want at least one"),
    ],
)
def test_what_does_not_fit_is_refused(engine: Engine, prompts: list[list[int]], new: int, message: str) -> None:
    with pytest.raises(EffcError) as error:
        generate(engine, prompts, max_new_tokens=new)
    assert message in str(error.value)


def test_the_last_position_of_the_context_is_used(engine: Engine) -> None:
    prompt = [1 + i % 60 for i in range(190)]
    assert len(generate(engine, [prompt, [4]], max_new_tokens=10).tokens[0]) == 10


def test_pieces_cover_a_prompt_and_stay_within_the_context() -> None:
    assert pieces(1, None) == [(0, 16)]
    assert pieces(512, None) == [(0, 512)]
    assert pieces(1100, None) == [(0, 512), (512, 512), (1024, 128)]
    assert pieces(1100, 1101) == [(0, 512), (512, 512), (1024, 77)]


def test_long_prompts_go_in_pieces(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    want = generate(engine, PROMPTS, max_new_tokens=6).tokens
    monkeypatch.setattr("effc.runtime.engine.BUCKETS", (4, 8))
    assert pieces(20, 200) == [(0, 8), (8, 8), (16, 4)]
    assert generate(engine, PROMPTS, max_new_tokens=6).tokens == want


def test_extend_in_any_chunking_equals_forward_with_poisoned_rows(engine: Engine) -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 24)), jnp.int32)
    want = engine.forward(engine.params, tokens)
    for cuts in ([24], [10, 1, 1, 12], [1] * 24):
        cache = empty_cache(cache_shapes(engine.program.extend, engine.params, 2), 128)
        cache = Cache(cache.lengths, jax.tree.map(lambda x: jnp.full_like(x, 1e30), cache.entries))
        got, start = [], 0
        for size in cuts:
            logits, cache = engine.extend(tokens[:, start : start + size], cache)
            got.append(logits)
            start += size
        np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, atol=1e-5)  # logits near 1
        assert cache.lengths.tolist() == [24, 24]


def test_the_cache_is_updated_in_place(engine: Engine) -> None:
    how = How(Sampling(), Sampling().numbers(), jnp.array([DONE]))
    cache, row = engine.empty(1, 128), jnp.zeros(1, jnp.int32)
    state = {"cache": cache, "token": row, "done": row > 0, "row": row + 0, "seed": jax.random.key(0), "seen": None}
    before = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.entries)}
    others = set(engine._compiled)
    state, _ = engine.decode(state, how, 3, 3)
    assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state["cache"].entries)} == before
    assert cache.entries[0].values[0].is_deleted()
    (key,) = set(engine._compiled) - others
    rows, capacity, width = state["cache"].entries[0].values[0].shape
    assert f"f32[{rows},{capacity},{width}]{{2,1,0}} copy(" not in engine._compiled[key].as_text()  # pyright: ignore
