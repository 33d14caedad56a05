"""Reading the TPU compiler's schedules, and the estimate made of them; dumps are small, made up, of the real form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from effc.backend.tpu import ahead, schedule
from effc.backend.tpu.abstract import abstract_params
from effc.backend.tpu.estimate import estimate
from effc.backend.tpu.hardware import generation
from effc.errors import EffcError
from effc.ir.parser import parse
from effc.passes.calm import Calm
from effc.passes.runner import step

CAPACITY = "== CAPACTIY:\nMATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU\n"
CAPACITY += "    4     4     3     4     2     1     3     3     1     1     2\n== UTILIZATION:\n"


def dump(loop: int, trip: int, skip: tuple[int, int] | None = None) -> tuple[str, str]:
    """A kernel of 3 bundles, a loop of `loop` bundles (4 delay slots among them) that tests for `trip`, and 2 after."""
    total, back = 3 + loop + 2, 3 + loop - 5
    lines = []
    for at in range(total):
        text = "%1 = vadd.f32 %2, %3"
        if skip and at == skip[0]:
            text = f"%7 = sbr.rel (%p8) target bundleno = {skip[1]} (0x0), region = 4"
        if at == back - 1:
            text = f"%p20_p7 = scmp.ge.s32.totalorder %s7, {trip} /* loop exit test */"
        if at == back:
            text = "%22 = sbr.rel (!%p20_p7) target bundleno = 3 (0x3), region = 1"
        lines.append(f"  {hex(at) if at else '0'}   : > {{ {text} }}")
    return "\n".join(lines), CAPACITY + "\n".join(["2 4 0 2 0 0 0 1 0 0 0"] * total)


def test_a_step_is_the_loop_and_its_trip_the_steps_and_two() -> None:
    found = schedule.parse("k", *dump(loop=40, trip=10))
    assert isinstance(found, schedule.Kernel)
    assert (found.step, found.steps, found.spills) == (40, 8, 40)
    assert found.units["MATMUL"] == 20 and found.units["MATPUSH"] == 40 and found.binding == ("MATPUSH", 40)


def test_what_a_step_jumps_over_is_not_counted() -> None:
    found = schedule.parse("k", *dump(loop=40, trip=10, skip=(10, 25)))
    assert isinstance(found, schedule.Kernel) and found.step == 40 - 10  # 15 on less 5 of the branch itself


def test_the_pipelines_own_stage_is_the_step() -> None:
    found = schedule.parse("k", *dump(loop=40, trip=10, skip=(4, 36)))
    assert isinstance(found, schedule.Kernel) and found.step == 40


def test_bodies_inside_of_the_pipelines_stage_run_now_and_then() -> None:
    """Or, of a kernel whose steps may have nothing to do, the longest of them is the step."""
    text, rows = dump(loop=60, trip=10, skip=(4, 56))
    lines = text.splitlines()
    for at, to in ((8, 17), (15, 45)):
        lines[at] = f"  {hex(at)}   : > {{ %7 = sbr.rel (%p8) target bundleno = {to} (0x0), region = 4 }}"
    found = schedule.parse("k", "\n".join(lines), rows)
    assert isinstance(found, schedule.Kernel) and (found.step, found.rare) == (60 - 4 - 25, 4 + 25)
    found = schedule.parse("k", "\n".join(lines), rows, conditional=True)
    assert isinstance(found, schedule.Kernel) and (found.step, found.rare) == (60 - 4, 4)


def test_no_number_is_given_where_the_dump_is_not_understood() -> None:
    bundles, rows = dump(loop=40, trip=10)
    found = schedule.parse("k", bundles, rows + "\n0 0 0 0 0 0 0 0 0 0 0")
    assert isinstance(found, schedule.Unparsed) and "45 bundles but 46 rows" in found.why
    untested = schedule.parse("k", bundles.replace("loop exit test", "another"), rows)
    assert isinstance(untested, schedule.Unparsed) and "depend on data" in untested.why


def test_an_estimate_is_fill_steps_and_what_is_around() -> None:
    chip = generation("v5e:2x2")
    kernel = {
        "name": "matmul_k", "calls": 2, "step_bytes": 546_000.0, "steps": 8, "cycles": 500, "units": {"VALU": 400.0},
        "spills": 0, "rare": 80, "times": 1, "vmem": 2 << 20,
    }  # fmt: skip
    found = {
        "tokens": 1, "kernels": [kernel], "ops": {"fusion": 4}, "copies": [], "around_cycles": 6000,
        "argument_bytes": 10**9, "temporary_bytes": 0, "program_bytes": 0,
    }  # fmt: skip
    made = estimate("decode", found, chip)
    [one] = made.kernels
    assert one.binding == "HBM" and one.ratio == pytest.approx((500 + 80 / 8) / 1000, rel=1e-3)
    assert one.seconds == pytest.approx(2 * (1000 + 7 * 1000 + 500) / 1.5e9, rel=1e-3), "80 more fit under HBM's"
    assert one.compute_seconds == pytest.approx(2 * (8 * 500 + 80) / 1.5e9)
    assert one.memory_seconds == pytest.approx(2 * 8 * 1000 / 1.5e9, rel=1e-3) and one.hbm_bytes == 8 * 546_000
    assert made.around_seconds == pytest.approx(6000 / 1.5e9 + 2 * 0.5e-6) and made.fits
    assert json.dumps(made.json())
    slow = estimate("decode", {**found, "kernels": [{**kernel, "rare": 700}]}, chip).kernels[0]
    assert slow.seconds - one.seconds == pytest.approx(2 * 200 / 1.5e9, rel=1e-2), "of 500 + 700, 1000 are hidden"
    assert ahead.Compiled("v5e:2x2", 1, [made]).table() and made.streamed == made.roofline > 0
    other = estimate("decode", {**found, "kernels": [{**kernel, "name": "attention_k"}]}, chip)
    assert (other.roofline, other.streamed) == (0, made.streamed) and "no kernel reads weights" in ahead._share(other)


def test_a_target_of_no_known_generation() -> None:
    with pytest.raises(EffcError, match=r"--target v5f:2x2: no such TPU, want one like .*; did you mean 'v5"):
        generation("v5f:2x2")
    with pytest.raises(EffcError, match=r"want one like .*v5e:2x2[^;]*$"):
        generation("v5e")


TINY = Path(__file__).parent.parent / "runtime" / "tiny.effc"


def test_parameters_as_shapes_in_the_form_that_kernels_read() -> None:
    table = {"layers": {"q": "3 * q4{group=32,sym,scale=f16}[64,48]"}, "norm": "f32[64]"}
    tree = abstract_params(table)
    assert len(tree["layers"]) == 3 and str(tree["layers"][0]["q"].codes.dtype) == "int4"
    scales = tree["layers"][0]["q"].scales
    assert scales.shape == (2, 128) and scales.dtype == "int16", "whole lanes, and halves as their bits"
    assert tree["norm"] == jax.ShapeDtypeStruct((64,), "float32")


def test_without_the_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EffcError, match=r"pip install 'effc\[tpu\]'"):
        ahead.compile_ahead(parse(TINY.read_text()), "v5e:2x2")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed")
@pytest.mark.parametrize("target", ["v5e:2x2", "v6e:2x2"])
def test_the_real_compiler_takes_a_module(target: str) -> None:
    made = ahead.compile_ahead(parse(TINY.read_text()), target, context=128)
    assert [program.name for program in made.programs] == ["decode", "verify", "prefill"]
    assert all(program.fits and program.seconds > 0 for program in made.programs)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed")
def test_programs_with_exits_are_told_of_too() -> None:
    """Layers past the exits stand in loops: their ops and cycles count."""
    module = step(Calm(), parse((TINY.parent.parent / "passes" / "tiny.effc").read_text())).after
    programs = {program.name: program for program in ahead.compile_ahead(module, "v5e:2x2", context=128).programs}
    names = {kernel.name: kernel.calls for kernel in programs["exits"].kernels}
    assert list(programs) == ["decode", "verify", "prefill", "exits"]
    assert {name: calls for name, calls in names.items() if "vocabulary" in name} == {
        "vocabulary_float32_nk_64x160_m1_c256": 2
    }
    assert programs["exits"].around_seconds > programs["decode"].around_seconds
    assert "all layers and exits" in "".join(ahead._lines(programs["exits"]))
