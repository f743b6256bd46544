"""Comparisons with dense from result files: pairing, the floor rule, groups, the command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import compare as comparing
from eval.cli import CommandError
from eval.compare import compare, main, table, unfinished
from eval.results import Result, load_results, result_path
from tests import runs

S8, S128, TOP = runs.santa(8), runs.santa(128), runs.top_k(32)
ARMS = [S8, S128, TOP]
LOSSES = {"santa-8": 0.12, "santa-128": 0.002, "top-32": 0.3}


def one_task(documents: int = 400, accuracy: float = 0.95, **changes: Any) -> Any:
    return runs.finished([(runs.task(**changes), runs.flipped(documents, accuracy, LOSSES))], ARMS)


def by_arm(rows: list[comparing.Comparison]) -> dict[str, comparing.Comparison]:
    return {row.arm: row for row in rows}


def test_differences_are_paired_by_document() -> None:
    header, results = one_task()
    rows = by_arm(compare(header, results))
    assert list(rows) == ["santa-8", "santa-128", "top-32"]
    dense = np.array([d.scores[runs.METRIC] for d in results[0].documents])
    for name, row in rows.items():
        arm = np.array(
            [[d.scores[runs.METRIC] for d in r.documents] for r in results if r.arm.name == name]
        )
        assert row.dense == pytest.approx(dense.mean())
        assert row.score == pytest.approx(arm.mean())
        assert row.difference.value == pytest.approx((arm - dense).mean())
        assert row.seeds == ([0] if name == "top-32" else [0, 1, 2])
        assert row.documents == 400
        assert row.mcnemar is not None
        assert [(t.lost, t.gained) for t in row.mcnemar] == [
            (int((dense > a).sum()), int((dense < a).sum())) for a in arm
        ]
        # A wrong answer is another text, and dense's own wrong ones differ from the arm's.
        same = ((arm == dense) & (dense == 1)).mean()
        assert row.agreement == pytest.approx(same)
    # Paired: the interval is far shorter than the scores' own errors allow unpaired.
    best = rows["santa-128"].difference
    assert best.high - best.low < 2 * 1.96 * 0.8 * (rows["santa-128"].dense_error or 0)
    assert {name: row.verdict for name, row in rows.items()} == {
        "santa-8": "inferior",
        "santa-128": "non-inferior",
        "top-32": "inferior",
    }
    assert rows["santa-8"].rows_read == pytest.approx(8 / 4096, rel=0.1)
    assert rows["santa-8"].tokens_per_second == pytest.approx(100)


def test_a_few_documents_decide_nothing_and_say_how_many_would() -> None:
    header, results = one_task(documents=30)
    row = by_arm(compare(header, results))["santa-128"]
    assert row.verdict == "undecided"
    assert row.documents_needed > 100
    wide = by_arm(compare(header, results, margin=0.5))["santa-128"]
    assert wide.verdict == "non-inferior"
    assert wide.documents_needed < 30


@pytest.mark.parametrize(
    ("accuracy", "chance", "reason"),
    [
        (0.15, 0.0, "under 20%"),
        (0.26, 0.25, "not above chance"),
        (0.27, 0.0, None),
        (0.45, 0.25, None),
    ],
)
def test_no_verdict_at_the_floor(accuracy: float, chance: float, reason: str | None) -> None:
    scores = np.arange(400) < 400 * accuracy
    header, results = runs.finished(
        [(runs.task(chance=chance), lambda arm, seed: scores.astype(float))], [S128]
    )
    (row,) = compare(header, results)
    if reason is None:
        assert (row.verdict, row.reason) == ("non-inferior", None)
    else:
        assert row.verdict == "none"
        assert reason in (row.reason or "")
        assert reason in table([row])


def test_scores_between_right_and_wrong_have_no_mcnemar() -> None:
    rng = np.random.default_rng(0)
    header, results = runs.finished(
        [(runs.task(), lambda arm, seed: rng.choice([0.0, 0.4, 1.0], 50))], [S128]
    )
    assert compare(header, results)[0].mcnemar is None


def test_a_score_to_minimise_is_turned_around() -> None:
    header, results = one_task(higher_is_better={runs.METRIC: False})
    rows = by_arm(compare(header, results))
    assert rows["santa-8"].score < rows["santa-8"].dense
    assert rows["santa-8"].difference.value > 0.05
    assert rows["santa-8"].verdict == "non-inferior"


def tasks_of(group: str, sizes: dict[str, tuple[int, float]]) -> Any:
    tasks = [
        (runs.task(name, group=group), runs.flipped(documents, accuracy, LOSSES, seed=i))
        for i, (name, (documents, accuracy)) in enumerate(sizes.items())
    ]
    return runs.finished(tasks, [S8])


def test_a_ruler_group_is_the_mean_of_its_tasks() -> None:
    header, results = tasks_of("ruler", {"niah_single_1": (50, 1.0), "ruler_vt": (200, 0.5)})
    first, second, group = compare(header, results)
    assert (group.task, group.tasks) == ("ruler-32768", [first.task, second.task])
    assert group.documents == 250
    assert group.score == pytest.approx((first.score + second.score) / 2)
    assert group.difference.value == pytest.approx(
        (first.difference.value + second.difference.value) / 2
    )


def test_mmlu_is_the_mean_of_its_documents() -> None:
    header, results = tasks_of("mmlu", {"mmlu_a": (50, 1.0), "mmlu_b": (200, 0.5)})
    first, second, group = compare(header, results)
    assert group.score == pytest.approx((50 * first.score + 200 * second.score) / 250)
    assert group.verdict != "none"


def test_a_group_is_judged_on_its_tasks_above_the_floor() -> None:
    # Tasks on which nothing can be lost would make any arm look harmless.
    sizes = {"niah_single_1": (300, 1.0)} | {f"floor_{i}": (300, 0.0) for i in range(9)}
    header, results = tasks_of("ruler", sizes)
    *_, everything, above = compare(header, results)
    assert everything.difference.value == pytest.approx(above.difference.value / 10)
    assert everything.verdict == "none"
    assert "9 of its 10 tasks" in (everything.reason or "")
    assert (above.task, above.tasks) == (
        "ruler-32768, above the floor",
        ["niah_single_1-32768"],
    )
    assert above.verdict == "inferior"


def changed(result: Result, **changes: Any) -> Result:
    return dataclasses.replace(result, **changes)


def test_documents_missing_in_an_arm_are_an_error() -> None:
    header, results = one_task(documents=20)
    last = results[-1]
    for documents in (last.documents[:-1], last.documents[1:]):
        with pytest.raises(CommandError, match="top-32/seed-0: 1 documents are not those of dense"):
            compare(header, [*results[:-1], changed(last, documents=documents)])
    other = [dataclasses.replace(last.documents[0], doc_hash="another"), *last.documents[1:]]
    with pytest.raises(CommandError, match="the first is 0"):
        compare(header, [*results[:-1], changed(last, documents=other)])


def test_what_cannot_be_compared_is_named() -> None:
    header, results = one_task(documents=20)
    with pytest.raises(CommandError, match="no result of dense"):
        compare(header, results[1:])
    huge = [dataclasses.replace(d, scores={runs.METRIC: 7.0}) for d in results[1].documents]
    with pytest.raises(CommandError, match=r"scores must be in \[0, 1\], found 7 to 7"):
        compare(header, [results[0], changed(results[1], documents=huge)])
    with pytest.raises(ValueError, match="margin must be between 0 and 1"):
        compare(header, results, margin=2)


# The command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return runs.save(tmp_path / "run", *one_task(documents=60))


def test_the_command_prints_and_writes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main("compare", [str(run), "--margin", "3", "--json", str(tmp_path / "out/compare.json")])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line.split()[1] for line in lines[2:5]] == ["santa-8", "santa-128", "top-32"]
    assert "above -3 points" in printed
    written = json.loads((tmp_path / "out/compare.json").read_text())
    rows = compare(*load_results(run), margin=0.03)
    assert written["margin"] == 0.03
    assert [row["difference"]["low"] for row in written["comparisons"]] == [
        row.difference.low for row in rows
    ]
    assert len(written["comparisons"][0]["mcnemar"]) == 3


def test_an_unfinished_run_is_an_error_unless_allowed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = runs.task().key
    result_path(run, key, "santa-8", 1).unlink()
    assert unfinished(*load_results(run)) == [f"{key}/santa-8/seed-1"]
    with pytest.raises(CommandError, match=r"1 results are missing, the first is .*santa-8/seed-1"):
        main("compare", [str(run)])
    main("compare", [str(run), "--unfinished"])
    assert "1 results are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--margin", "0"], "--margin must be between 0 and 100, got 0"),
        (["--confidence", "100"], "--confidence must be between 0 and 100"),
    ],
)
def test_bad_options_are_named(run: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        main("compare", [str(run), *arguments])


def test_no_run_and_an_empty_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"run\.json"):
        main("compare", [str(tmp_path)])
    runs.save(tmp_path, runs.header(ARMS), [])
    with pytest.raises(CommandError, match="no result is finished"):
        main("compare", [str(tmp_path)])


def test_a_reader_that_has_seen_enough_is_no_error(run: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m eval compare {run} | true",
        shell=True,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
