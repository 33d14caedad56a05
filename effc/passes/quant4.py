"""Weights of linears to 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effc.passes.quant.options import WeightPass


@dataclass(frozen=True)
class Quant4(WeightPass):
    """Weights of linears to 4-bit codes, a scale per `group` summed over; embeddings and head to 8 bits a row."""

    name: ClassVar[str] = "quant4"
    width: ClassVar[int] = 4
