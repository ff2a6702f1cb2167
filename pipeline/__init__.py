"""Data, model, training loop, checkpoints and tracking of one run."""
