"""Benchmarks of mmfast beside the libraries people use today: ``python -m benchmarks`` in the source tree."""
