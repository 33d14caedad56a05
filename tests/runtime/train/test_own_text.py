"""Text that models write to be trained on: the same for the same seed, kept, and learned from."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.errors import EffcError
from effc.ir.parser import parse
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.runtime.program import Program
from effc.runtime.train import Budget, Plan, Tree, fit, windows
from effc.runtime.train.judge import judge
from effc.runtime.train.objective import Objective
from effc.runtime.train.own import Continued, OwnText
from effc.runtime.train.policy import on_policy
from effc.runtime.train.tree import places
from effc.runtime.weights import parse_spec

TINY = Path(__file__).parent.parent / "tiny.effc"


@pytest.fixture(scope="module")
def program() -> Program:
    return load_program(emit(parse(TINY.read_text())))


def arrays(program: Program, seed: int, scale: float = 0.3) -> Tree:
    """Random, vectors near one."""
    specs = {parse_spec(k, v).stored: parse_spec(k, v) for k, v in _entries(program)}

    def make(leaf):
        rng = np.random.default_rng([seed, leaf.layer, *leaf.name.encode()])
        shape = specs[leaf.name].shape
        return jnp.asarray((len(shape) == 1) + scale * rng.standard_normal(shape), jnp.float32)

    return jax.tree.map(make, places(program.params))


def _entries(program: Program):
    for key, entry in program.params.items():
        yield from [(key, entry)] if isinstance(entry, str) else [(f"{key}.{k}", text) for k, text in entry.items()]


def vocab(program: Program, params: Tree) -> int:
    return jax.eval_shape(program.forward, params, jnp.zeros((1, 2), jnp.int32)).shape[-1]


def test_continued_text_is_prompts_and_what_is_likeliest_after_them(program: Program, tmp_path: Path) -> None:
    engine, text = Engine(program, arrays(program, 0)), np.arange(40, 60, dtype=np.int32)
    said = Continued(engine, [3], 9, seed=1, rows=4, folder=tmp_path, text=text, prompt=5, head=(3,))
    drawn, given = said.chunk(0), said.chunk(1)
    assert drawn.shape == given.shape == (4, 10) and len(list(tmp_path.iterdir())) == 2
    assert (given[:, 0] == 3).all() and (np.diff(given[:, 1:5], axis=1) == 1).all()  # a window of the text
    for row in (*drawn, *given):
        greedy = generate(engine, [row[:5].tolist()], max_new_tokens=5, stop_ids=())
        assert greedy.tokens[0] == row[5:].tolist()
    other = Continued(engine, [3], 9, seed=1, rows=4, folder=tmp_path, text=text + 1, prompt=5, head=(3,))
    assert not np.array_equal(other.chunk(1)[:, 1:5], given[:, 1:5])  # another text is not read from what was kept


def test_own_text_is_made_once_and_the_same(program: Program, tmp_path: Path) -> None:
    engine = Engine(program, arrays(program, 0))
    one, two = (OwnText(engine, [3], 10, seed=1, rows=4, most=2, folder=f) for f in (tmp_path / "kept", None))
    assert np.array_equal(one.chunk(0), two.chunk(0))
    assert one.chunk(0).shape == (4, 11) and (one.chunk(0)[:, 0] == 3).all()
    assert not np.array_equal(one.chunk(0), one.chunk(1))
    assert one.chunk(2) is one.chunk(0)  # no more than `most`, then they come again
    files = sorted(file.name for file in (tmp_path / "kept").iterdir())
    assert files == ["own-1-4x11-0000.npy", "own-1-4x11-0001.npy"]
    (tmp_path / "kept" / files[0]).write_bytes((tmp_path / "kept" / files[1]).read_bytes())
    again = OwnText(engine, [3], 10, seed=1, rows=4, most=2, folder=tmp_path / "kept")
    assert np.array_equal(again.chunk(0), one.chunk(1))  # read, not made anew
    seen = np.concatenate([two.batch(3, step)["tokens"] for step in range(4)])
    assert np.array_equal(seen, np.concatenate([two.chunk(0), two.chunk(1), two.chunk(0)]))


def test_on_policy_batches(program: Program) -> None:
    params = {"student": arrays(program, 0)}
    ids = np.random.default_rng(0).integers(0, vocab(program, params["student"]), 200)
    given = windows(ids, length=15, rows=2, seed=5)
    batches = on_policy(given, program.extend, lambda tree: tree["student"], 0.5, 5)
    all_of_them = [batches(step, params) for step in range(8)]
    own = [b for b in all_of_them if not b["gold"].any()]
    assert 0 < len(own) < 8
    for step, batch in enumerate(all_of_them):
        text = given(step, params)["tokens"]
        assert np.array_equal(batch["tokens"][:, :2], text[:, :2])
        assert np.array_equal(batch["tokens"], text) == bool(batch["gold"].any())
        assert batch["mask"].sum() == (30 if batch["gold"].any() else 28)  # the beginning was not written
    step = next(i for i, b in enumerate(all_of_them) if not b["gold"].any())
    assert np.array_equal(batches(step, params)["tokens"], all_of_them[step]["tokens"])
    other = batches(step, {"student": arrays(program, 1)})
    assert not np.array_equal(other["tokens"], all_of_them[step]["tokens"])  # it is the student that writes


def test_what_is_written_follows_the_students_distribution(program: Program) -> None:
    """How often a token follows in two hundred rows is the model's own probability."""
    params = arrays(program, 0, scale=0.5)
    batches = on_policy(windows(np.full(50, 7), length=1, rows=4), program.extend, lambda tree: tree, 1.0, 0)
    drawn = np.concatenate([batches(step, params)["tokens"][:, 1] for step in range(50)])
    told = jax.nn.softmax(program.forward(params, jnp.full((1, 1), 7))[0, 0])
    often = np.bincount(drawn, minlength=told.size) / 200
    assert 0.5 * np.abs(often - np.asarray(told)).sum() < 0.35  # of random draws about 0.15
    assert np.argmax(often) in np.argsort(told)[-3:]


@pytest.mark.parametrize("share", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_a_student_comes_near_its_teacher(program: Program, share: float) -> None:
    teacher, student = arrays(program, 0), arrays(program, 1)
    ids = np.random.default_rng(0).integers(0, vocab(program, teacher), 400).astype(np.int32)
    tree, batches = {"student": student, "teacher": teacher}, windows(ids, length=15, rows=4)
    batches = on_policy(batches, program.extend, lambda tree: tree["student"], share, 0) if share else batches
    look = judge(program.forward, teacher, program.forward, ids[:64].reshape(2, 32))
    loss = Objective("jsd", alpha=0.9).loss(program.forward, program.forward)
    plan = Plan(Budget(steps=30), lr=0.02, looks=0)
    fitted = fit(
        loss, tree, batches, plan,
        trainable={"student": True, "teacher": False}, evaluate=lambda tree: look(tree["student"]),
    )  # fmt: skip
    first, last = (look.values["kl"] for look in fitted.looks)
    assert last < 0.7 * first
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), fitted.params["teacher"], teacher)
    assert all(jax.tree.leaves(same))


def test_a_judge_tells_a_model_from_itself(program: Program) -> None:
    params = arrays(program, 0)
    tokens = np.random.default_rng(0).integers(0, vocab(program, params), (3, 8)).astype(np.int32)
    told = judge(program.forward, params, program.forward, tokens, context=2)(params)
    logits = jax.nn.log_softmax(program.forward(params, jnp.asarray(tokens)))
    want = -np.take_along_axis(np.asarray(logits)[:, 1:-1], tokens[:, 2:, None], -1).mean()
    assert told["perplexity"] == pytest.approx(np.exp(want), rel=1e-4)
    assert told["kl"] == pytest.approx(0, abs=1e-6) and told["top1"] == 1


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_an_objective_at_its_ends(program: Program, alpha: float) -> None:
    from effc.runtime.train import Tick, cross_entropy, forward_kl

    tree = {"student": arrays(program, 0), "teacher": arrays(program, 1)}
    tokens = np.random.default_rng(0).integers(0, 50, (2, 6))
    batch = {"tokens": tokens, "mask": np.ones((2, 5), bool)}
    tick = Tick(jax.random.key(0), jnp.int32(0), jnp.float32(0))
    told, metrics = Objective(alpha=alpha).loss(program.forward, program.forward)(tree, batch, tick)
    logits = [program.forward(tree[k], jnp.asarray(tokens[:, :-1])) for k in ("teacher", "student")]
    want = forward_kl(*logits) if alpha else cross_entropy(logits[1], jnp.asarray(tokens[:, 1:]))
    assert float(told) == pytest.approx(float(want.mean()), rel=1e-5)
    assert ("apart" in metrics) == bool(alpha) and metrics["count"] == 10


def test_refused(program: Program) -> None:
    with pytest.raises(EffcError, match="want a fraction"):
        on_policy(windows(np.arange(9), length=3, rows=1), program.extend, lambda tree: tree, -0.1, 0)
    with pytest.raises(EffcError, match=r"alpha 1\.5"):
        Objective(alpha=1.5)
