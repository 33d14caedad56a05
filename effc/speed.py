"""Tokens a second of a module, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from effc.backend.to_python import emit
from effc.errors import EffcError
from effc.ir.core import Module
from effc.report import Speed, size
from effc.weights import nbytes

LIBRARIES = 420 * 10**6
"""What JAX, compiled programs and caches take beside the weights, roughly (measured: 380 MB at 135 M weights)."""

ALWAYS = 800 * 10**6
"""Memory that any run may take, however small the model."""


def measure(module: Module, weights: Path) -> Speed:
    """In a new process, which runs the program emitted here; EffcError with its last words where it failed."""
    command = [sys.executable, "-m", "effc.timing", str(weights)]
    done = subprocess.run(command, input=emit(module), capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise EffcError(f"measuring tokens/s: {words[-1]}")
    return Speed(**json.loads(done.stdout.strip().splitlines()[-1]))


def too_large(module: Module, f32_bytes: int) -> str:
    """Why running the module would break the promise of 1.5 times the weights in f32; nothing where it would not."""
    wanted, allowed = nbytes(module) + LIBRARIES, max(f32_bytes * 3 // 2, ALWAYS)
    if wanted <= allowed:
        return ""
    return f"running it takes about {size(wanted)}, and optimize keeps to {size(allowed)}; effc bench measures it"
