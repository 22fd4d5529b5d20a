"""The one training step, its loop, and what surrounds them: optimiser, schedule, checkpoints, metrics."""
