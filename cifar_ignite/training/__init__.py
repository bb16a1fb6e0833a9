"""Training: engines, what is attached to them, and the objects of a run."""
