"""The real TPU compiler takes every kernel, for four generations, with the shapes of known models; no TPU is there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from effc.backend.tpu.models import MODELS, cases
from effc.runtime.kernels.generations import GENERATIONS

TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
QUICK = {"v5e:2x2"}
"""In the default run, the one with least memory; the others are slow."""

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, has no wheel for this system"
)

Asked = tuple[str, dict[str, Any]]


def matmul(extent: int, width: int, rows: int, group: int, **more: Any) -> Asked:
    return "matmul", {"extent": extent, "width": width, "rows": rows, "group": group, **more}


def attention(batch: int, heads: int, groups: int, head: int, **more: Any) -> Asked:
    return "attention", {"batch": batch, "heads": heads, "groups": groups, "head": head, "context": 2048, **more}


SMOL = [
    matmul(576, 1536, 1, 32),
    matmul(1536, 576, 16, 0, bits=8, digits=1),
    matmul(576, 192, 8, 64, zeros=True, scale="float32"),
    attention(1, 9, 3, 64),
    ("append", {"batch": 1, "groups": 3, "head": 64, "context": 2048}),
    ("vocabulary", {"rows": 4, "extent": 576, "vocab": 49152}),
    ("acceptance", {"rows": 1, "vocab": 49152}),
    ("lookup", {"rows": 2, "vocab": 49152, "extent": 576, "bits": 4}),
]

VOCABULARY: Asked = (
    "vocabulary", {"rows": 1, "extent": 4096, "vocab": 128256, "layout": "kn", "bits": 4, "group": 128},
)  # fmt: skip

LLAMA = [
    matmul(4096, 14336, 1, 128),
    matmul(14336, 4096, 16, 128),
    matmul(4096, 1024, 16, 128),
    matmul(4096, 6144, 1, 128, layers=32),
    matmul(4096, 4096, 8, 256, digits=1, zeros=True, scale="bfloat16"),
    matmul(4096, 4096, 256, 128),
    attention(8, 32, 8, 128, tokens=4),
    attention(16, 32, 8, 128),
    ("append", {"batch": 8, "groups": 8, "head": 128, "context": 2048, "tokens": 4}),
    VOCABULARY,
    ("acceptance", {"rows": 8, "vocab": 128256}),
    ("lookup", {"rows": 1, "vocab": 128256, "extent": 4096}),
]

GEMMA = [
    matmul(2560, 20480, 8, 32),
    matmul(10240, 2560, 1, 0, bits=8),
    attention(1, 8, 4, 256, window=1024, softcap=50.0, kind="bfloat16"),
    ("append", {"batch": 1, "groups": 4, "head": 256, "context": 2048, "tokens": 16}),
    ("vocabulary", {"rows": 2, "extent": 2560, "vocab": 262208, "bits": 16, "softcap": 30.0}),
]

MOST = {"v5e": (0.40, 0.55), "v6e": (0.65, 0.85)}
"""Of HBM's cycles, that a product of int4 codes in groups of 128 may take, and attention over an int8 cache."""

PROGRAM = """
import json, sys
from pathlib import Path
from effc.backend.tpu import cases
from effc.backend.tpu.models import Case
for kind, numbers in json.load(sys.stdin):
    print(json.dumps(cases.measured(Case("", kind, numbers), sys.argv[1], Path(sys.argv[2]))))
"""


def measured(target: str, asked: Sequence[Asked], folder: Any) -> list[dict[str, Any]]:
    """In a process of its own: the compiler reads its options from the environment once."""
    from effc.backend.tpu.child import environment

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, target, str(folder)], env={**os.environ, **environment(folder)}, timeout=800,
        input=json.dumps(asked), check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(asked)
    return found


def share(found: dict[str, Any], target: str) -> float:
    """Cycles of all steps over HBM's."""
    hbm = found["step_bytes"] / GENERATIONS[target.partition(":")[0]].bytes_a_cycle
    return (found["step"] + found["rare"] * found["times"] / found["steps"]) / hbm


@needs_compiler
@pytest.mark.parametrize("target", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS])
def test_every_kernel_compiles(target: str, tmp_path: Any) -> None:
    asked = [*SMOL, *LLAMA, *GEMMA, *[matmul(4096, 128256, 1, 128)] * (target[:3] in MOST)]
    found = measured(target, asked, tmp_path)
    assert not [one["unparsed"] for one in found if "unparsed" in one]
    if target[:3] in MOST:
        product, attended = MOST[target[:3]]
        shares = [round(share(one, target), 2) for one in found[len(SMOL) :]]
        assert max(shares[:3]) <= product and shares[7] <= attended, shares
        head, vocabulary = (share(one, target) for one in (found[-1], found[asked.index(VOCABULARY)]))
        assert vocabulary <= 1.05 * head, "to take the likeliest of what is multiplied costs next to nothing"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_all_shapes(target: str, model: str, tmp_path: Any) -> None:
    """All linears, alone and joined, one token to sixteen; verification of up to sixteen tokens."""
    every: list[Asked] = []
    for rows in (1, 4, 16):
        for group in (32, 128):
            every += [(c.kind, c.numbers) for c in cases(model, rows=rows, group=group) if c.kind == "matmul"]
        every += [(c.kind, c.numbers) for c in cases(model, rows=rows, joined=True)]
    m = MODELS[model]
    every += [attention(2, m.heads, m.groups, m.head, tokens=t, window=m.window) for t in (2, 8, 16)]
    every += [matmul(m.width, m.hidden, rows, 128) for rows in (64, 512)]
    unique = [json.loads(text) for text in dict.fromkeys(json.dumps(one) for one in every)]
    assert all("unparsed" not in one for one in measured(target, unique, tmp_path))
