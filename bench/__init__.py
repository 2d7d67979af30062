"""Benchmarks, one file per question, on a common harness: ``python -m bench [name ...] [--smoke]``. See README.md."""
