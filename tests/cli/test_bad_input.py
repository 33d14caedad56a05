"""What a user can get wrong: one clear line, exit 1, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effc import driver
from effc.cli import main

Refused = Callable[..., None]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to write: alone in its folder, so that leftovers show."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder / "out"


def optimize(model: Path, out: Path, *more: str) -> list[object]:
    return ["optimize", model, "-o", out, "--no-speed", *more]


def nothing_left(out: Path) -> bool:
    return list(out.parent.iterdir()) == []


def cut(file: Path, keep: float) -> None:
    os.truncate(file, int(file.stat().st_size * keep))


@pytest.mark.parametrize("keep", [0.0001, 0.5, 0.999])
def test_truncated_safetensors(copy: Path, out: Path, refused: Refused, keep: float) -> None:
    cut(copy / "model.safetensors", keep)
    refused(optimize(copy, out), "model.safetensors: ", "truncated")
    assert nothing_left(out)


@pytest.mark.parametrize("keep", [0.001, 0.5])
def test_truncated_gguf(tmp_path: Path, out: Path, refused: Refused, keep: float) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_tensor("token_embd.weight", np.ones((16, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    cut(file, keep)
    refused(optimize(file, out), "m.gguf: ", "truncated")
    assert nothing_left(out)


def change(copy: Path, name: str, make: Callable[[np.ndarray], np.ndarray]) -> None:
    file = copy / "model.safetensors"
    found = load_file(file)
    save_file(found | {name: make(found[name])}, file)


def test_wrong_shape(copy: Path, out: Path, refused: Refused) -> None:
    change(copy, "model.norm.weight", lambda x: np.ones(33, np.float32))
    refused(optimize(copy, out), "'model.norm.weight' is [33], want [32]")
    assert nothing_left(out)


@pytest.mark.parametrize("passes", ["", "quant4"])
def test_nan_weights(copy: Path, text: Path, out: Path, refused: Refused, passes: str) -> None:
    def spoil(x: np.ndarray) -> np.ndarray:
        x[3, 5] = np.nan
        return x

    change(copy, "model.layers.1.mlp.up_proj.weight", spoil)
    more = ("--passes", passes, "--eval", str(text))
    refused(optimize(copy, out, *more), "model.layers.1.mlp.up_proj.weight", "not finite")
    assert nothing_left(out)


def test_missing_tokenizer(copy: Path, out: Path, refused: Refused) -> None:
    (copy / "tokenizer.json").unlink()
    text = copy / "config.json"
    refused(optimize(copy, out, "--eval", str(text)), "no tokenizer", "tokenizer.json")
    assert nothing_left(out)
    refused(["generate", copy, "--prompt", "a"], "no tokenizer.json")
    refused(["eval", copy, "--text", text], "no tokenizer.json")


def test_unknown_pass(tiny: Path, out: Path, refused: Refused) -> None:
    refused(optimize(tiny, out, "--passes", "qant4"), "no pass 'qant4'", "did you mean 'quant4'?")
    assert nothing_left(out)


def test_misspelt_option_of_a_pass(tiny: Path, out: Path, refused: Refused) -> None:
    refused(optimize(tiny, out, "--passes", "quant4{grup=32}"), "quant4: no option 'grup'", "'group'?")
    refused(optimize(tiny, out, "--passes", "quant4{group=x}"), "quant4: group=x is not an int")
    assert nothing_left(out)


@pytest.mark.parametrize("name", ["draft", "speccascade", "cascade"])
def test_files_that_options_name_are_looked_for_first(
    name: str, tiny: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "lower", lambda source: pytest.fail("work began"))
    kind = "{kind=model," if name == "draft" else "{"
    asked = f"{name}{kind}model={tiny.with_name(tiny.name + 's')}}}"
    refused(optimize(tiny, out, "--passes", asked), f"{name}: model: ", "no such file or folder; did you mean")
    assert nothing_left(out)


def test_misspelt_option_of_the_command(tiny: Path, out: Path, refused: Refused) -> None:
    refused(optimize(tiny, out, "--calb", "x"), "optimize: no option '--calb'; did you mean '--calib'?")
    assert nothing_left(out)


def test_existing_output(tiny: Path, out: Path, refused: Refused) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    refused(optimize(tiny, out), "is there already", "--force")
    refused(optimize(tiny, out, "--force"), "is not an artifact")
    assert (out / "mine.txt").read_text() == "keep me"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_output_below_a_file(tiny: Path, out: Path, refused: Refused) -> None:
    out.write_text("a file")
    refused(optimize(tiny, out / "below"), "cannot be written")
    assert out.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(tiny: Path, out: Path, refused: Refused) -> None:
    out.parent.chmod(0o500)
    refused(optimize(tiny, out), "cannot be written")
    out.parent.chmod(0o700)
    assert nothing_left(out)


def test_missing_model_and_the_nearest(tiny: Path, out: Path, refused: Refused) -> None:
    refused(optimize(tiny.with_name("tinny"), out), "no such file or folder", "did you mean 'tiny'?")
    refused(["generate", tiny.with_name("tinny"), "--prompt", "a"], "no such file or folder")


def test_missing_text(tiny: Path, out: Path, refused: Refused) -> None:
    refused(optimize(tiny, out, "--eval", "no.txt"), "no.txt: No such file or directory")
    refused(["eval", tiny, "--text", "no.txt"], "no.txt: No such file or directory")
    refused(["generate", tiny, "--batch", "no.txt"], "no.txt: No such file or directory")
    assert nothing_left(out)


def test_context_is_a_limit(tiny: Path, refused: Refused) -> None:
    refused(["generate", tiny, "--prompt", "a" * 60, "--max-tokens", "10"], "60 prompt tokens", "64")


def test_an_artifact_that_was_changed(artifact: Path, tmp_path: Path, capsys: Any) -> None:
    spoilt = shutil.copytree(artifact, tmp_path / "spoilt")
    with (spoilt / "model.safetensors").open("r+b") as stream:
        stream.seek(-3, os.SEEK_END)
        stream.write(b"abc")
    assert main(["verify", str(artifact)]) == 0
    capsys.readouterr()
    assert main(["verify", str(spoilt)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "model.safetensors: changed" in err


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT interrupts, also where the shell started the tests in the background and has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("step", ["lower", "write_manifest"])
def test_interrupted(tiny: Path, text: Path, out: Path, capsys: Any, monkeypatch: Any, step: str) -> None:
    """A real SIGINT at a known place: exit 130, one line, no folder left."""
    monkeypatch.setattr(driver, step, lambda *args, **options: signal.raise_signal(signal.SIGINT))
    assert main([str(word) for word in optimize(tiny, out, "--eval", str(text))]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "effc: interrupted; nothing half-written is left"
    assert nothing_left(out)


@pytest.mark.usefixtures("heard")
@pytest.mark.slow
def test_interrupted_over_an_old_artifact(artifact: Path, tiny: Path, text: Path, out: Path, monkeypatch: Any) -> None:
    """The artifact that was to be replaced stays as it was."""
    shutil.copytree(artifact, out)
    monkeypatch.setattr(driver, "write_manifest", lambda *args: signal.raise_signal(signal.SIGINT))
    assert main([str(word) for word in optimize(tiny, out, "--force", "--eval", str(text))]) == 130
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert main(["verify", str(out)]) == 0
