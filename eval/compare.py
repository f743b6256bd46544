"""Sampled arms against dense, document by document: differences with intervals, tests and a verdict.

An arm is non-inferior on a task if the whole interval of its difference to dense lies above minus the
margin. Where dense itself is near the floor there is nothing to lose and no verdict. Documents are
paired by id and hash; a result that misses one is refused, never cut to what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cli import CommandError
from .results import Arm, Header, Result, expected_tasks, load_results, write_json, writing
from .statistics import Estimate, bootstrap, documents_for_power, mcnemar, non_inferiority

__all__ = [
    "Comparison",
    "McNemar",
    "compare",
    "describe_missing",
    "main",
    "remarks",
    "table",
    "two_runs",
    "unfinished",
]

MARGIN = 0.02
FLOOR = 0.2
# Groups whose score is the mean over their tasks, as in lm-eval; others, over their documents.
_EQUALLY = ("ruler",)
_Z = 1.96


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test for one seed: documents dense alone answers, the arm alone, the p-value."""

    seed: int
    lost: int
    gained: int
    p: float


@dataclass(frozen=True)
class Comparison:
    """One arm against dense on one task, or on the tasks of a group.

    Attributes:
        task: key of the task, or of the group ("ruler-32768").
        tasks: keys of the tasks that make it up.
        arm: name of the arm.
        seeds: its seeds.
        documents: how many, over all tasks.
        dense, score: mean score of dense, and of the arm over its seeds.
        dense_error, score_error: their standard errors over documents; None for a single document.
        difference: of the arm to dense, positive where the arm is better.
        mcnemar: one test for each seed; None unless every score is 0 or 1.
        agreement: share of documents, over seeds, whose output is dense's, letter for letter.
        rows_read: share of the visible value rows read; None where not counted.
        tokens_per_second, dense_tokens_per_second: decode steps per second of time, prefill left out.
        verdict: "non-inferior", "inferior", "undecided" or "none".
        reason: why there is no verdict.
        documents_needed: with which the verdict is reached at 80% power if the arms are equal; None
            without a verdict.
        tasks_expected: how many tasks of the group the run is to finish; None if run.json does not
            tell, and for a single task.
    """

    task: str
    tasks: list[str]
    arm: str
    seeds: list[int]
    documents: int
    dense: float
    dense_error: float | None
    score: float
    score_error: float | None
    difference: Estimate
    mcnemar: list[McNemar] | None
    agreement: float
    rows_read: float | None
    tokens_per_second: float
    dense_tokens_per_second: float
    verdict: str
    reason: str | None
    documents_needed: int | None
    tasks_expected: int | None

    @property
    def title(self) -> str:
        """The task; of a group, also over how many of the run's tasks of it the row is."""
        count, expected = len(self.tasks), self.tasks_expected
        if self.task == self.tasks[0]:
            return self.task
        of = "" if expected is None else f" of {expected}"
        return f"{self.task} ({count}{of} task{'' if (expected or count) == 1 else 's'})"


@dataclass(frozen=True)
class _Paired:
    """The results of one arm and of dense on one task."""

    dense: Result
    arm: list[Result]

    @property
    def key(self) -> str:
        return self.dense.task.key

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(result.seed for result in self.arm)

    def scores(self, results: Sequence[Result]) -> np.ndarray:
        """Main scores, (documents, seeds)."""
        metric = self.dense.task.main_metric
        return np.array([[d.scores[metric] for d in result.documents] for result in results]).T

    @property
    def sign(self) -> int:
        return 1 if self.dense.task.higher_is_better[self.dense.task.main_metric] else -1

    @property
    def differences(self) -> np.ndarray:
        return self.sign * (self.scores(self.arm) - self.scores([self.dense]))


def unfinished(header: Header, results: Sequence[Result]) -> list[str]:
    """What a run has not finished of the tasks, arms and seeds in run.json.

    Returns:
        "task/arm/seed-n" for a result; for a task without any, the task's key alone.
    """
    done = {(r.task.key, r.arm.name, r.seed) for r in results}
    begun = {task for task, _, _ in done}
    missing = []
    for task in expected_tasks(header, results)[0]:
        if task not in begun:
            missing.append(task)
            continue
        for arm in header.arms.values():
            for seed in [0] if arm.deterministic else header.seeds:
                if (task, arm.name, seed) not in done:
                    missing.append(f"{task}/{arm.name}/seed-{seed}")
    return missing


def describe_missing(missing: Sequence[str], most: int = 5) -> str:
    """What `unfinished` returns, in words: how many, and the first of them."""
    parts = []
    for kind, names in (
        ("whole task", [name for name in missing if "/" not in name]),
        ("result", [name for name in missing if "/" in name]),
    ):
        if names:
            shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
            parts.append(f"{len(names)} {kind}{'s' if len(names) > 1 else ''} ({shown})")
    return " and ".join(parts)


def compare(
    header: Header,
    results: Sequence[Result],
    *,
    margin: float = MARGIN,
    confidence: float = 0.95,
) -> list[Comparison]:
    """Every arm against dense, on every task that both finished and on groups of tasks.

    Args:
        header, results: what `load_results` returns.
        margin: largest loss of score that counts as none.
        confidence: of the two-sided intervals.

    Returns:
        By task, then arms in the header's order; each group after its tasks.

    Raises:
        CommandError: a result misses a document that dense has, or has another; a score is not in
            [0, 1]; a task has no dense result.
        ValueError: `margin` or `confidence` is not between 0 and 1.
    """
    for name, value in (("margin", margin), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    by_task: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        by_task.setdefault(result.task.key, {}).setdefault(result.arm.name, []).append(result)
    groups: dict[str, list[str]] = {}
    for key, arms in by_task.items():
        if "dense" not in arms:
            raise CommandError(f"{key}: no result of dense to compare with")
        task = arms["dense"][0].task
        if task.group is not None:
            name = task.group if task.length is None else f"{task.group}-{task.length}"
            groups.setdefault(name, []).append(key)
    expected = _expected_of_groups(header, results, groups)
    others = [arm for arm in header.arms.values() if arm.name != "dense"]
    options = {"margin": margin, "confidence": confidence}
    rows = []
    for keys, name in [([key], key) for key in by_task] + [(k, g) for g, k in groups.items()]:
        if name in groups and len(keys) == 1:
            continue
        for arm in others:
            pairs = [
                _pair(by_task[key]["dense"][0], by_task[key][arm.name])
                for key in keys
                if arm.name in by_task[key]
            ]
            # Of an unfinished run, a group has a row once its tasks have the same seeds.
            if len(pairs) == len(keys) and len({pair.seeds for pair in pairs}) == 1:
                rows += _rows(name, arm, pairs, expected.get(name), **options)
    return rows


def two_runs(
    one: tuple[Header, Sequence[Result]], other: tuple[Header, Sequence[Result]], name: str
) -> tuple[Header, list[Result]]:
    """The dense arms of two runs, for `compare`: the other's as dense, the one's as an arm.

    Args:
        one, other: what `load_results` returns; the weights may differ, or the dtype.
        name: of the arm.

    Returns:
        A header and results of the tasks that both runs have.

    Raises:
        CommandError: there is no such task.
    """
    theirs = {r.task.key: r for r in other[1] if r.arm.name == "dense"}
    arm = Arm(name, "dense", None, True)
    found = []
    for result in one[1]:
        if result.arm.name == "dense" and result.task.key in theirs:
            found += [theirs[result.task.key], dataclasses.replace(result, arm=arm)]
    if not found:
        raise CommandError("the two runs have no task in common that dense finished")
    dense = found[0].arm
    tasks = [result.task.key for result in found[::2]]
    return dataclasses.replace(one[0], arms={"dense": dense, name: arm}, tasks=tasks), found


def _expected_of_groups(
    header: Header, results: Sequence[Result], groups: dict[str, list[str]]
) -> dict[str, int]:
    """How many tasks the run is to finish of each group; of some it may not be known."""
    keys, unknown = expected_tasks(header, results)
    named = {settings["task"] for settings in header.settings.get("tasks", [])}
    counts = {name: len(found) for name, found in groups.items() if name not in unknown}
    without_length = [r.task.group for r in results if r.task.length is None and r.task.group]
    known = {result.task.key for result in results}
    for key in keys:
        if key in known or key in named:
            continue
        # A task without a result tells its group by its length, which RULER's tasks alone have, else
        # by its name, unless there is one group alone.
        length = key.rpartition("-")[2]
        alone = len(set(without_length)) == 1
        for name in counts:
            group, dash, its_length = name.rpartition("-")
            if (dash and its_length == length and group in _EQUALLY) or (
                name in without_length and not length.isdigit() and (alone or key.startswith(name))
            ):
                counts[name] += 1
    return counts


def _pair(dense: Result, arm: list[Result]) -> _Paired:
    pair = _Paired(dense, sorted(arm, key=lambda result: result.seed))
    expected = {document.doc_id: document.doc_hash for document in dense.documents}
    for result in arm:
        found = {document.doc_id: document.doc_hash for document in result.documents}
        wrong = sorted(i for i in expected.keys() | found.keys() if expected.get(i) != found.get(i))
        if wrong:
            raise CommandError(
                f"{pair.key}/{result.arm.name}/seed-{result.seed}: {len(wrong)} documents are not "
                f"those of dense, the first is {wrong[0]}"
            )
    for result in (dense, *arm):
        scores = pair.scores([result])
        if not ((scores >= 0) & (scores <= 1)).all():
            raise CommandError(
                f"{pair.key}/{result.arm.name}/seed-{result.seed}: scores must be in [0, 1], "
                f"found {scores.min():g} to {scores.max():g}"
            )
    return pair


def _rows(
    name: str,
    arm: Arm,
    pairs: list[_Paired],
    expected: int | None,
    *,
    margin: float,
    confidence: float,
) -> list[Comparison]:
    """The row of a task or group; for a group with tasks at the floor, also that of the others."""
    group = pairs[0].dense.task.group
    pooled = group not in _EQUALLY
    floors = [_floor([pair]) for pair in pairs]
    if len(pairs) == 1 or pooled or not any(floors):
        return [_row(name, arm, pairs, pooled, _floor(pairs), expected, margin, confidence)]
    above = [pair for pair, floor in zip(pairs, floors, strict=True) if floor is None]
    reason = f"dense is near the floor on {len(pairs) - len(above)} of its {len(pairs)} tasks"
    rows = [_row(name, arm, pairs, pooled, reason, expected, margin, confidence)]
    if above:
        name = f"{name}, above the floor"
        rows.append(_row(name, arm, above, pooled, None, expected, margin, confidence))
    return rows


def _floor(pairs: Sequence[_Paired]) -> str | None:
    """Why dense can lose nothing on these documents; None if it can."""
    scores = np.concatenate([pair.scores([pair.dense])[:, 0] for pair in pairs])
    mean = scores.mean()
    chance = np.average(
        [pair.dense.task.chance for pair in pairs],
        weights=[len(pair.dense.documents) for pair in pairs],
    )
    if pairs[0].sign > 0 and mean < FLOOR:
        return f"dense scores {mean:.1%}, under {FLOOR:.0%}"
    if pairs[0].sign > 0 and chance > 0 and mean - _Z * (_error(scores) or math.inf) <= chance:
        return f"dense scores {mean:.1%}, not above chance ({chance:.1%})"
    return None


def _row(
    name: str,
    arm: Arm,
    pairs: list[_Paired],
    pooled: bool,
    floor: str | None,
    expected: int | None,
    margin: float,
    confidence: float,
) -> Comparison:
    seeds = list(pairs[0].seeds)
    sizes = [len(pair.dense.documents) for pair in pairs]
    weights = sizes if pooled else [1] * len(pairs)
    differences = [pair.differences for pair in pairs]
    difference = bootstrap(differences, weights, confidence=confidence)
    dense = [pair.scores([pair.dense])[:, 0] for pair in pairs]
    scores = [pair.scores(pair.arm) for pair in pairs]
    outputs = [
        [a.output == d.output for a, d in zip(r.documents, pair.dense.documents, strict=True)]
        for pair in pairs
        for r in pair.arm
    ]
    tests = None
    if set(np.unique(np.concatenate([*(s.ravel() for s in scores), *dense]))) <= {0.0, 1.0}:
        all_dense, all_scores = np.concatenate(dense), np.concatenate(scores)
        tests = [
            McNemar(seed, *mcnemar(all_dense.tolist(), all_scores[:, i].tolist()))
            for i, seed in enumerate(seeds)
        ]
    counters = [result.counters for pair in pairs for result in pair.arm]
    visible = sum(c.value_rows_visible for c in counters)
    return Comparison(
        task=name,
        tasks=[pair.key for pair in pairs],
        arm=arm.name,
        seeds=seeds,
        documents=sum(sizes),
        dense=_mean(dense, weights),
        dense_error=_mean_error(dense, weights),
        score=_mean([s.mean(axis=1) for s in scores], weights),
        score_error=_mean_error([s.mean(axis=1) for s in scores], weights),
        difference=difference,
        mcnemar=tests,
        agreement=float(np.mean([same for row in outputs for same in row])),
        rows_read=sum(c.value_rows_read for c in counters) / visible if visible else None,
        tokens_per_second=_speed([result for pair in pairs for result in pair.arm]),
        dense_tokens_per_second=_speed([pair.dense for pair in pairs]),
        verdict="none" if floor else non_inferiority(difference, margin),
        reason=floor,
        documents_needed=(
            None
            if floor
            else documents_for_power(differences, weights, margin=margin, confidence=confidence)
        ),
        tasks_expected=expected,
    )


def _mean(scores: Sequence[np.ndarray], weights: Sequence[float]) -> float:
    return float(np.average([s.mean() for s in scores], weights=weights))


def _error(scores: np.ndarray) -> float | None:
    return float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None


def _mean_error(scores: Sequence[np.ndarray], weights: Sequence[float]) -> float | None:
    """Standard error of the weighted mean of independent means."""
    errors = [_error(s) for s in scores]
    if None in errors:
        return None
    shares = np.array(weights) / sum(weights)
    return float(np.sqrt(np.sum((shares * np.array(errors, dtype=float)) ** 2)))


def _speed(results: Sequence[Result]) -> float:
    seconds = sum(result.seconds for result in results)
    return sum(result.tokens for result in results) / seconds if seconds else math.nan


def table(
    rows: Sequence[Comparison],
    *,
    margin: float = MARGIN,
    confidence: float = 0.95,
    remarks: Sequence[str] = (),
) -> str:
    """Comparisons as text, one line each; scores and differences in points; remarks at the end."""
    cells = [
        [
            "task",
            "arm",
            "docs",
            "seeds",
            "dense",
            "arm",
            f"difference [{confidence:.0%}]",
            "lost/gained",
            "p",
            "same text",
            "value rows",
            "verdict",
            "documents for 80%",
        ]
    ]
    for row in rows:
        tests = row.mcnemar or []
        cells.append(
            [
                row.title,
                row.arm,
                str(row.documents),
                str(len(row.seeds)),
                f"{100 * row.dense:.1f}",
                f"{100 * row.score:.1f}",
                points(row.difference),
                " ".join(f"{t.lost}/{t.gained}" for t in tests) or "-",
                f"{smallest_p(tests):.2g}" if tests else "-",
                f"{row.agreement:.1%}",
                "-" if row.rows_read is None else f"{row.rows_read:.2%}",
                row.verdict if row.reason is None else f"none: {row.reason}",
                "-" if row.documents_needed is None else str(row.documents_needed),
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *notes(margin, confidence), *remarks])


def points(estimate: Estimate) -> str:
    """A difference in points with its interval."""
    return f"{100 * estimate.value:+.2f} [{100 * estimate.low:+.2f}, {100 * estimate.high:+.2f}]"


def smallest_p(tests: Sequence[McNemar]) -> float:
    """The smallest p-value over seeds, by Bonferroni's correction."""
    return min(1.0, len(tests) * min(test.p for test in tests))


def notes(margin: float = MARGIN, confidence: float = 0.95) -> list[str]:
    """What the columns mean, one sentence each."""
    return [
        f"Scores in points (0 to 100). difference: arm minus dense on the same documents, with a "
        f"{confidence:.0%} interval over documents and seeds, by a tilted bootstrap.",
        f"verdict: non-inferior if the whole interval lies above -{100 * margin:g} points; none where "
        f"dense scores under {FLOOR:.0%} or not above chance.",
        "documents for 80%: with how many an arm equal to dense gets that verdict four times in five, "
        "going by how documents differ here.",
        "lost/gained: documents that dense alone, or the arm alone, answers, for each seed; p: "
        "McNemar's exact test, the smallest over seeds times their number.",
        "same text: documents whose greedy output is dense's. value rows: share of the visible value "
        "rows that decode steps read.",
    ]


def remarks(header: Header, results: Sequence[Result], missing: Sequence[str]) -> list[str]:
    """What a reader of the comparisons has to know of this run: what is missing, what is mixed."""
    found = []
    if missing:
        found.append(f"Unfinished: without {describe_missing(missing)}.")
    for group in expected_tasks(header, results)[1]:
        found.append(
            f"run.json is of an older version, which does not say what tasks {group} has: whether some "
            "are missing is not known."
        )
    mixed = []
    for name in ("device", "commit"):
        counts = Counter(str(result.provenance.get(name)) for result in results)
        if len(counts) > 1:
            mixed.append(f"{name}s {counted(counts)}")
    packages = {n: None for r in results for n in r.provenance.get("versions", {})}
    for package in packages:
        counts = Counter(str(r.provenance.get("versions", {}).get(package)) for r in results)
        if len(counts) > 1:
            mixed.append(f"versions of {package} {counted(counts)}")
    if mixed:
        found.append(f"Results were made with different {'; '.join(mixed)}.")
    return found


def counted(counts: Counter[str]) -> str:
    """Values and how many results have them."""
    return ", ".join(f"{value} ({count})" for value, count in counts.most_common())


def load(run: Path, allow_unfinished: bool = False) -> tuple[Header, list[Result], list[str]]:
    """A run's header, results, and what is missing, which is an error unless allowed."""
    header, results = load_results(run)
    missing = unfinished(header, results) if results else []
    if missing and not allow_unfinished:
        raise CommandError(
            f"{run} is unfinished, without {describe_missing(missing)}; finish the run, or pass "
            "--unfinished to leave them out"
        )
    return header, results, missing


def plain(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons as plain data for JSON, which has no NaN."""
    found = [dataclasses.asdict(row) for row in rows]
    for row in found:
        for name in ("tokens_per_second", "dense_tokens_per_second"):
            row[name] = None if math.isnan(row[name]) else row[name]
    return found


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval compare`."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a run")
    add_options(parser)
    parser.add_argument(
        "--with",
        type=Path,
        dest="other",
        metavar="RUN",
        help="another run on the same documents: this run's dense arm against that one's, instead of "
        "arms against dense",
    )
    parser.add_argument("--json", type=Path, help="also write the comparisons here")
    arguments = parser.parse_args(argv)
    check_options(arguments)
    header, results, missing = load(arguments.run, arguments.unfinished)
    if not results:
        raise CommandError(f"{arguments.run}: no result is finished")
    options = {"margin": arguments.margin / 100, "confidence": arguments.confidence / 100}
    said = remarks(header, results, missing)
    if arguments.other is not None:
        other = load(arguments.other, arguments.unfinished)
        said += [f"{arguments.other}: {remark}" for remark in remarks(*other)]
        header, results = two_runs((header, results), other[:2], "dense of the first")
        said.append(f"dense: that of {arguments.other}; arm: dense of {arguments.run}.")
    rows = compare(header, results, **options)
    print(table(rows, **options, remarks=said))
    if arguments.json:
        values = {**options, "missing": missing, "remarks": said, "comparisons": plain(rows)}
        with writing(arguments.json):
            write_json(arguments.json, values)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that compare and report share."""
    parser.add_argument(
        "--margin", type=float, default=100 * MARGIN, help="points; default: %(default)g"
    )
    parser.add_argument(
        "--confidence", type=float, default=95.0, help="percent, of intervals; default: %(default)g"
    )
    parser.add_argument(
        "--unfinished", action="store_true", help="leave out what the run has not finished"
    )


def check_options(arguments: argparse.Namespace) -> None:
    """Raise CommandError unless margin and confidence are between 0 and 100."""
    for name in ("margin", "confidence"):
        value = getattr(arguments, name)
        if not 0 < value < 100:
            raise CommandError(f"--{name} must be between 0 and 100, got {value:g}")
