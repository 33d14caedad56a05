"""What `effc doctor` shows: versions, processor, devices, and what is missing for what."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "effc", "jax", "jaxlib", "flax", "numpy", "ml-dtypes", "lark", "libcst", "orbax-checkpoint", "msgpack",
    "tokenizers", "jinja2", "rich",
)  # fmt: skip
EXTRAS = {
    "gguf": "reads GGUF checkpoints",
    "flatbuffers": "optimize --export",
    "optax": "trains the bundled model",
}
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
)


@dataclass(frozen=True)
class Health:
    """Versions and extras: None where not installed."""

    versions: dict[str, str | None]
    extras: dict[str, str | None]
    machine: dict[str, Any]
    jax: dict[str, Any]
    trouble: list[str]

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Any:
        """A rich renderable."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_row("python", Text(platform.python_version()))
        for name, version in self.versions.items():
            table.add_row(name, Text(version or "missing"))
        for name, version in self.extras.items():
            table.add_row(name, Text(version or f"not installed ({EXTRAS[name]})"))
        for key, value in (self.machine | self.jax).items():
            table.add_row(key, Text(_text(value)))
        for line in self.trouble:
            table.add_row("trouble", Text(line))
        return table


def examine() -> Health:
    """Looks at this process and machine; starts JAX."""
    versions = {name: _version(name) for name in PACKAGES}
    extras = {name: _version(name) if importlib.util.find_spec(name) else None for name in EXTRAS}
    jax, trouble = _jax()
    missing = [f"{name} is not installed: pip install effc" for name, version in versions.items() if version is None]
    return Health(versions, extras, _machine(), jax, missing + trouble)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    return {
        "processor": _model(),
        "cores": cores,
        "features": _features(),
        "memory_gb": _memory(),
        "compiler": compiler,
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields; empty where there is no /proc."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _model() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _features() -> list[str]:
    info = _cpuinfo()
    have = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name in FEATURES if name in have]


def _memory() -> float | None:
    if sys.platform != "linux":
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _jax() -> tuple[dict[str, Any], list[str]]:
    import jax

    from effc.runtime.kernels.region import native

    try:
        devices = jax.devices()
    except RuntimeError as error:  # a platform asked for (JAX_PLATFORMS) that is not there
        return {"platform": None, "devices": []}, [f"jax finds no device: {str(error).splitlines()[0]}"]
    kernels = native.status()
    return {"platform": jax.default_backend(), "devices": [str(d) for d in devices], "native kernels": kernels}, []


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
