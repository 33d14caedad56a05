"""The output folder: all or nothing, loaded without running it, every fault of it told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from effc import artifact
from effc.artifact import Artifact, check_free, staged, verify
from effc.errors import EffcError
from effc.evaluate import fingerprint
from effc.frontend.source import TokenizerFiles
from effc.weights import write_safetensors

FILES = TokenizerFiles(b'{"version": "1.0"}', {"tokenizer_config.json": b"{}"})


@pytest.fixture
def made(tiny, random_store, tmp_path: Path) -> Path:
    """A whole artifact, with a program that must never run."""
    out, store = tmp_path / "out", random_store(tiny)
    with staged(out) as work:
        write_safetensors(work / artifact.WEIGHTS, tiny, store)
        names = artifact.write_texts(work, tiny, "raise SystemExit('loading ran the program')", FILES)
        artifact.write_report(work, {"name": "tiny"}, "<p>")
        mark = fingerprint((tiny, store), np.arange(6, dtype=np.int32)[None])
        artifact.write_manifest(work, {"tokenizer": names, "probe": mark})
    return out


def test_load(made: Path, tiny, random_store) -> None:
    found = Artifact.load(made)
    assert found.module == tiny
    assert found.tokenizer == FILES
    assert found.report() == {"name": "tiny"}
    q = random_store(tiny)["layers.attn.q"].read(1)[""]
    assert (found.store["layers.attn.q"].read(1)[""] == q).all()


def test_every_file_is_listed_and_good(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert {*manifest["files"], "manifest.json"} == {p.name for p in made.iterdir()}
    assert manifest["format"] == 1
    assert verify(made) == []


def test_all_faults_are_found_at_once(made: Path) -> None:
    (made / "program.py").write_text("print()")
    (made / "tokenizer_config.json").unlink()
    (made / "extra.bin").write_bytes(b"x")
    faults = verify(made)
    assert "program.py: changed since it was written (its sha256 is not the manifest's)" in faults
    assert "tokenizer_config.json: missing" in faults
    assert "extra.bin: not listed in the manifest" in faults


def test_other_weights_of_the_same_shape_are_noticed(made: Path, tiny, random_store) -> None:
    store = random_store(tiny)
    lazy = store["layers.attn.o"]
    other = {**store.entries, "layers.attn.o": type(lazy)(lazy.param, lambda i: {"": -lazy.read(i)[""]})}
    write_safetensors(made / "model.safetensors", tiny, other)
    faults = verify(made)
    assert len(faults) == 2
    assert faults[1].startswith("logits differ by ")


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("model.safetensors", 100, "truncated"),
        ("model.effc", 300, "model.effc:"),
        ("manifest.json", 10, "manifest.json: cannot be read as JSON"),
    ],
)
def test_damage(name: str, cut: int, message: str, made: Path) -> None:
    file = made / name
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(EffcError, match=message):
        Artifact.load(made)
    assert any(message in fault for fault in verify(made))


def test_what_is_no_artifact(tmp_path: Path, made: Path) -> None:
    with pytest.raises(EffcError, match=r"ouy: no such folder, want an artifact .*; did you mean 'out'\?"):
        Artifact.load(tmp_path / "ouy")
    with pytest.raises(EffcError, match=r"no manifest\.json"):
        Artifact.load(tmp_path)
    manifest = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(EffcError, match="format 99, want 1: made by a newer effc"):
        Artifact.load(made)


def test_nothing_is_left_of_a_run_that_fails(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged(tmp_path / "out") as work:
            (work / "half").write_text("done")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept_unless_forced(made: Path) -> None:
    with pytest.raises(EffcError, match="out: is there already, want a new folder"), staged(made):
        pass
    with pytest.raises(KeyboardInterrupt), staged(made, force=True):
        raise KeyboardInterrupt
    assert verify(made) == []
    with staged(made, force=True) as work:
        (work / "new").write_text("")
    assert [p.name for p in made.iterdir()] == ["new"]
    assert [p.name for p in made.parent.iterdir()] == ["out"]


def test_force_replaces_nothing_but_artifacts(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("")
    with pytest.raises(EffcError, match="photos: is not an artifact of effc, and --force replaces nothing else"):
        check_free(tmp_path / "photos", force=True)


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as work:
        (work / "a").write_text("")
    assert (tmp_path / "out" / "a").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EffcError, match=r"file/out: .*file cannot be written to"):
        check_free(tmp_path / "file" / "out", force=False)


def test_what_killed_runs_left_is_swept(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".out.effc-new-4194305", tmp_path / f".out.effc-new-{os.getppid()}"
    dead.mkdir()
    alive.mkdir()
    with staged(tmp_path / "out") as work:
        (work / "a").write_text("")
    assert not dead.exists()
    assert alive.exists()
