"""Another model as the drafter: tokens compared string by string, padded tables, the whole way of the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effc.backend.to_python import emit, load_program
from effc.cli import main
from effc.errors import EffcError
from effc.ir.core import Decode, Ref
from effc.ir.parser import parse
from effc.opened import open_model
from effc.passes.draft.model import attached, check_tokens
from effc.runtime.engine import Engine
from effc.runtime.generate import generate
from tests.runtime.conftest import TINY, random_params

VOCAB = 4096


def changed(checkpoint: Path, folder: Path, vocab: dict[str, int]) -> Path:
    """The checkpoint with the numbers of some tokens changed; its arrays are where they were."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    data = json.loads((checkpoint / "tokenizer.json").read_text())
    data["model"]["vocab"].update(vocab)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_the_first_token_that_differs_is_named(checkpoint: Path, tmp_path: Path) -> None:
    mine = open_model(checkpoint).tokenizer()
    check_tokens(mine, checkpoint, VOCAB)
    a, b = (str(mine.rust.id_to_token(number)) for number in (400, 700))
    other = changed(checkpoint, tmp_path / "other.ckpt", {a: 700, b: 400})
    message = f"draft: token 400 is {json.dumps(a, ensure_ascii=False)} here and {json.dumps(b, ensure_ascii=False)}"
    with pytest.raises(EffcError) as told:
        check_tokens(mine, other, VOCAB)
    assert str(told.value).startswith(message) and str(other) in str(told.value)


@pytest.mark.parametrize(("mine", "its"), [(64, 66), pytest.param(66, 64, marks=pytest.mark.slow)])
def test_a_table_may_be_padded_on_either_side(mine: int, its: int) -> None:
    """The drafter has logits of two tokens more, or fewer, than the target: texts are the target's all the same."""
    text = TINY.read_text()
    texts = {n: text.replace("[64,32]", f"[{n},32]").replace("[b,t,64]", f"[b,t,{n}]") for n in (64, 66)}
    prompts = [[5, 9, 2, 33, 8, 1], [7]]
    target, other = parse(texts[mine]), parse(texts[its])
    plain = load_program(emit(target))
    params = random_params(plain, seed=1)
    attrs: dict[str, Any] = {"forward": Ref("forward"), "kind": "model", "drafter": Ref("draft"), "gamma": 3}
    attrs |= {"acceptance": (0.99,) * 11, "curve": (1.0,) * 4, "cost": 0.0}
    both = attached(target, other)
    program = load_program(emit(replace(both, decode=Decode("speculative", attrs))))
    own = {**random_params(program, seed=2), **params}
    want = generate(Engine(plain, params), prompts, max_new_tokens=24)
    got = generate(Engine(program, own), prompts, max_new_tokens=24)
    assert got.tokens == want.tokens and got.stats.draft and got.stats.draft.drafted


@pytest.mark.slow
def test_the_whole_way_of_the_command_line(
    checkpoint: Path, heldout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model as its own drafter: nearly all is accepted, and another vocabulary is refused before any work."""
    out, drafts = tmp_path / "out", f"draft{{kind=model,model={checkpoint},force=true,gamma=3}}"
    options = ["--eval", str(heldout), "--calib", str(heldout), "--no-speed"]
    assert main(["optimize", str(checkpoint), "--passes", drafts, "-o", str(out), *options]) == 0
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "import os", "--max-tokens", "64", "--json"]) == 0
    draft = json.loads(capsys.readouterr().out)["stats"]["draft"]
    assert draft["acceptance"] > 0.95 and draft["drafted"] > 0
    other = changed(checkpoint, tmp_path / "other.ckpt", {})
    data = json.loads((other / "tokenizer.json").read_text())
    first, second = (next(t for t, n in data["model"]["vocab"].items() if n == number) for number in (400, 700))
    shutil.rmtree(other)
    other = changed(checkpoint, tmp_path / "other.ckpt", {first: 700, second: 400})
    passes = f"draft{{kind=model,model={other}}}"
    assert main(["optimize", str(checkpoint), "--passes", passes, "-o", str(tmp_path / "no"), *options]) == 1
    assert "token 400 is" in capsys.readouterr().err and not (tmp_path / "no").exists()
