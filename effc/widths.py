"""How many bits codes take: what the IR and the runtime both know."""

from __future__ import annotations

from collections.abc import Mapping

BITS: Mapping[str, int] = {"nf4": 4, "fp4e2m1": 4, "fp8e4m3": 8, "fp8e5m2": 8}
"""Bits of a code, of forms that are no whole numbers."""


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a row of `width` codes."""
    return -(-width * bits // 8)


def kept_bytes(width: int, kind: str, element: float) -> int:
    """Bytes of a row of a cache of that kind (`effc.runtime.coded`): codes and a scale of four; floats of `element`."""
    match kind:
        case "i8":
            return width + 4
        case "i4":
            return row_bytes(width, 4) + 4
        case "f16":
            return 2 * width
    return round(width * element)
