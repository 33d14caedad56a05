"""`inspect`, `opt`, `diff`, `passes`, `doctor` on an IR file: no weights needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from effc.cli import main
from effc.ir import dump, parse
from effc.passes import PASSES

IR = """effc 1
module @toy {
  meta { context = 32, vocab = 64 }
  param @embed: f32[64,32] = "embed/embedding"
  param @layers.norm: 2 * f32[32] = "layers_*/norm/scale"
  param @layers.up: 2 * f32[32,64] = "layers_*/up/kernel"
  param @layers.down: 2 * f32[64,32] = "layers_*/down/kernel"
  block @layer(%x: f32[b,t,32]) {
    %h: f32[b,t,32] = norm(%x) [scale=@layers.norm] {kind=rms, eps=1e-05}
    %u: f32[b,t,64] = linear(%h) [w=@layers.up]
    %a: f32[b,t,64] = silu(%u)
    %d: f32[b,t,32] = linear(%a) [w=@layers.down]
    %y: f32[b,t,32] = lax.add(%x, %d)
    return %y
  }
  func @forward(%tokens: i32[b,t]) {
    %x0: f32[b,t,32] = embed(%tokens) [table=@embed]
    %x1: f32[b,t,32] = repeat(%x0) {block=@layer, times=2}
    %logits: f32[b,t,64] = linear(%x1) [w=@embed] {layout=nk}
    return %logits
  }
  decode greedy { forward=@forward }
}
"""

Golden = Callable[..., None]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.effc"
    path.write_text(IR)
    return path


def test_inspect(file: Path, capsys: Capture, golden: Golden) -> None:
    assert main(["inspect", str(file)]) == 0
    golden(capsys.readouterr().out)


def test_inspect_json(file: Path, capsys: Capture) -> None:
    assert main(["inspect", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == 4 * found["weights"] == 4 * (64 * 32 + 2 * (32 + 32 * 64 * 2))
    assert {row["use"]: row["weights"] for row in found["parameters"]} == {
        "embedding + head": 2048,
        "norm scale": 64,
        "linear": 8192,
    }
    assert [part["times"] for part in found["structure"]] == [2, 1]


def test_inspect_says_what_is_not_raised_and_why(file: Path, capsys: Capture) -> None:
    product = """%s: f32[b,t] = lax.reduce_sum(%a) {axes=(2,)}
    %d: f32[b,t,32] = lax.dot_general(%s, %h) {contract=((),()), batch=((0,1),(0,1))}"""
    file.write_text(IR.replace("%d: f32[b,t,32] = linear(%a) [w=@layers.down]", product))
    assert main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unraised"] == [
        "lax.dot_general at @layer: %d: no linear: neither operand is a parameter"
    ]


def test_inspect_ir_prints_canonical_text(file: Path, capsys: Capture) -> None:
    assert main(["inspect", str(file), "--ir"]) == 0
    assert capsys.readouterr().out == dump(parse(IR))


def test_opt_without_passes_is_canonical_text(file: Path, capsys: Capture) -> None:
    assert main(["opt", str(file)]) == 0
    assert capsys.readouterr().out == dump(parse(IR))


def test_opt_writes_a_file(file: Path, tmp_path: Path, capsys: Capture, golden: Golden) -> None:
    out = tmp_path / "q4.effc"
    assert main(["opt", str(file), "--passes", "quant4", "-o", str(out)]) == 0
    assert capsys.readouterr().out == ""
    golden(out.read_text())


def test_a_hand_edited_group_size_takes_effect(file: Path, capsys: Capture) -> None:
    """The dump after quant4, edited, is IR like any other: passes that come after see the edit."""
    assert main(["opt", str(file), "--passes", "quant4"]) == 0
    coded = capsys.readouterr().out
    edited = coded.replace("q4{group=32", "q4{group=16")
    assert edited != coded
    file.write_text(edited)
    assert main(["opt", str(file), "--passes", "clean"]) == 0
    after = parse(capsys.readouterr().out)
    assert str(after.params["layers.down"].type).startswith("q4{group=16,")


def test_diff(file: Path, tmp_path: Path, capsys: Capture, golden: Golden) -> None:
    out = tmp_path / "q4.effc"
    main(["opt", str(file), "--passes", "quant4", "-o", str(out)])
    assert main(["diff", str(file), str(out)]) == 0
    golden(capsys.readouterr().out)


def test_diff_of_equals(file: Path, capsys: Capture) -> None:
    assert main(["diff", str(file), str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"same": True, "diff": []}


def test_opt_names_line_and_column(file: Path, capsys: Capture, golden: Golden) -> None:
    file.write_text(IR.replace("silu(%u)", "silu(%u"))
    assert main(["opt", str(file)]) == 1
    golden(capsys.readouterr().err.replace(str(file), "toy.effc"))


def test_opt_tells_all_faults(file: Path, capsys: Capture, golden: Golden) -> None:
    file.write_text(IR.replace("silu(%u)", "sillu(%u)").replace("[w=@layers.down]", "[w=@layers.dwn]"))
    assert main(["opt", str(file)]) == 1
    golden(capsys.readouterr().err.replace(str(file), "toy.effc"))


def test_passes_lists_all(capsys: Capture) -> None:
    assert main(["passes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PASSES)
    assert main(["passes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["passes"]
    assert [entry["name"] for entry in found] == list(PASSES)
    assert all(o["doc"] for entry in found for o in entry["options"])


def test_passes_of_one(capsys: Capture, golden: Golden) -> None:
    assert main(["passes", "quant8"]) == 0
    golden(capsys.readouterr().out)


def test_doctor(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    assert "jax" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["jax"] and found["jax"]["platform"] == "cpu" and not found["trouble"]
