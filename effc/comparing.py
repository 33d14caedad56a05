"""Quality of two models on disk, in a process of its own: `python -m effc.comparing BEFORE AFTER < text.json`.

A process of its own, because what reading, lowering and checking a model leave in memory is as much
as evaluating takes. It prints a number for every slice scored, then the two qualities, a line each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from effc.artifact import MODEL, WEIGHTS, read_module
from effc.errors import EffcError
from effc.evaluate import Quality, Side, Windows, compare
from effc.weights import open_safetensors

Both = tuple[Quality, Quality]


def compare_apart(before: Path, after: Path, text: Windows, advance: Callable[[int], None]) -> Both:
    """As `evaluate.compare`, for folders that hold a module and its weights."""
    command = [sys.executable, "-m", "effc.comparing", str(before), str(after)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=-1, stdout=-1, stderr=errors, text=True) as child,
    ):
        try:
            found = _talk(child, text, advance)
        except BaseException:
            child.kill()
            raise
        if child.wait() or len(found) != 2:
            errors.seek(0)
            words = errors.read().strip().splitlines() or [f"exit status {child.returncode}"]
            raise EffcError(words[-1])
    return found[0], found[1]


def _talk(child: subprocess.Popen[str], text: Windows, advance: Callable[[int], None]) -> list[Quality]:
    assert child.stdin is not None
    assert child.stdout is not None
    chunks = [chunk.tolist() for chunk in text.chunks]
    with child.stdin as stream:
        json.dump({"chunks": chunks, "context": text.context, "nbytes": text.nbytes}, stream)
    found: list[Quality] = []
    for line in child.stdout:
        data = json.loads(line)
        if isinstance(data, int):
            advance(data)
        else:
            found.append(Quality(**data))
    return found


def _side(folder: Path) -> Side:
    module = read_module(folder / MODEL)
    return module, open_safetensors(folder / WEIGHTS, module)


def main(before: str, after: str) -> None:
    """Read the text, print the answer."""
    data = json.load(sys.stdin)
    chunks = tuple(np.asarray(chunk, np.int32) for chunk in data["chunks"])
    text = Windows(chunks, data["context"], data["nbytes"])
    both = compare(_side(Path(before)), _side(Path(after)), text, lambda count: print(count, flush=True))
    for quality in both:
        print(json.dumps(asdict(quality)))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except EffcError as error:
        sys.exit(str(error))
