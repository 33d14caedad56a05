"""In: a trained Flax model, from code or a checkpoint, becomes IR."""
