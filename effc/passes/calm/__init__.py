"""The calm pass: early exits, the training of their adapters, and thresholds that are certified."""

from effc.passes.calm.calm import Calm

__all__ = ["Calm"]
