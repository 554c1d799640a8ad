"""A run from configuration to summary: its folder, training, checkpoints, evaluation and pictures."""
