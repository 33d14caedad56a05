"""In: a trained Flax model, from code or a checkpoint, becomes IR."""

from effc.frontend.lowering import Lowered, lower

__all__ = ["Lowered", "lower"]
