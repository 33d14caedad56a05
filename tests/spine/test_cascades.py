"""Cascades from pipeline to artifact: certified, bound to what they were certified for, served as the IR says."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from effc import certificate
from effc.errors import EffcError
from effc.ir.core import Module
from effc.passes.cascade import calibrate, texts
from effc.passes.cascade.small import with_decode
from effc.passes.draft import plan
from effc.report import PassReport, Report, Side
from effc.runtime.deferral import GRIDS
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from effc.weights import Store

PROMPT = np.random.default_rng(5).integers(0, 160, 12).tolist()
FEW = "prompt=4,tokens=4,delta=0.5,gamma=1,force=true,curve=0"
"""Little to generate and to measure."""


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed here is not looked at."""
    monkeypatch.setattr(plan, "RUNS", 2)
    monkeypatch.setattr(texts, "ROUNDS", 1)
    monkeypatch.setattr(texts, "TIMED", 1)


def greedy(machine: Engine, prompt: list[int], new: int) -> list[int]:
    """One token after the other, by the large model."""
    cache, out, fed = machine.empty(1, 64), list[int](), prompt
    for _ in range(new):
        logits, cache = machine.extend(jnp.asarray([fed]), cache)
        out.append(int(np.argmax(logits[0, -1])))
        fed = out[-1:]
    return out


def check_bound(module: Module, store: Store) -> None:
    """The certificate holds for these weights and settings alone."""
    certificate.check(module, store, "out")
    assert module.decode is not None
    for attrs in ({"alpha": 0.75}, {"threshold": 0.01}, {"tokens": 400}, {"gamma": 3}):
        told = replace(module, decode=replace(module.decode, attrs={**module.decode.attrs, **attrs}))
        with pytest.raises(EffcError, match="out: the cascade was calibrated for other weights or settings"):
            certificate.check(told, store, "out")
    name = next(n for n in module.params if n.endswith("norm1"))
    with pytest.raises(EffcError, match="the cascade was calibrated for other weights"):
        certificate.check(module, {**store, name: store["layers.norm2"]}, "out")


WHOLE = {
    "rule-quant8": f"speccascade{{kind=int4,prompts=24,{FEW}}},quant8",
    "rule-quant4": f"speccascade{{kind=int4,prompts=24,rule=opt,{FEW}}},quant4",
    "sequence-quant4": f"cascade{{kind=int4,prompts=24,{FEW}}},quant4",
    "sequence-quant8": f"cascade{{kind=int4,prompts=24,{FEW}}},quant8",
    "token-quant8": f"cascade{{kind=int4,level=token,prompts=24,{FEW}}},quant8",
    "token-trained": f"cascade{{layers=2,level=token,prompts=24,{FEW}}}",
}


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs and speeds as if measured."""
    monkeypatch.setattr(plan, "foreseen", lambda made_by, module, *_: with_decode(module, "speculative", gamma=1))
    speeds = {calibrate.PLAIN: 1.0, calibrate.SPECULATION: 1.1, calibrate.CASCADED: 1.2}
    monkeypatch.setattr(texts.Prompts, "race", lambda self, engines: speeds)


def test_a_rule_is_certified_bound_and_served(served, unmeasured: None) -> None:
    check_served(served(f"speccascade{{kind=int4,prompts=24,{FEW}}}"))


@pytest.mark.slow
@pytest.mark.parametrize("passes", WHOLE.values(), ids=WHOLE.keys())
def test_a_cascade_is_certified_bound_and_served(passes: str, served) -> None:
    check_served(served(passes))


def check_served(found) -> None:
    """The certificate is of the setting that runs, and texts are those that the IR says."""
    decode, (told, *_) = found.module.decode, found.reports
    assert decode is not None and told.measured["kind"] == "cascade" and told.measured["n"] == 24
    assert any(told.measured["tried"]) and told.measured["certified"] is not None, told.measured
    assert decode.attrs["delta"] == 0.5 and decode.attrs["n"] == 24 and decode.attrs["tokens"] == 4
    check_bound(found.module, found.store)
    setting = "threshold" if decode.attrs.get("level") == "sequence" else "alpha"
    assert decode.attrs[setting] == told.measured["certified"]
    engine, alone = found.engine, greedy(found.engine, PROMPT, 12)
    said = generate(engine, [PROMPT], max_new_tokens=12)
    kept = said.tokens[0][:4] if setting == "alpha" else []
    # Past what is certified the large model goes on by itself.
    assert said.tokens[0] == kept + greedy(engine, PROMPT + kept, 12 - len(kept))
    full = generate(engine, [PROMPT], max_new_tokens=12, exits=1.0, alpha=-float("inf"))
    assert full.tokens[0] == alone and (said.stats.answers or said.stats.draft)


def test_too_few_prompts_fall_back_to_plain_speculation_and_say_how_many_are_wanted(served, unmeasured: None) -> None:
    found = served(f"speccascade{{kind=int4,prompts=10,{FEW.replace('0.5', '0.05')}}}")
    decode, (told, *_) = found.module.decode, found.reports
    assert decode is not None and decode.strategy == "speculative" and decode.attrs["gamma"] == 1
    assert not {"rule", "alpha", "bound", "delta"} & decode.attrs.keys()
    assert told.choices[0] == (
        "plain speculation, the large model's own text: 10 calibration prompts, want 59 at least for delta 0.05"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "way"),
    [
        ("speccascade{kind=int4,rule=opt,alpha=0.1,prompt=4,tokens=4,gamma=1,curve=2},quant8", ("opt", "by hand")),
        ("cascade{kind=int4,prompts=24,prompt=4,tokens=4,delta=0.5,gamma=1,curve=2},quant4", ("answer", "certified")),
    ],
)
def test_the_report_has_the_curve_of_every_rule(passes: str, way: tuple[str, str], served) -> None:
    (told, *_) = served(passes).reports
    rows = told.measured["curve"]["rows"]
    assert {row["way"] for row in rows} == {"large", "small", "speculation", *GRIDS, "token", "answer"}
    assert [(row["way"], row["mark"]) for row in rows if row["mark"]] == [way]
    assert any(line.startswith(f"{way[1]}, on 2 prompts: {way[0]} ") for line in told.measured["summary"])
    page = Report("m", "", "lossy", "", Side(1, 4, 4), Side(1, 4, 4), [told]).html()
    assert page.count("<circle") == len(rows) and "nan" not in page


@pytest.mark.slow
def test_nothing_certified_leaves_the_large_model_alone(served) -> None:
    found = served(f"cascade{{kind=int4,prompts=10,{FEW.replace('0.5', '0.05')}}}")
    decode, (told, *_) = found.module.decode, found.reports
    assert decode is not None and decode.attrs["threshold"] == 1.0 and "bound" not in decode.attrs
    assert "10 calibration prompts, want 59 at least" in told.choices[0]
    assert generate(found.engine, [PROMPT], max_new_tokens=8).tokens[0] == greedy(found.engine, PROMPT, 8)


def test_the_page_shows_what_was_tried() -> None:
    tried = [
        {"alpha": -0.8, "loss": 0.0, "p": 1e-4, "certified": True, "deferral": 0.4},
        {"alpha": -0.6, "loss": 0.2, "p": 0.7, "certified": False, "deferral": 0.3},
    ]
    curve = {"prompts": 8, "rows": [{
        "way": "opt", "setting": -0.8, "mark": "certified", "loss": 0.01, "deferral": 0.4, "acceptance": 0.9,
        "large_calls": 20, "small_calls": 60, "rate": 110.0, "speed": 1.25,
    }]}  # fmt: skip
    measured = {"kind": "cascade", "rule": "opt", "tried": tried, "curve": curve}
    passes = [PassReport("speccascade", "guaranteed", 0.5, measured=measured)]
    page = Report("m", "speccascade", "guaranteed", "bounded", Side(1, 4, 4), Side(1, 4, 4), passes).html()
    assert '<th class="n">alpha</th>' in page and "0.2000" in page and "30.0 %" in page and "not certified" in page
    assert "<svg" in page and "&lt;svg" not in page and "x1.25" in page and "of 8 prompts" in page
