"""Texts of a model: what is drawn, its log-probability by hand, token boundaries, stops, batches (algorithms 6.4)."""

from __future__ import annotations

import math
from collections.abc import Generator as Gen
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.errors import EffcError
from effc.generator import Generator, asked, engine_of
from effc.ir.parser import parse
from effc.opened import Opened
from effc.programs import LM, Cache, Distribution, Proposed, Text, forward, program, run_all, sample
from effc.programs.model import EngineModel
from effc.programs.spelling import spelled
from effc.runtime.sampling import Sampling, filtered
from tests.runtime.conftest import TINY

CONTEXT = 200
Steps = Gen[Any, Any, Any]


def by_hand(generator: Generator, prompt: str, ids: tuple[int, ...], sampling: Sampling | None = None) -> np.ndarray:
    """Log-probability of each id after the prompt, from one forward over all of it."""
    before = generator.tokenizer.encode(prompt)
    tokens = np.zeros((1, CONTEXT), np.int32)
    tokens[0, : len(before) + len(ids)] = [*before, *ids]
    logits = generator.engine.forward(generator.engine.params, jnp.asarray(tokens))[0]
    logits = logits[len(before) - 1 : len(before) + len(ids) - 1]
    if sampling:
        logits = filtered(logits / sampling.temperature, sampling.numbers(), sampling.filters)
    logp = np.asarray(jax.nn.log_softmax(logits))
    return logp[np.arange(len(ids)), list(ids)]


def test_a_score_is_the_models_own_and_a_proposal_that_of_the_draw(lm: LM, generator: Generator) -> None:
    draw = lm("import os", max_tokens=8, temperature=0.7, top_k=20).sample(3)
    assert draw.score == pytest.approx(by_hand(generator, "import os", draw.value.ids).sum(), abs=1e-4)
    how = Sampling(0.7, top_k=20)
    assert draw.proposal == pytest.approx(by_hand(generator, "import os", draw.value.ids, how).sum(), abs=1e-4)
    assert draw.proposal != pytest.approx(draw.score, abs=0.1)


def test_greedy_draws_the_likeliest_with_certainty(lm: LM, generator: Generator) -> None:
    draw = lm("ab", max_tokens=5, temperature=0).sample(0)
    assert draw.proposal == 0.0 and draw.score < 0
    assert list(draw.value.ids) == generator.run([generator.encode("ab")], asked(max_tokens=5)).tokens[0]


@pytest.mark.parametrize("seed", range(6))
def test_scoring_what_was_drawn_gives_its_score_to_the_bit(lm: LM, seed: int) -> None:
    dist = lm("the ab", max_tokens=30, stop="o", temperature=1.3)
    draw = dist.sample(seed)
    assert dist.log_prob(draw.value) == draw.score
    fresh = LM(Generator(lm.model.engine, lm.model.tokenizer), rows=4)  # type: ignore[attr-defined]
    assert fresh("the ab", max_tokens=30, stop="o", temperature=1.3).log_prob(draw.value) == draw.score


def test_each_effect_reports_its_own_tokens_and_forwards(lm: LM, opened: Opened) -> None:
    """As if it had run alone: the prompt and what is drawn, read for the draw and once more for the score."""

    @program
    def both(other: LM) -> Steps:
        first = yield sample(lm("import os", max_tokens=5, temperature=0), "small")
        return (yield sample(other(f"import os{first}", max_tokens=3, temperature=0), "large"))

    other = _other(opened)
    alone = forward(both(other), 1)[0]
    prompt, new = len(lm.model.encode("import os")), len(alone["small"].ids)
    small, large = (next(r for r in alone.records if r.name == name) for name in ("small", "large"))
    assert small.tokens == 2 * (prompt + new) and alone["small"].finish == "length"
    assert small.forwards == 1 + (new - 1) + 2  # the prompt, a call a token after the first; both once more
    assert large.tokens == 2 * (len(other.model.encode(f"import os{alone['small']}")) + len(alone["large"].ids))
    assert (alone.tokens, alone.forwards) == (small.tokens + large.tokens, small.forwards + large.forwards)
    many = forward(both(other), 4)  # in one batch, and answered out of the cache
    assert all(
        [(r.tokens, r.forwards) for r in t.records] == [(r.tokens, r.forwards) for r in alone.records] for t in many
    )


def test_a_text_spelled_as_the_tokenizer_does_scores_as_plain_text_too(lm: LM, generator: Generator) -> None:
    dist, met = lm("the ab", max_tokens=3), 0
    for seed in range(12):
        draw = dist.sample(seed)
        prompt = lm.model.encode("the ab")
        if draw.value.finish == "length" and lm.model.spell("the ab", prompt, draw.value) == draw.value.ids:
            assert dist.log_prob(str(draw.value)) == draw.score
            met += 1
    assert met > 2


# ---- token boundaries


def test_a_leading_space_belongs_to_the_value(lm: LM, generator: Generator) -> None:
    words = generator.tokenizer
    assert words.encode("import os") == [*words.encode("import"), *words.encode(" os")]
    assert len(words.encode(" os")) == 1
    inside = lm("import").log_prob(" os")
    assert inside == pytest.approx(by_hand(generator, "import", tuple(words.encode(" os"))).sum(), abs=1e-4)


def test_a_token_over_the_boundary_is_split_there(lm: LM, generator: Generator) -> None:
    words = generator.tokenizer
    prompt = words.encode("import ")
    assert words.encode("import os")[: len(prompt)] != prompt  # one token would reach over
    ids = lm.model.spell("import ", tuple(prompt), "os")
    assert words.decode([*prompt, *ids]) == "import os"
    assert lm("import ").log_prob("os") == pytest.approx(by_hand(generator, "import ", ids).sum(), abs=1e-4)


class _Spaced:
    """Begins every text with a space, as SentencePiece's tokenizers do, and drops it when decoding."""

    letters = " abc\n"

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        return [self.letters.index(letter) for letter in " " + text]

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        return "".join(self.letters[i] for i in ids).removeprefix(" ")


@pytest.mark.parametrize("value", ["b", " b", "cab", "\nab"])
def test_a_tokenizer_that_begins_with_a_space_adds_none_to_a_value(value: str) -> None:
    words = _Spaced()
    prompt = words.encode("a")
    ids = spelled(words, "a", prompt, value, "here")
    assert words.decode([*prompt, *ids]) == "a" + value
    alone = spelled(words, "c", prompt, value, "here")  # no joint text has these ids: the value by itself has to serve
    assert alone == ids


def test_what_a_tokenizer_cannot_write_is_refused() -> None:
    class Lossy(_Spaced):
        def encode(self, text: str, *, specials: bool = True) -> list[int]:
            return [0, *(1 for _ in text)]

    with pytest.raises(EffcError, match="cannot write 'b' after 'a'"):
        spelled(Lossy(), "a", [2], "b", "here")


# ---- stops and ends


@program
def one_step(dist: Distribution) -> Steps:
    return (yield sample(dist, "text"))


@pytest.mark.parametrize("seed", range(8))
def test_no_stop_string_is_in_a_value_unless_included(lm: LM, seed: int) -> None:
    stop = ("ra", "o", "\n")
    bare = lm("the", stop=stop, max_tokens=40, temperature=1.2).sample(seed)
    assert not any(one in bare.value for one in stop)
    kept = lm("the", stop=stop, max_tokens=40, temperature=1.2, include_until=True).sample(seed)
    assert kept.value.ids == bare.value.ids and kept.score == bare.score
    if bare.value.finish == "stop":
        assert kept.value.endswith(stop) and kept.value.startswith(bare.value)


def test_each_way_to_end_is_met_and_scored(lm: LM, generator: Generator) -> None:
    dist = lm("the", stop="9", max_tokens=24, temperature=8.0)
    draws = {trace.value.finish: trace.records[0] for trace in forward(one_step(dist), 24)}
    assert draws.keys() == {"stop", "end", "length"}
    end = generator.engine.eos
    for finish, draw in draws.items():
        ids = draw.value.ids + (end if finish == "end" else ())
        assert draw.score == pytest.approx(by_hand(generator, "the", ids).sum(), abs=1e-3)
        want = by_hand(generator, "the", ids, Sampling(8.0)).sum()
        assert draw.proposal == pytest.approx(want, abs=1e-3)
    assert len(draws["length"].value.ids) == 24
    assert "9" in generator.tokenizer.decode(draws["stop"].value.ids)


def test_plain_text_is_scored_with_its_end_as_asked(lm: LM, generator: Generator) -> None:
    encode = generator.tokenizer.encode
    open_end = lm("the").log_prob("ab")
    assert open_end == pytest.approx(by_hand(generator, "the", tuple(encode("ab"))).sum(), abs=1e-4)
    closed = (*encode("ab"), *generator.engine.eos)
    assert lm("the", ended=True).log_prob("ab") == pytest.approx(by_hand(generator, "the", closed).sum(), abs=1e-4)
    stopped = tuple(encode("abo"))
    for included in (False, True):
        dist = lm("the", stop="o", include_until=included)
        want = by_hand(generator, "the", stopped).sum()
        assert dist.log_prob("abo" if included else "ab") == pytest.approx(want, abs=1e-4)
        assert dist.log_prob("aoo") == -math.inf
    assert lm("the", stop="o").log_prob("abo") == -math.inf
    assert lm("the", stop="o", ended=False).log_prob("ab") == pytest.approx(open_end, abs=1e-4)
    assert lm("the").log_prob("") == 0.0 and lm("the", ended=True).log_prob("") < 0


def test_a_long_value_is_scored_in_pieces_up_to_the_last_position(lm: LM, generator: Generator) -> None:
    value = "ab" * (CONTEXT - 2)
    ids = lm.model.spell("a", lm.model.encode("a"), value)
    assert len(ids) == CONTEXT - 2
    assert lm("a").log_prob(value) == pytest.approx(by_hand(generator, "a", ids).sum(), abs=2e-3)
    with pytest.raises(EffcError, match="want at most the context of 200"):
        lm("a").log_prob(value + "abab")


# ---- the same whatever the batch


@program
def two_steps(lm: LM, start: str) -> Steps:
    first = yield sample(lm(start, stop="o", max_tokens=12, temperature=0.9), "first")
    second = yield sample(lm(f"{start}{first}o", max_tokens=9, top_k=30), "second")
    last = yield sample(lm.choice(f"{start}{second}", [" os", " import", "ab"]), "last")
    return first + second + last


def test_batched_equals_one_by_one_to_the_bit(generator: Generator) -> None:
    starts = ["the", "ab", "import os:", "a", "the import", "0123456789" * 2]
    batched, alone = LM(generator, rows=4), LM(generator, rows=4)
    traces = run_all([two_steps(batched, start) for start in starts], 5)
    again = run_all([two_steps(alone, start) for start in starts], 5, together=False)
    assert [t.records for t in again] == [t.records for t in traces]
    assert [len(t.records) for t in traces] == [3] * len(starts)
    assert batched.usage["calls"] < alone.usage["calls"] / 1.5
    assert batched.usage["rows"] == alone.usage["rows"] == 7 * len(starts)


@pytest.mark.slow
def test_rows_change_no_value(generator: Generator) -> None:
    one, four = (run_all([two_steps(LM(generator, rows=n), "the")] * 3, 5) for n in (1, 4))
    assert [t.value for t in one] == [t.value for t in four]
    assert [t.score for t in one] == pytest.approx([t.score for t in four], abs=1e-4)


def test_equal_calls_are_answered_once(opened: Opened, generator: Generator) -> None:
    shared = Cache()
    one, other = (LM(EngineModel(generator, opened, 4, shared)) for _ in range(2))
    first = forward(two_steps(one, "the"), 3, seed=1)
    again = forward(two_steps(other, "the"), 3, seed=1)
    assert [t.records for t in again] == [t.records for t in first]
    assert other.usage["calls"] == 0 and other.usage["hits"] >= 3 * 4
    greedy = LM(generator, rows=4)
    for seed in range(3):
        greedy("the", temperature=0, max_tokens=4).sample(seed)
    assert greedy.usage["rows"] == 2  # a draw and its score


def test_a_cache_forgets_what_was_used_longest_ago() -> None:
    cache = Cache(limit=2)
    for name in ("a", "b"):
        cache.put(name, name)  # type: ignore[arg-type]
    assert cache.get("a") == "a"
    cache.put("c", "c")  # type: ignore[arg-type]
    assert (len(cache), cache.get("b"), cache.get("a")) == (2, None, "a")


# ---- two models


def test_a_text_of_one_model_is_scored_by_another_over_the_same_tokens(lm: LM, opened: Opened) -> None:
    other = _other(opened)
    draw = Proposed(other("the", max_tokens=6), by=lm("the", max_tokens=6)).sample(4)
    small = lm("the", max_tokens=6)
    assert draw.proposal == small.log_prob(draw.value)
    assert draw.score == other("the", max_tokens=6).log_prob(draw.value) != draw.proposal
    assert draw.tokens > small.sample(4).tokens


def test_confidence_is_the_mean_probability_of_a_token(lm: LM) -> None:
    text = lm("the", max_tokens=6, temperature=0).sample(0).value
    assert isinstance(text, Text) and len(text.ids) == 6
    assert text.confidence == pytest.approx(math.exp(text.logp / 6))


def test_a_choice_is_the_models_probabilities_among_the_options(lm: LM) -> None:
    options = [" os", " import", "ab"]
    dist = lm.choice("the", options)
    raw = np.asarray([lm("the").log_prob(option) for option in options])
    want = raw - np.logaddexp.reduce(raw)
    assert [dist.log_prob(option) for option in options] == pytest.approx(list(want), abs=1e-5)
    assert dist.log_prob("ra") == -math.inf
    drawn = [dist.sample(seed).value for seed in range(60)]
    assert set(drawn) == set(options)


# ---- what is asked wrongly


def test_errors_name_the_site(lm: LM) -> None:
    @program
    def asks(prompt: str, **options: object) -> Steps:
        yield sample(lm(prompt, **options), "answer")  # type: ignore[arg-type]

    with pytest.raises(EffcError, match=r"^answer: prompt: 250 prompt tokens and 8 new .* the context of 200"):
        forward(asks("a" * 250, max_tokens=8), 1)
    with pytest.raises(EffcError, match=r"^answer: prompt: a prompt has no tokens, want at least one"):
        forward(asks(""), 1)
    with pytest.raises(EffcError, match="LM: max_tokens is 0, want at least 1"):
        lm("the", max_tokens=0)
    with pytest.raises(EffcError, match="LM: a stop string is empty"):
        lm("the", stop=["a", ""])
    with pytest.raises(EffcError, match="LM: rows is 0, want at least 1"):
        LM(lm.model, rows=0)
    with pytest.raises(EffcError, match="temperature is -1"):
        lm("the", temperature=-1)
    with pytest.raises(EffcError, match="want texts that differ"):
        lm.choice("the", ["a", "a"])
    with pytest.raises(EffcError, match="observed 3, want text"):
        lm("the").log_prob(3)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EffcError, match="nowhere"):
        LM(tmp_path / "nowhere")


def _other(opened: Opened) -> LM:
    """Another model with the same tokenizer and arrays: its positions turn faster."""
    module = parse(TINY.read_text().replace("theta=10000.0", "theta=10.0"))
    other = replace(opened, module=module)
    words = other.tokenizer()
    return LM(Generator(engine_of(other, words.eos_ids), words), rows=4)
