"""Passes by name: the one registry."""

from __future__ import annotations

from effc.passes.act import Act8
from effc.passes.base import Exactness, Notes, Option, Pass, PassError, Phase
from effc.passes.calm import Calm
from effc.passes.cascade import Cascade, SpecCascade
from effc.passes.clean import Clean
from effc.passes.draft import Draft
from effc.passes.fuse import Fuse
from effc.passes.hadamard import Hadamard
from effc.passes.kv import Kv4, Kv8
from effc.passes.mixed import Mixed
from effc.passes.mor import Mor
from effc.passes.qat import Qat
from effc.passes.quant4 import Quant4
from effc.passes.quant8 import Quant8
from effc.passes.smooth import Smooth

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        Clean,
        Mor,
        Calm,
        Draft,
        SpecCascade,
        Cascade,
        Smooth,
        Hadamard,
        Quant8,
        Quant4,
        Mixed,
        Qat,
        Kv8,
        Kv4,
        Act8,
        Fuse,
    )
}
"""Every pass, in the order of the phases."""

__all__ = [
    "Act8",
    "PASSES",
    "Calm",
    "Cascade",
    "Clean",
    "Draft",
    "Exactness",
    "Fuse",
    "Hadamard",
    "Kv4",
    "Kv8",
    "Mixed",
    "Mor",
    "Notes",
    "Option",
    "Pass",
    "PassError",
    "Phase",
    "Qat",
    "Quant4",
    "Quant8",
    "Smooth",
    "SpecCascade",
]
