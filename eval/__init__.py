"""Evaluation and benchmarks of santa_hf, run from a checkout as `python -m eval COMMAND`."""
