"""Cascades: a small model speaks where a rule lets it, the large one elsewhere; how often is certified."""

from effc.passes.cascade.answer import Cascade
from effc.passes.cascade.speculative import SpecCascade

__all__ = ["Cascade", "SpecCascade"]
