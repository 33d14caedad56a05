"""Shared objects from C++ sources beside the code: built on first use, kept for this source, flags and CPU.

EFFC_NATIVE_FLAGS in the environment adds compiler flags (a sanitizer, debugging).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-DNDEBUG", "-fPIC", "-shared", "-Wno-psabi")


class Unbuilt(Exception):
    """Why a kernel cannot be built here."""


@dataclass(frozen=True)
class Built:
    """A shared object and the hash that names it."""

    file: Path
    key: str


def build(source: Path, flags: tuple[str, ...] = ()) -> Built:
    """The shared object of `source`, compiled if it is not there yet; raises Unbuilt."""
    compiler = find_compiler()
    more = shlex.split(os.environ.get("EFFC_NATIVE_FLAGS", ""))
    command = [*compiler, *FLAGS, *flags, *more, "-isystem", jax.ffi.include_dir()]
    key = _key(b"".join(file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))), command)
    file = cache_folder() / f"{source.parent.name}-{key}.so"
    if not file.exists():
        _compile([*command, str(source)], file)
    return Built(file, key)


def find_compiler() -> list[str]:
    """$CXX or the first of COMPILERS on the path."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    found = [chosen] if chosen else [[name] for name in COMPILERS]
    for command in found:
        if shutil.which(command[0]):
            return command
    raise Unbuilt(f"no C++ compiler ({', '.join(command[0] for command in found)})")


def cache_folder() -> Path:
    """Where shared objects are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "effc" / "kernels"


def _key(source: bytes, command: list[str]) -> str:
    """A caches' folder may be shared by machines: what -march=native means is part of the key."""
    parts = [source, repr(command).encode(), jax.__version__.encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """The processor's model and features, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *kept])


def _compile(command: list[str], file: Path) -> None:
    """Renamed when whole: another process may want the same file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=300)
            made.replace(file)
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines() or [""]
        raise Unbuilt(f"{command[0]} fails: {said[0].strip()}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unbuilt(str(error)) from None
