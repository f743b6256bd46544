"""Dense against sampled decoding on RULER with SmolLM2-135M-Instruct: a table, a page, raw results.

It is `python -m eval run`, `compare` and `report` on the suite demo, with a model that needs no hub.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from . import report, smollm2
from .compare import Comparison, compare, table
from .results import load_results
from .run import Options, run
from .suite import SUITES, Suite

__all__ = ["main"]

SUITE = SUITES / "demo.yaml"


def _notes(comparisons: Sequence[Comparison]) -> str:
    fewest = min(row.documents for row in comparisons)
    notes = [
        f"These are few prompts, and one prompt moves a score by up to {100 / fewest:.0f} points: they "
        "show that everything works and roughly where accuracy breaks, no more.",
        "Prefill is dense by design in every arm; the last prompt token and every answer token, the "
        "first included, go through the decode path.",
        "In a small model at such short contexts reading values is a minor cost: expect no speed-up.",
    ]
    return "\n".join(textwrap.fill(note, 100) for note in notes)


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval demo`."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, default=SUITE, help="YAML, default: %(default)s")
    parser.add_argument("--limit", type=int, help="prompts for each task")
    parser.add_argument("--model-dir", type=Path, default=smollm2.DIRECTORY, help="made if missing")
    parser.add_argument(
        "--out", type=Path, default=Path("results/demo"), help="default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    suite = Suite.from_yaml(arguments.suite, limit=arguments.limit)
    started = time.perf_counter()
    model_dir = smollm2.convert(arguments.model_dir)
    # float32: the fastest dtype for decoding on a CPU.
    model = {"name": str(model_dir), "dtype": "float32"}
    run(model, suite, arguments.out, Options(device="cpu"))
    seconds = time.perf_counter() - started
    comparisons = compare(*load_results(arguments.out))
    print(f"\n{table(comparisons)}\n\n{_notes(comparisons)}\n")
    report.main(prog, [str(arguments.out)])
    print(f"{seconds:.0f} s")
