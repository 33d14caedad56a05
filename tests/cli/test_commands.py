"""The verbs on a real, small checkpoint and the artifact made of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effc import driver
from effc.cli import main
from effc.errors import EffcError
from effc.ir import dump, parse

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def said(capsys: Capture) -> Callable[..., str]:
    """What a command prints; it must succeed."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run


Said = Callable[..., str]


def test_optimize_alone_writes_beside_where_it_runs(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def told(source: object, out: Path, *rest: object) -> None:
        raise EffcError(f"it goes to {out}")

    monkeypatch.setattr(driver, "optimize", told)
    assert main(["optimize", str(tiny), "--passes", "quant4"]) == 1
    assert capsys.readouterr().err == f"effc: it goes to {tiny.name}-effc\n"


def test_optimize_reports_and_leaves_an_artifact(artifact: Path, said: Said) -> None:
    names = {p.name for p in artifact.iterdir()}
    assert {"manifest.json", "model.effc", "model.safetensors", "tokenizer.json", "program.py"} <= names
    assert {"report.json", "report.html"} <= names
    assert said("verify", artifact) == f"{artifact}: good\n"
    report = json.loads((artifact / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["bytes"] / 8 < after["bytes"] < before["bytes"] / 4
    assert math.isfinite(after["quality"]["kl"]) and after["quality"]["kl"] > 0


def test_optimize_json_is_the_report(tiny: Path, text: Path, tmp_path: Path, said: Said) -> None:
    out = tmp_path / "out"
    found = json.loads(said("optimize", tiny, "-o", out, "--eval", text, "--no-speed", "--json"))
    assert found == json.loads((out / "report.json").read_text())
    assert found["before"]["bytes"] == found["after"]["bytes"]
    assert found["after"]["quality"]["kl"] == 0


def test_dry_run_writes_nothing(tiny: Path, tmp_path: Path, said: Said) -> None:
    found = json.loads(said("optimize", tiny, "--passes", "quant8", "--dry-run", "--json"))
    assert found["after"]["bytes"] < found["before"]["bytes"] / 2
    assert found["passes"][0]["pass"] == "quant8"
    assert "dry run" in said("optimize", tiny, "--passes", "quant8", "--dry-run", "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_hand_edited_dump_takes_effect(tiny: Path, text: Path, tmp_path: Path, said: Said) -> None:
    """dump -> edit the group size -> opt -> optimize --ir: the artifact is coded as the edit says."""
    dumps, edited, after, out = (tmp_path / name for name in ("dumps", "edited.effc", "after.effc", "out"))
    said("optimize", tiny, "--passes", "quant4{group=16}", "--dry-run", "--dump", dumps)
    before = (dumps / "01-quant4.effc").read_text()
    edited.write_text(before.replace("q4{group=16", "q4{group=8"))
    assert edited.read_text() != before
    said("opt", edited, "-o", after)
    assert after.read_text() == dump(parse(edited.read_text()))
    said("optimize", tiny, "--ir", after, "--eval", text, "--no-speed", "-o", out)
    module = parse((out / "model.effc").read_text())
    coded = [str(p.type.dtype) for p in module.params.values() if str(p.type.dtype).startswith("q4")]
    assert coded and all(kind.startswith("q4{group=8,") for kind in coded)
    assert "~ param" in said("diff", dumps / "01-quant4.effc", out)
    assert said("verify", out) == f"{out}: good\n"


def test_every_dump_parses_back(tiny: Path, tmp_path: Path, said: Said, capsys: Capture) -> None:
    said("optimize", tiny, "--passes", "clean,quant8,fuse", "--dry-run", "--dump", tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["00-input.effc", "01-clean.effc", "02-quant8.effc", "03-fuse.effc"]
    for file in files:
        assert dump(parse(file.read_text())) == file.read_text()


def test_print_ir_after_all(tiny: Path, capsys: Capture) -> None:
    assert main(["optimize", str(tiny), "--passes", "clean", "--dry-run", "--print-ir-after-all"]) == 0
    assert capsys.readouterr().err.count("module @tiny {") == 2


def test_inspect_an_artifact_and_a_checkpoint(artifact: Path, tiny: Path, said: Said) -> None:
    shown = said("inspect", artifact)
    assert "q4{" in shown and "@layer x2" in shown
    one, two = (json.loads(said("inspect", path, "--json")) for path in (tiny, artifact))
    assert one["weights"] == two["weights"] and one["bytes"] > 4 * two["bytes"]
    assert one["raised"]["attention"] == 1 and not one["whole"]
    assert said("inspect", artifact, "--ir") == (artifact / "model.effc").read_text()


def test_diff_of_checkpoint_and_artifact(artifact: Path, tiny: Path, said: Said) -> None:
    lines = said("diff", tiny, artifact).splitlines()
    assert lines[0] == "params:"
    assert all(line.startswith("  ~ param ") for line in lines[1:])


# -- generate -----------------------------------------------------------------------------------------------


def test_generate_streams_what_json_tells(artifact: Path, said: Said, capsys: Capture) -> None:
    ask = ("generate", artifact, "--prompt", "The quick", "--max-tokens", 20)
    found = json.loads(said(*ask, "--json"))
    (output,) = found["outputs"]
    assert len(output["tokens"]) == 20 and output["finish"] == "length"
    assert found["stats"]["new_tokens"] == 20
    assert said(*ask) == output["text"] + "\n"
    assert main([str(w) for w in (*ask, "--stats")]) == 0
    assert "new 20 tokens, " in capsys.readouterr().err


def test_generate_batch_is_each_alone(artifact: Path, tmp_path: Path, said: Said) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("The quick\nfox\n")
    both = json.loads(said("generate", artifact, "--batch", file, "--max-tokens", 12, "--json"))["outputs"]
    assert [row["prompt"] for row in both] == ["The quick", "fox"]
    for row in both:
        alone = json.loads(said("generate", artifact, "--prompt", row["prompt"], "--max-tokens", 12, "--json"))
        assert alone["outputs"][0] == row
    shown = said("generate", artifact, "--batch", file, "--max-tokens", 12)
    assert shown.startswith(f"=== The quick\n{both[0]['text']}")


def test_generate_stops_before_a_stop_string(artifact: Path, said: Said) -> None:
    ask = ("generate", artifact, "--prompt", "fox", "--max-tokens", 20)
    whole = json.loads(said(*ask, "--json"))["outputs"][0]["text"]
    stop = whole[7:9]
    cut = whole[: whole.index(stop)]
    found = json.loads(said(*ask, "--stop", stop, "--json"))["outputs"][0]
    assert (found["text"], found["finish"]) == (cut, "stop")
    assert said(*ask, "--stop", stop) == cut + "\n"


def test_generate_seeds(artifact: Path, said: Said) -> None:
    def text(seed: int) -> str:
        hot = (
            "--temperature",
            2.0,
            "--top-k",
            50,
            "--top-p",
            0.99,
            "--min-p",
            0.001,
            "--repetition-penalty",
            1.1,
        )
        return said("generate", artifact, "--prompt", "fox", "--max-tokens", 16, *hot, "--seed", seed)

    assert text(1) == text(1) != text(2)


def test_generate_compiles_a_checkpoint_on_the_fly(tiny: Path, said: Said) -> None:
    found = json.loads(said("generate", tiny, "--prompt", "fox", "--max-tokens", 8, "--json"))
    assert len(found["outputs"][0]["tokens"]) == 8


def test_generate_from_stdin(artifact: Path, said: Said, monkeypatch: Any) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("The quick"))
    ask = ("generate", artifact, "--max-tokens", 8, "--prompt")
    assert said(*ask, "-") == said(*ask, "The quick")


def test_chat_needs_a_template(artifact: Path, tmp_path: Path, said: Said, capsys: Capture) -> None:
    assert main(["generate", str(artifact), "--chat", "--prompt", "hi"]) == 1
    assert "no chat template" in capsys.readouterr().err
    chat = shutil.copytree(artifact, tmp_path / "chat")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (chat / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    manifest = json.loads((chat / "manifest.json").read_text())
    manifest["tokenizer"].append("tokenizer_config.json")
    (chat / "manifest.json").write_text(json.dumps(manifest))
    ask = ("--max-tokens", 8, "--prompt")
    assert said("generate", chat, "--chat", *ask, "hi") == said("generate", artifact, *ask, "<user>hi<assistant>")


# -- measure ------------------------------------------------------------------------------------------------


def test_eval_against(artifact: Path, tiny: Path, text: Path, said: Said) -> None:
    found = json.loads(said("eval", artifact, "--text", text, "--against", tiny, "--json"))
    assert found["tokens"] > 0
    mine, other = found["models"][str(artifact)], found["models"][f"{tiny} (against)"]
    report = json.loads((artifact / "report.json").read_text())
    assert mine["perplexity"] == pytest.approx(report["after"]["quality"]["perplexity"], rel=0.02)
    assert other["kl"] is None and mine["kl"] > 0 and 0 < mine["top1"] <= 1
    alone = json.loads(said("eval", tiny, "--text", text, "--json"))["models"][str(tiny)]
    assert alone["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)


def test_eval_against_itself_is_no_distance(artifact: Path, text: Path, said: Said) -> None:
    found = json.loads(said("eval", artifact, "--text", text, "--against", artifact, "--json"))
    mine = found["models"][str(artifact)]
    assert mine["kl"] == 0 and mine["top1"] == 1


def test_bench_in_turn(artifact: Path, tiny: Path, said: Said) -> None:
    found = json.loads(said("bench", artifact, "--against", tiny, "-n", 8, "-r", 2, "--json"))
    assert (found["prompt"], found["new"], found["runs"]) == (56, 8, 2)
    for model in found["models"]:
        assert len(model["pp"]) == len(model["tg"]) == 2
        read = model["token_bytes"] + model["cache_bytes"]
        assert model["cache_bytes"] > 0 and model["gb_per_second"] == pytest.approx(read * model["tg_mean"] / 1e9)
    assert found["models"][0]["token_bytes"] < found["models"][1]["token_bytes"] / 4
    assert set(found["ratios"]) == {"pp", "tg"}
    assert "tg4" in said("bench", artifact, "-n", 4, "-r", 1)


@pytest.mark.slow
def test_export_writes_programs_that_run(tiny: Path, text: Path, tmp_path: Path, said: Said) -> None:
    from effc.backend.to_stablehlo import load_exported

    out = tmp_path / "out"
    said("optimize", tiny, "--export", "--eval", text, "--no-speed", "-o", out)
    assert {p.name for p in (out / "stablehlo").iterdir()} == {"prefill.bin", "decode.bin", "README.md"}
    assert callable(load_exported(out / "stablehlo" / "decode.bin"))
    assert said("verify", out) == f"{out}: good\n"
