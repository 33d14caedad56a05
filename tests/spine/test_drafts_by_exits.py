"""calm and draft together: exits draft, all layers verify, and what skipped layers kept is written again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effc.errors import EffcError
from effc.ir.core import Module
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.passes import runner
from effc.passes.draft.plan import decoding, served
from effc.pipeline import Pipeline
from effc.runtime.cache import Cache
from effc.runtime.chain import Chain
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.weights import Store

PASSES = Path(__file__).parents[1] / "passes"
PROMPTS = [[5, 9, 40, 7, 101], [77, 3]]


def whole(machine: Engine, prompt: list[int], new: int) -> list[int]:
    """Greedy text by the forward function alone, without a cache."""
    tokens = [*prompt]
    for _ in range(new):
        padded = jnp.asarray([tokens + [0] * (32 - len(tokens))])
        tokens.append(int(jnp.argmax(machine.forward(machine.params, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def eager(machine: Engine, module: Module) -> Engine:
    """One that drafts as if that cost nothing: untrained exits are seldom right, and a plan would leave them out."""
    assert module.decode is not None
    attrs = {"gamma": 2, "curve": (1.0,) * 3, "cost": 0.0, "acceptance": (0.99,) * 11}
    return decoding(machine, replace(module, decode=replace(module.decode, attrs={**module.decode.attrs, **attrs})))


@pytest.fixture
def exits_draft(random_store: Callable[[Module], Store], tmp_path: Path) -> Callable[[str], Engine]:
    """The tiny model through a pipeline, untrained, as an engine that drafts whether that pays or not."""

    def make(passes: str) -> Engine:
        module = parse((PASSES / "tiny.effc").read_text().replace("2 * f32", "6 * f32").replace("times=2", "times=6"))
        store = random_store(module)
        for step in runner.run(module, Pipeline.parse(passes).ordered()):
            module, store = step.after, step.made_by.weights(step.before, step.after, store)
        assert module.decode is not None and module.decode.attrs["kind"] == "exits"
        assert parse(dump(module)) == module
        return eager(served(module, store), module)

    return make


def test_drafts_by_exits_leave_the_text_as_the_full_model_writes_it(exits_draft: Callable[[str], Engine]) -> None:
    machine = exits_draft("draft{gamma=2},calm{first=2,every=2}")
    result = generate(machine, PROMPTS, max_new_tokens=20)
    assert result.tokens == [whole(machine, prompt, 20) for prompt in PROMPTS]
    drafts = result.stats.draft
    assert drafts is not None and 0 < drafts.accepted < drafts.drafted
    rows_are_written_again(machine)


def rows_are_written_again(machine: Engine) -> None:
    """Drafts leave other rows in the skipped layers' caches than the model does; verification leaves the model's."""
    assert machine.speculation is not None and isinstance(machine.speculation.drafter, Chain)
    extend, draft = jax.jit(machine.program.extend), jax.jit(machine.speculation.drafter.entry)
    tokens = jnp.asarray([[4, 8, 15, 16, 23]])
    _, before = extend(machine.params, tokens[:, :3], machine.empty(1, 16))
    drafted = before
    for i in (3, 4):
        _, drafted = draft(machine.params, tokens[:, i : i + 1], drafted)
    _, wanted = extend(machine.params, tokens[:, 3:], before)
    _, verified = extend(machine.params, tokens[:, 3:], Cache(before.lengths, drafted.entries))
    pairs = zip(jax.tree.leaves(drafted.entries), jax.tree.leaves(wanted.entries), strict=True)
    assert not all(np.allclose(a, b, atol=1e-3) for a, b in pairs)
    for a, b in zip(jax.tree.leaves(verified), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_drafts_by_exits_of_coded_layers(exits_draft: Callable[[str], Engine]) -> None:
    machine = exits_draft("quant4,calm{first=2,every=2},draft{gamma=2}")
    result = generate(machine, PROMPTS, max_new_tokens=20)
    machine.speculation = None
    assert result.tokens == generate(machine, PROMPTS, max_new_tokens=20).tokens


def test_drafts_by_an_exit_whose_state_is_shared_leave_the_rows_that_verification_writes(
    exits_draft: Callable[[str], Engine],
) -> None:
    machine = exits_draft("draft{gamma=2},calm{first=2,state=shared,finetune=true,head=own}")
    result = generate(machine, PROMPTS, max_new_tokens=20)
    assert result.tokens == [whole(machine, prompt, 20) for prompt in PROMPTS]
    assert result.stats.draft is not None and 0 < result.stats.draft.accepted < result.stats.draft.drafted


def test_drafts_defer_no_layers_since_verification_runs_them() -> None:
    text = (PASSES / "tiny.effc").read_text().replace("2 * f32", "6 * f32").replace("times=2", "times=6")
    after = runner.run(parse(text), Pipeline.parse("calm{first=2,state=deferred},draft").ordered())[-1].after
    (op,) = (op for op in after.funcs["early"].ops if op.kind == "early")
    assert op.attrs["exits"] == (2,) and not {"state", "waiting"} & set(op.attrs)


def test_what_cannot_draft_by_exits_is_refused() -> None:
    assert [p.name for p in Pipeline.parse("draft,quant4,calm").ordered()] == ["calm", "draft", "quant4"]
    with pytest.raises(EffcError, match=r"'calm' and 'draft.kind=self.*write draft.kind=exits"):
        Pipeline.parse("calm,draft{kind=self}")
