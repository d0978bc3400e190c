"""Benchmarks: `python -m benchmarks --help`. They run from a checkout with the core dependencies alone."""
