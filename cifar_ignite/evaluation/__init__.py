"""Evaluation of a trained model: loading it, inference, metrics, the report."""
