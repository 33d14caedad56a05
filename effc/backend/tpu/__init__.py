"""Programs compiled for TPUs ahead of time by the TPU compiler itself, and what its schedules say; no TPU is needed."""
