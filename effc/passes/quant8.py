"""Weights of linears to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from effc.passes.base import option
from effc.passes.quant.options import WeightPass


@dataclass(frozen=True)
class Quant8(WeightPass):
    """Weights of linears, embeddings and head to 8-bit codes, a scale per output channel (or per `group`)."""

    name: ClassVar[str] = "quant8"
    width: ClassVar[int] = 8

    group: int = option(0, "weights that share a scale; 0 is a whole output channel")
    scale: Literal["f32", "f16", "bf16"] = option("f32", "dtype of the scales")
    form: Literal["int", "fp8e4m3", "fp8e5m2", "mxfp8"] = option("int", "whole numbers or floats")

    def asked_form(self) -> str:
        return self.form
