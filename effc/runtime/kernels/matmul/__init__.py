"""Products of a few rows with a quantized matrix."""
