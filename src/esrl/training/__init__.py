"""The loop, its tasks and its checkpoints."""
