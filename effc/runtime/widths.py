"""How many bits codes take; no imports, as the IR reads it too."""

from __future__ import annotations

from collections.abc import Mapping

BITS: Mapping[str, int] = {"nf4": 4, "fp4e2m1": 4, "fp8e4m3": 8, "fp8e5m2": 8}
"""Bits of a code, of forms that are no whole numbers."""


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a row of `width` codes."""
    return -(-width * bits // 8)
