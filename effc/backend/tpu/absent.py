"""What libtpu wants to be told where there is no TPU; else it asks the cloud's metadata server, and complains."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ABSENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
}  # fmt: skip


def quiet() -> dict[str, str]:
    """Environment for a process that uses JAX: what is to be told, where libtpu is installed and no TPU is there."""
    devices = Path("/dev")
    there = any(devices.glob("accel*")) or any(devices.glob("vfio/[0-9]*"))
    return {} if there or importlib.util.find_spec("libtpu") is None else ABSENT
