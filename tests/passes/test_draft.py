"""The draft pass: what it attaches, what it refuses, what its planner makes of measured numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from effc.backend.to_python import emit, load_program
from effc.errors import EffcError
from effc.ir.core import Decode, Module, Param, Ref
from effc.ir.parser import parse
from effc.ir.printer import dump
from effc.ir.types import Type
from effc.ir.verify import verify
from effc.passes.base import Notes
from effc.passes.draft import Draft
from effc.passes.draft import train as draft_train
from effc.passes.draft.lesson import Lesson
from effc.passes.draft.model import attached
from effc.passes.draft.plan import Costs, forecast
from effc.passes.quant8 import Quant8
from effc.runtime.generate import Drafted
from effc.weights import Lazy, Store, parts
from tests.runtime.conftest import TINY


@pytest.fixture(scope="module")
def tiny() -> Module:
    return parse(TINY.read_text())


def store_of(module: Module) -> Store:
    """Random arrays for plain parameters."""

    def lazy(param: Param) -> Lazy:
        shape = parts(param.type)[""].shape
        return Lazy(param, lambda i: {"": np.random.default_rng(i).standard_normal(shape, np.float32)})

    return Store({name: lazy(param) for name, param in module.params.items()})


@pytest.mark.parametrize(
    ("made_by", "entries", "shown"),
    [
        (Draft(), [], "decode speculative { forward=@forward, kind=lookup, gamma=7 }"),
        (Draft(kind="head", vocab=16), ["draft", "verify"], "verify=@verify, gamma=3, vocab=@draft.ids }"),
        (Draft(kind="head", vocab=0), ["draft", "verify"], "kind=head, drafter=@draft, verify=@verify, gamma=3 }"),
        (Draft(kind="self", layers=2, vocab=0), ["draft"], "kind=self, drafter=@draft, shared=true, gamma=3 }"),
        (Draft(kind="int4", gamma=2), ["draft"], "kind=model, drafter=@draft, gamma=2 }"),
    ],
    ids=["lookup", "head", "head-all", "self", "int4"],
)
def test_what_is_attached_is_legal_text_and_runs(tiny: Module, made_by: Draft, entries: list[str], shown: str) -> None:
    after = made_by.run(tiny, Notes())
    assert verify(after) == [] and parse(dump(after)) == after and shown in dump(after)
    program = load_program(emit(after))
    assert sorted(program.entries) == entries and program.decode["strategy"] == "speculative"
    assert after.funcs["forward"] == tiny.funcs["forward"]
    store = made_by.weights(tiny, after, store_of(tiny))
    for name, param in after.params.items():
        arrays = store[name].read(0)
        assert {k: a.shape for k, a in arrays.items()} == {k: p.shape for k, p in parts(param.type).items()}


def test_quantizers_code_what_was_attached(tiny: Module) -> None:
    after = Quant8().run(Draft(kind="head", vocab=0).run(tiny, Notes()), Notes())
    assert verify(after) == [] and str(after.params["draft.reads.tokens.w"].type).startswith("q8")


@pytest.mark.parametrize(
    ("made_by", "decode", "message"),
    [
        (Draft(kind="self", layers=3), None, "layers=3, want 1 to 2: fewer than the model has"),
        (Draft(kind="model"), None, "kind=model and model=PATH go together"),
        (Draft(gamma=-1), None, "gamma, layers and vocab, want 0 or more"),
        (Draft(), Decode("speculative", {}), "decode is speculative already, want greedy"),
    ],
)
def test_what_cannot_be_is_refused(tiny: Module, made_by: Draft, decode: Decode | None, message: str) -> None:
    module = replace(tiny, decode=decode) if decode else tiny

    def attach() -> None:
        made_by.requires(module)
        made_by.run(module, Notes())

    with pytest.raises(EffcError, match=message):
        attach()


def test_another_vocabulary_is_refused(tiny: Module) -> None:
    other = parse(TINY.read_text().replace("f32[64,32]", "f32[96,32]").replace("f32[b,t,64]", "f32[b,t,96]"))
    with pytest.raises(EffcError, match="has logits of 96 tokens, want 64"):
        attached(tiny, other)


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"kind": "lookpu"}, "kind=lookpu, want lookup"),
        ({"gamma": -1}, "gamma=-1, want the tokens of a draft"),
        ({"gama": 2}, "no setting 'gama'; did you mean 'gamma'?"),
        ({"kind": "model"}, "kind=model wants a function `drafter`"),
        ({"drafter": Ref("forward")}, "kind=lookup has a function `drafter`"),
        ({"curve": "steep"}, "curve is no tuple of numbers"),
    ],
)
def test_a_wrong_decode_is_told(tiny: Module, attrs: dict[str, object], message: str) -> None:
    after = Draft().run(tiny, Notes())
    assert after.decode is not None
    wrong = replace(after, decode=replace(after.decode, attrs={**after.decode.attrs, **attrs}))
    assert any(message in str(fault) for fault in verify(wrong)), verify(wrong)


def test_a_vocabulary_of_another_size_is_told(tiny: Module) -> None:
    after = Draft(kind="head", vocab=16).run(tiny, Notes())
    wrong = after.with_params(replace(after.params["draft.ids"], type=Type("i32", (17,))))
    assert any("@draft.ids is i32[17], want i32[16]" in str(fault) for fault in verify(wrong))


def counts(accepted: tuple[int, ...]) -> Drafted:
    return Drafted(100, 300, sum(accepted), 100 + sum(accepted), (100,) * 3, accepted, {0: 0, 3: 100}, 0, 0)


def test_the_forecast_is_tokens_over_costs() -> None:
    costs = Costs((1.0, 1.1, 1.2, 1.3), 0.05, 0.01)
    found = forecast(counts((80, 60, 50)), costs, range(1, 4))
    assert (found.gamma, found.speedup) == (3, pytest.approx((1 + 0.8 + 0.6 + 0.5) / (1.3 + 3 * 0.05)))
    assert forecast(counts((80, 1, 0)), costs, range(1, 4)).gamma == 1
    assert forecast(counts((5, 0, 0)), costs, range(1, 4)).speedup < 1


def test_the_drafter_learns_the_tokens_said_most() -> None:
    logits = np.zeros((1, 2, 2), np.float32)
    spans, ids = np.asarray([[1, 2]], np.int32), np.asarray([[[5, 2], [5, 7]]])
    lesson = Lesson([{"tokens": np.zeros((1, 2), np.int32), "spans": spans, "ids": ids, "logits": logits}])
    assert draft_train.frequent(lesson, 2, 9).tolist() == [2, 5]
    assert draft_train.frequent(lesson, 4, 9).tolist() == [0, 2, 5, 7]
