"""The command line: `python -m eval COMMAND`."""

from __future__ import annotations

import os
import sys

from . import __doc__ as description
from .cli import Command, CommandError, run_command

COMMANDS = {
    "run": Command("eval.run", "the arms of a suite on the same documents"),
    "lm-eval": Command("eval.lm", "lm-eval's command line, with a decode-window model class"),
    "compare": Command("eval.compare", "a run's arms against dense: intervals, tests, verdicts"),
    "fidelity": Command("eval.fidelity", "a run's arms against dense, token by token on text"),
    "report": Command("eval.report", "runs as one HTML page and Markdown"),
    "adapter": Command("eval.adapter", "train the adapter for SmolLM2-135M at 32k tokens"),
    "demo": Command("eval.demo", "RULER on SmolLM2-135M, dense and sampled, in a few minutes"),
    "convert": Command("eval.smollm2", "SmolLM2-135M-Instruct from PyPI as a model directory"),
    "bench": Command("eval.bench", "benchmarks"),
}


def main() -> None:
    """Run the command named on the command line."""
    try:
        run_command("python -m eval", description, COMMANDS, sys.argv[1:])
        sys.stdout.flush()
    except CommandError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
