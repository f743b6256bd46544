"""Finished runs made of random scores, for what reads result files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import results
from eval.results import Arm, Counters, Document, Header, Metric, Result, Task

DENSE = Arm("dense", "dense", None, True)
SETTINGS = {"window": 1}
MODEL = {"name": "tiny", "revision": None, "adapter": None, "dtype": "float32"}
PROVENANCE = {
    "versions": {"torch": "2.13.0", "lm-eval": "0.4.13"},
    "device": "a machine",
    "commit": "0123abcd",
    "model_sha256": "00",
    "date": "2026-01-01T00:00:00+00:00",
}
METRIC = "exact_match,none"

# Scores of an arm by its name and a seed: (documents,).
Scores = Callable[[str, int], np.ndarray]


def santa(samples: int, **changes: Any) -> Arm:
    return Arm(f"santa-{samples}", "santa", {"samples": samples, **changes}, False)


def top_k(k: int) -> Arm:
    return Arm(f"top-{k}", "top-k", {"k": k}, True)


def task(name: str = "niah_single_1", **changes: Any) -> Task:
    values = {
        "version": 1.0,
        "length": 32768,
        "group": None,
        "output_type": "generate_until",
        "num_fewshot": 0,
        "documents_sha256": "ab" * 32,
        "main_metric": METRIC,
        "higher_is_better": {METRIC: True},
        "chance": 0.0,
        **changes,
    }
    return Task(name=name, **values)


def result(task: Task, arm: Arm, seed: int, scores: np.ndarray, speed: float = 100.0) -> Result:
    documents = [
        Document(
            i, f"hash-{i}", {METRIC: float(score)}, "right" if score else f"wrong {arm.name}", 8
        )
        for i, score in enumerate(scores)
    ]
    rows = 1000 * len(scores)
    share = {"dense": 1.0}.get(arm.method, ((arm.config or {}).get("samples", 32)) / 4096)
    return Result(
        format=results.FORMAT,
        task=task,
        arm=arm,
        seed=seed,
        config_hash=results.config_hash(MODEL, SETTINGS),
        metrics={METRIC: Metric(float(np.mean(scores)), None)},
        documents=documents,
        counters=Counters(0, 0, 0, {}, int(share * rows), rows, len(scores)),
        seconds=9 * len(scores) / speed,
        prefill_seconds=1.0,
        tokens=9 * len(scores),
        batch_size=1,
        processes=1,
        provenance=PROVENANCE,
    )


def header(arms: Sequence[Arm], seeds: Sequence[int] = (0, 1, 2)) -> Header:
    return Header(
        format=results.FORMAT,
        model=MODEL,
        settings=SETTINGS,
        arms={arm.name: arm for arm in (DENSE, *arms)},
        seeds=list(seeds),
        config_hash=results.config_hash(MODEL, SETTINGS),
        provenance=PROVENANCE,
    )


def finished(
    tasks: Mapping[Task, Scores] | Sequence[tuple[Task, Scores]],
    arms: Sequence[Arm],
    seeds: Sequence[int] = (0, 1, 2),
) -> tuple[Header, list[Result]]:
    """A run of `arms` and dense on tasks, each with its scores."""
    found = []
    for one, scores in tasks.items() if isinstance(tasks, Mapping) else tasks:
        for arm in (DENSE, *arms):
            for seed in [0] if arm.deterministic else seeds:
                found.append(result(one, arm, seed, scores(arm.name, seed)))
    return header(arms, seeds), found


def save(run: Path, header: Header, found: Sequence[Result]) -> Path:
    results.save_header(run, header)
    for one in found:
        results.save_result(run, one)
    return run


def flipped(documents: int, accuracy: float, losses: Mapping[str, float], seed: int = 0) -> Scores:
    """Dense right with probability `accuracy`; an arm loses that share of its right answers."""
    rng = np.random.default_rng(seed)
    right = rng.random(documents) < accuracy

    def scores(arm: str, seed: int) -> np.ndarray:
        lost = rng.random(documents) < losses.get(arm, 0.0)
        return (right & ~lost).astype(float)

    return scores
