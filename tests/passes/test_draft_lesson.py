"""What a drafter learns from: answers are the target's own, what is noted is what it says, chunks lie on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.ir.parser import parse
from effc.passes.base import Notes
from effc.passes.draft import Draft, coming, taught, train
from effc.passes.draft.lesson import Lesson, keep, kept, learned
from effc.passes.draft.scribe import Scribe, likeliest
from effc.passes.quant4 import Quant4
from effc.passes.quantizer import quantize
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.qarray import QArray
from effc.runtime.train.budget import Budget
from effc.runtime.train.tree import take
from tests.backend.conftest import random_store
from tests.runtime.conftest import TINY, random_params

PROMPTS = [[5, 9, 2, 33], [7], [1, 2, 3, 4, 1, 2, 3]]


@pytest.fixture(scope="module")
def reader() -> tuple[Scribe, Any]:
    module = Draft(kind="head", vocab=16).run(parse(TINY.read_text()), Notes())
    program = load_program(emit(module))
    params = random_params(program, seed=3)
    return Scribe(program.entries["verify"], params, (0,)), program


def test_answers_are_those_of_plain_decoding(reader: tuple[Scribe, Any], tmp_path: Path) -> None:
    scribe, _ = reader
    plain = Engine(load_program(emit(parse(TINY.read_text()))), scribe.params)
    stop = generate(plain, PROMPTS, max_new_tokens=16).tokens[0][7]
    chunk = Scribe(scribe.see, scribe.params, (stop,)).answers(PROMPTS, 48, seed=0)
    said = generate(plain, PROMPTS, max_new_tokens=16, stop_ids=[stop]).tokens
    for row in (0, 1):  # every third is drawn
        text = [*PROMPTS[row], *said[row]]
        start, end = chunk["spans"][row]
        n = min(end, len(text))
        assert start == len(PROMPTS[row]) and chunk["tokens"][row, :n].tolist() == text[:n]
    ended = chunk["spans"][0, 1]
    assert chunk["ids"][0, ended - 1, 0] == stop  # that it ends there is learned too
    again = scribe.reads(chunk["tokens"][:, :ended])
    np.testing.assert_array_equal(again["ids"][0, :ended, 0], chunk["ids"][0, :ended, 0])
    np.testing.assert_allclose(again["features"][0, :ended], chunk["features"][0, :ended], rtol=0.01, atol=0.01)
    keep(tmp_path, 0, chunk)
    keep(tmp_path, 1, chunk)
    lesson = Lesson(list(kept(tmp_path)))
    assert lesson.texts == 6 and lesson.features
    np.testing.assert_array_equal(lesson.rows([4])["tokens"][0], chunk["tokens"][1])


def test_a_lesson_is_read_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, or with a larger budget: chunks that are there stay, as if it had been read at once."""
    module = Draft(kind="head", vocab=16).run(parse(TINY.read_text()), Notes())
    read = list[int]()

    class Fake:
        def reads(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
            read.append(int(tokens[0, 0]))
            if len(read) == 3:
                raise KeyboardInterrupt
            return {"tokens": tokens, "spans": np.tile(np.asarray([[1, 128]], np.int32), (len(tokens), 1))}

    def lesson(steps: int, ids: Any = None) -> Lesson:
        context = SimpleNamespace(
            folder=tmp_path, budget=Budget(steps=steps), seed=0, calib="text", ids=ids,
            batches=lambda rows, length: lambda n, _: {"tokens": np.full((rows, length), n)},
        )  # fmt: skip
        return train.read("draft", module, store, context, train.Source(True))  # type: ignore[arg-type]

    store = random_store(module)
    monkeypatch.setattr(train, "scribe", lambda *_: Fake())
    with pytest.raises(KeyboardInterrupt):
        lesson(8)
    assert lesson(8).texts == 4 * train.ROWS_READ and read == [0, 1, 2, 2, 3]
    assert lesson(8).texts == 4 * train.ROWS_READ and len(read) == 5  # all there
    found = lesson(10)
    assert read[5:] == [4] and [int(chunk["tokens"][0, 0]) for chunk in found.chunks] == [0, 1, 2, 3, 4]
    store = random_store(module, seed=1)
    assert lesson(2).texts == train.ROWS_READ and read[6:] == [0]  # another target's


def test_the_likeliest_are_those_of_a_sort() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 5, 1000)).astype(np.float32)
    ids, top = likeliest(jnp.asarray(logits), 16)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=-1)[..., :16])
    np.testing.assert_allclose(top, -np.sort(-logits, axis=-1)[..., :16], rtol=1e-3, atol=1e-3)


def test_what_a_prompt_says_is_not_learned() -> None:
    assert learned(np.asarray([[2, 4]]), 6).tolist() == [[False, True, True, True, False, False]]


def test_prompts_that_are_added_to_a_file_are_read_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered stays, as far as the same was asked."""
    module = Draft(kind="head", vocab=16).run(parse(TINY.read_text()), Notes())
    store, read, file = random_store(module), list[int](), tmp_path / "prompts.txt"

    class Fake:
        def answers(self, asked: list[list[int]], whole: int, seed: int) -> dict[str, np.ndarray]:
            read.append(asked[0][0])
            tokens = np.zeros((len(asked), whole), np.int32)
            for row, prompt in zip(tokens, asked, strict=True):
                row[: len(prompt)] = prompt
            return {"tokens": tokens, "spans": np.asarray([[len(prompt), whole] for prompt in asked], np.int32)}

    def lesson(numbers: Sequence[int]) -> Lesson:
        file.write_text("\n".join(map(str, numbers)))
        tokenizer = SimpleNamespace(chat_template=None, encode=lambda line: [int(line), 1])
        context = SimpleNamespace(
            name="draft", folder=tmp_path, budget=Budget(steps=32), seed=0, calib=None, ids=None, tokenizer=tokenizer
        )
        return train.read("draft", module, store, context, train.Source(True, file))  # type: ignore[arg-type]

    monkeypatch.setattr(train, "scribe", lambda *_: Fake())
    assert lesson(range(100, 140)).texts == 40 and read == [100, 116, 132]
    assert lesson(range(100, 180)).texts == 80 and read[3:] == [132, 148, 164]  # the last chunk was not full
    assert lesson([*range(100, 116), 7, *range(117, 148)]).texts == 48 and read[6:] == [7, 132]
    assert lesson(range(20, 52)).texts == 32 and read[8:] == [20, 36]  # another file altogether


def test_texts_that_are_looked_at_are_not_learned_from() -> None:
    texts = np.arange(12)[:, None] * np.ones((1, 4), np.int32)
    top = np.zeros((12, 4, 2), np.float16)
    spans = np.tile(np.asarray([[1, 4]], np.int32), (12, 1))
    chunk = {"tokens": texts.astype(np.int32), "spans": spans, "ids": top.astype(np.int32), "logits": top}
    batches = train._batches(Lesson([chunk]), None, 8, seed=0)
    seen = {int(row[0]) for step in range(6) for row in batches(step, None)["tokens"]}
    assert seen == set(range(8))


def test_new_texts_and_known_ones_are_learned_in_turn() -> None:
    order = train._order(0, 0, 12, 7)
    assert sorted(order) == list(range(12))
    assert [int(text >= 7) for text in order[:10]] == [1, 0] * 5
    assert (train._order(0, 0, 12, 0) != order).any()


def test_a_longer_lesson_is_learned_on_from_where_the_shorter_one_ended(tmp_path: Path) -> None:
    chunk = {"tokens": np.zeros((16, 4), np.int32)}
    short, longer, small = (Lesson([chunk] * n, folder=tmp_path) for n in (2, 5, 1))
    arrays = {"w": np.ones((2, 3), np.float32)}
    assert taught.latest(short, arrays, "4 bits") is None
    taught.keep(short, arrays, "4 bits")
    taught.keep(longer, {"w": 2 * arrays["w"]}, "4 bits")
    assert taught.latest(short, arrays, "4 bits") is None  # what is resumed begins where it began
    assert taught.latest(small, arrays, "4 bits") is None
    found = taught.latest(longer, arrays, "4 bits")
    assert found and found[0] == 32
    np.testing.assert_array_equal(found[1]["w"], arrays["w"])
    found = taught.latest(longer, arrays, "8 bits")  # to be coded another way, it learns on
    assert found and found[0] == 80 and (found[1]["w"] == 2).all()
    assert taught.latest(longer, {"w": np.ones((3, 3))}, "4 bits") is None  # another head


def test_a_head_that_learned_from_less_is_what_training_begins_with(tmp_path: Path) -> None:
    module = Draft(kind="head", vocab=0).run(parse(TINY.read_text()), Notes())
    program = load_program(emit(module))
    params, begun, told = random_params(program, seed=3), list[Any](), list[str]()

    def fit(loss: Any, params: Any, *_: Any, trainable: Any, **__: Any) -> Any:
        begun.append(take(params, trainable))
        return SimpleNamespace(params=jax.tree.map(lambda x, on: x + 1 if on else x, params, trainable))

    context = SimpleNamespace(budget=Budget(steps=2), seed=0, fit=fit, tell=told.append, later=())
    chunk = {"tokens": np.zeros((16, 4), np.int32), "spans": np.tile(np.asarray([[1, 4]], np.int32), (16, 1))}
    chunk |= {"features": np.zeros((16, 4, 3))}
    model: Any = SimpleNamespace(program=program, params=params, module=module)
    for count in (1, 1, 2):
        train.fit(model, Lesson([chunk] * count, folder=tmp_path), None, context)  # type: ignore[arg-type]
    assert told == ["draft: learns on from what 16 of 32 texts taught"]
    for name, array in begun[0].items():
        np.testing.assert_array_equal(begun[1][name], array)
        np.testing.assert_array_equal(begun[2][name], array + 1)


def test_a_drafter_learns_with_the_weights_that_will_be_served(tmp_path: Path) -> None:
    module = Draft(kind="head", vocab=0).run(parse(TINY.read_text()), Notes())
    program, later = load_program(emit(module)), [Quant4(group=16)]
    model: Any = SimpleNamespace(program=program, params=random_params(program, seed=3), module=module)
    how = coming.roundings(model, model.params, later)
    assert len(how) > 8 and all(name.startswith("draft.") for name in how)
    for name, rounding in how.items():
        w = np.asarray(model.params[name])
        quant, arrays = rounding.quant, quantize(w, rounding.quant, "mse", name)
        codes, scales = (jnp.asarray(arrays[part]) for part in ("codes", "scales"))
        served = QArray(codes, scales, None, quant.bits, quant.group, quant.axis, w.shape[1]).dequantize()
        alike = jnp.isclose(rounding(jnp.asarray(w)), served, atol=1e-6)
        assert float(alike.mean()) > 0.98  # scales are fitted once more after codes are chosen
        slope = jax.grad(lambda w, rounding=rounding: rounding(w).sum())(jnp.asarray(w))
        assert 0.7 < float((slope == 1).mean()) <= 1

    def fit(loss: Any, params: Any, *_: Any, **__: Any) -> Any:
        seen = loss(params, batch, None)[0]
        told.append([float(seen), float(loss(coming.rounded(how, program, params), batch, None)[0])])
        return SimpleNamespace(params=params)

    told, width = list[list[float]](), module.funcs["draft"].inputs[1].type.shape[-1]
    context = SimpleNamespace(budget=Budget(steps=2), seed=0, fit=fit, tell=print, later=later)
    rng = np.random.default_rng(0)
    chunk = {"tokens": rng.integers(0, 48, (16, 8)).astype(np.int32), "spans": np.tile(np.asarray([[1, 8]]), (16, 1))}
    chunk |= {"features": rng.standard_normal((16, 8, width)).astype(np.float16)}
    chunk |= {"ids": rng.integers(0, 48, (16, 8, 4)).astype(np.int32), "logits": np.zeros((16, 8, 4), np.float16)}
    lesson = Lesson([chunk], folder=tmp_path)
    batch = train._batch(lesson, None, range(8))
    out = train.fit(model, lesson, None, context)  # type: ignore[arg-type]
    assert told[0][0] == pytest.approx(told[0][1], rel=1e-5)
    for name, rounding in how.items():
        trained = not name.startswith("draft.head.")
        want = rounding(model.params[name]) if trained else model.params[name]
        np.testing.assert_array_equal(out[name], want)


def test_how_often_drafts_are_right_counts_every_token_alike() -> None:
    look = train._looks(lambda params, batch: {"agree1": params * batch["x"], "count": batch["n"]}, [
        {"x": jnp.float32(0.5), "n": jnp.float32(1)}, {"x": jnp.float32(0.1), "n": jnp.float32(3)},
    ])  # fmt: skip
    assert look(jnp.float32(2.0)) == pytest.approx({"agree1": (1.0 + 3 * 0.2) / 4})
