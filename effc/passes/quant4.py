"""Weights of linears to 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from effc.passes.base import option
from effc.passes.quant.options import WeightPass


@dataclass(frozen=True)
class Quant4(WeightPass):
    """Weights of linears to 4-bit codes, a scale per `group` summed over; embeddings and head to 8 bits a row."""

    name: ClassVar[str] = "quant4"
    width: ClassVar[int] = 4

    form: Literal["int", "nf4", "mxfp4"] = option("int", "whole numbers, quantiles of a normal distribution, or floats")

    def asked_form(self) -> str:
        return self.form
