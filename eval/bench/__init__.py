"""Benchmarks, run as `python -m eval bench NAME`."""

from __future__ import annotations

from collections.abc import Sequence

from ..cli import Command, run_command

__all__ = ["BENCHMARKS", "main"]

BENCHMARKS = {
    "reference": Command("eval.bench.reference", "the CPU path against SDPA"),
    "decode": Command("eval.bench.decode", "milliseconds per token of generate on a GPU"),
    "kernels": Command("eval.bench.kernels", "the Triton kernels against dense ones on a GPU"),
    "mla": Command("eval.bench.mla", "latent attention (DeepSeek): expanded, absorbed, sampled"),
}


def main(prog: str, argv: Sequence[str]) -> None:
    """Run the benchmark that `argv` begins with."""
    run_command(prog, __doc__, BENCHMARKS, argv)
