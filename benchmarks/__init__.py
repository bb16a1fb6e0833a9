"""Measurements anyone can run: `python -m benchmarks.NAME --help`. The figures are kept in RESULTS.md."""
