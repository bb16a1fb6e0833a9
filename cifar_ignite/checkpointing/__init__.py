"""Checkpoints: writing and reading files, the best model, and resuming a run."""
