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
from eval import results
from eval.cli import CommandError
from eval.compare import compare, describe_missing, main, remarks, table, unfinished
from eval.results import Header, Metric, Result, load_results, result_path
from tests import runs

S8, S128, TOP = runs.santa(8), runs.santa(128), runs.top_k(32)
ARMS = [S8, S128, TOP]
LOSSES = {"santa-8": 0.12, "santa-128": 0.002, "top-32": 0.3}


def one_task(documents: int = 400, accuracy: float = 0.95, **changes: Any) -> Any:
    return runs.finished([(runs.task(**changes), runs.flipped(documents, accuracy, LOSSES))], ARMS)


def by_arm(rows: list[comparing.Comparison]) -> dict[str, comparing.Comparison]:
    return {row.arm: row for row in rows}


def test_differences_are_paired_by_document() -> None:
    header, found = one_task()
    rows = by_arm(compare(header, found))
    assert list(rows) == ["santa-8", "santa-128", "top-32"]
    dense = np.array([d.scores[runs.METRIC] for d in found[0].documents])
    for name, row in rows.items():
        arm = np.array(
            [[d.scores[runs.METRIC] for d in r.documents] for r in found if r.arm.name == name]
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
    header, found = one_task(documents=30)
    row = by_arm(compare(header, found))["santa-128"]
    assert row.verdict == "undecided"
    assert row.documents_needed is not None
    assert 100 < row.documents_needed < 400
    wide = by_arm(compare(header, found, margin=0.5))["santa-128"]
    assert wide.verdict == "non-inferior"
    assert (wide.documents_needed or 99) < 30


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
    header, found = runs.finished(
        [(runs.task(chance=chance), lambda arm, seed: scores.astype(float))], [S128]
    )
    (row,) = compare(header, found)
    if reason is None:
        assert (row.verdict, row.reason) == ("non-inferior", None)
    else:
        assert row.verdict == "none"
        assert reason in (row.reason or "")
        assert reason in table([row])
        # Nor a number of documents with which there would be one.
        assert row.documents_needed is None
        assert table([row]).splitlines()[2].endswith(" -")


def test_scores_between_right_and_wrong_have_no_mcnemar() -> None:
    rng = np.random.default_rng(0)
    header, found = runs.finished(
        [(runs.task(), lambda arm, seed: rng.choice([0.0, 0.4, 1.0], 50))], [S128]
    )
    assert compare(header, found)[0].mcnemar is None


def test_a_score_to_minimise_is_turned_around() -> None:
    header, found = one_task(higher_is_better={runs.METRIC: False})
    rows = by_arm(compare(header, found))
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
    header, found = tasks_of("ruler", {"niah_single_1": (50, 1.0), "ruler_vt": (200, 0.5)})
    first, second, group = compare(header, found)
    assert (group.task, group.tasks) == ("ruler-32768", [first.task, second.task])
    assert group.documents == 250
    assert group.score == pytest.approx((first.score + second.score) / 2)
    assert group.difference.value == pytest.approx(
        (first.difference.value + second.difference.value) / 2
    )


@pytest.mark.parametrize("group", ["ruler", "mmlu"])
def test_group_scores_are_those_of_the_comparison(group: str) -> None:
    header, found = tasks_of(group, {"task_a": (50, 1.0), "task_b": (200, 0.5)})
    found = [
        changed(
            one,
            metrics={
                runs.METRIC: Metric(
                    float(scores.mean()), float(scores.std(ddof=1) / np.sqrt(len(scores)))
                )
            },
        )
        for one in found
        for scores in [np.array([d.scores[runs.METRIC] for d in one.documents])]
    ]
    *_, row = compare(header, found)
    # RULER weighs tasks equally, MMLU by their documents; tasks are independent samples.
    weights = np.array([1, 1] if group == "ruler" else [50, 200]) / (2 if group == "ruler" else 250)
    tables = {
        name: [
            [r.score for r in found if r.arm.name == name and r.task.name == task] for task in tasks
        ]
        for name in ("dense", "santa-8")
        for tasks in [("task_a", "task_b")]
    }
    value = {k: weights @ [np.mean([x.value for x in t]) for t in v] for k, v in tables.items()}
    error = {
        k: np.mean(
            [
                np.hypot(*(weights * [x.stderr for x in pair]))
                for pair in zip(*v, strict=True)
            ]
        )
        for k, v in tables.items()
    }  # fmt: skip
    assert (row.arm, row.seeds, len(row.tasks), row.documents) == ("santa-8", [0, 1, 2], 2, 250)
    assert row.dense == pytest.approx(value["dense"])
    assert row.dense_error == pytest.approx(error["dense"])
    assert row.score == pytest.approx(value["santa-8"])
    # For fixed seeds: more than that of the documents' means over seeds, less than half as much again.
    assert row.score_error is not None
    assert row.score_error < error["santa-8"] < 1.5 * row.score_error


def test_mmlu_is_the_mean_of_its_documents() -> None:
    header, found = tasks_of("mmlu", {"mmlu_a": (50, 1.0), "mmlu_b": (200, 0.5)})
    first, second, group = compare(header, found)
    assert group.score == pytest.approx((50 * first.score + 200 * second.score) / 250)
    assert group.verdict != "none"


def test_a_group_is_judged_on_its_tasks_above_the_floor() -> None:
    # Tasks on which nothing can be lost would make any arm look harmless.
    sizes = {"niah_single_1": (300, 1.0)} | {f"floor_{i}": (300, 0.0) for i in range(9)}
    header, found = tasks_of("ruler", sizes)
    *_, everything, above = compare(header, found)
    assert everything.difference.value == pytest.approx(above.difference.value / 10)
    assert everything.verdict == "none"
    assert "9 of its 10 tasks" in (everything.reason or "")
    assert (above.task, above.tasks) == (
        "ruler-32768, above the floor",
        ["niah_single_1-32768"],
    )
    assert everything.title == "ruler-32768 (10 of 10 tasks)"
    assert above.title == "ruler-32768, above the floor (1 of 10 tasks)"
    assert above.title in table([above])
    assert above.verdict == "inferior"


def changed(result: Result, **changes: Any) -> Result:
    return dataclasses.replace(result, **changes)


def test_documents_missing_in_an_arm_are_an_error() -> None:
    header, found = one_task(documents=20)
    last = found[-1]
    for documents in (last.documents[:-1], last.documents[1:]):
        with pytest.raises(CommandError, match="top-32/seed-0: 1 documents are not those of dense"):
            compare(header, [*found[:-1], changed(last, documents=documents)])
    other = [dataclasses.replace(last.documents[0], doc_hash="another"), *last.documents[1:]]
    with pytest.raises(CommandError, match="the first is 0"):
        compare(header, [*found[:-1], changed(last, documents=other)])


def test_what_cannot_be_compared_is_named() -> None:
    header, found = one_task(documents=20)
    with pytest.raises(CommandError, match="no result of dense"):
        compare(header, found[1:])
    huge = [dataclasses.replace(d, scores={runs.METRIC: 7.0}) for d in found[1].documents]
    with pytest.raises(CommandError, match=r"scores must be in \[0, 1\], found 7 to 7"):
        compare(header, [found[0], changed(found[1], documents=huge)])
    with pytest.raises(ValueError, match="margin must be between 0 and 1"):
        compare(header, found, margin=2)


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


def test_dense_of_two_runs_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("niah_single_1", "ruler_vt", "ruler_cwe")
    better, worse = (
        runs.finished(
            [
                (runs.task(name, group="ruler"), runs.flipped(100, accuracy, LOSSES, seed=i))
                for i, name in enumerate(names[first:])
            ],
            [S8],
        )
        for first, accuracy in ((0, 0.9), (1, 0.6))
    )
    header, found = comparing.two_runs(better, worse, "better")
    rows = compare(header, found)
    assert [row.title for row in rows] == [
        "ruler_vt-32768",
        "ruler_cwe-32768",
        "ruler-32768 (2 of 2 tasks)",
    ]
    for row in rows[:2]:
        mine, theirs = (
            np.array([d.scores[runs.METRIC] for d in r.documents])
            for results in (better[1], worse[1])
            for r in results
            if (r.task.key, r.arm.name) == (row.task, "dense")
        )
        assert (row.arm, row.seeds) == ("better", [0])
        assert (row.score, row.dense) == pytest.approx((mine.mean(), theirs.mean()))
        assert row.difference.value == pytest.approx((mine - theirs).mean())
        assert row.mcnemar is not None
        assert row.mcnemar[0].gained == ((mine == 1) & (theirs == 0)).sum()

    # The command, on weights that differ between the runs.
    other = [
        changed(result, provenance=runs.PROVENANCE | {"adapter_sha256": "ff"})
        for result in worse[1]
    ]
    paths = [
        str(runs.save(tmp_path / "mine", *better)),
        str(runs.save(tmp_path / "other", worse[0], other)),
    ]
    main("compare", [paths[0], "--with", paths[1]])
    printed = capsys.readouterr().out
    assert f"dense: that of {paths[1]}; arm: dense of {paths[0]}." in printed
    assert "ruler-32768 (2 of 2 tasks)" in printed
    assert "santa-8" not in printed
    documents = [dataclasses.replace(d, doc_hash="another") for d in other[0].documents]
    results.save_result(tmp_path / "other", changed(other[0], documents=documents))
    for path in (tmp_path / "other").glob("ruler_vt-32768/santa-8/*.json"):
        path.unlink()
    with pytest.raises(
        CommandError, match=r"ruler_vt-32768/dense of the first.*not those of dense"
    ):
        main("compare", [paths[0], "--with", paths[1], "--unfinished"])
    alone = runs.finished([(runs.task("gsm8k"), runs.flipped(9, 0.5, LOSSES))], [])
    with pytest.raises(CommandError, match="no task in common"):
        comparing.two_runs(better, alone, "better")


def test_an_unfinished_run_is_an_error_unless_allowed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = runs.task().key
    result_path(run, key, "santa-8", 1).unlink()
    assert unfinished(*load_results(run)) == [f"{key}/santa-8/seed-1"]
    with pytest.raises(CommandError, match=r"unfinished, without 1 result \(.*santa-8/seed-1\);"):
        main("compare", [str(run)])
    main("compare", [str(run), "--unfinished", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert f"Unfinished: without 1 result ({key}/santa-8/seed-1)." in printed
    assert json.loads((tmp_path / "out.json").read_text())["missing"] == [f"{key}/santa-8/seed-1"]


def header_of(header: Header, tasks: list[str], settings: dict[str, Any]) -> Header:
    return dataclasses.replace(
        header,
        tasks=tasks,
        settings=settings,
        config_hash=results.config_hash(header.model, settings),
    )


RULER = ["niah_single_1", "ruler_vt", "ruler_cwe", "niah_multiquery"]
SUBJECTS = [f"mmlu_{name}" for name in ("anatomy", "astronomy", "virology")]


@pytest.mark.parametrize(
    ("group", "length", "names", "stated", "settings"),
    [
        ("ruler", 32768, RULER, True, RULER),
        # Older headers: their settings name single tasks.
        ("ruler", 32768, RULER, False, RULER),
        ("mmlu", None, SUBJECTS, True, ["mmlu", "gsm8k"]),
    ],
)
def test_a_run_without_whole_tasks_is_unfinished(
    group: str,
    length: int | None,
    names: list[str],
    stated: bool,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = [runs.task(name, group=group, length=length) for name in names]
    header, found = runs.finished([(t, runs.flipped(30, 0.9, {})) for t in tasks[:2]], [S8])
    keys = [task.key for task in tasks]
    said = {"tasks": [{"task": name, "length": length} for name in settings]}
    header = header_of(header, [*keys, *["gsm8k"] * (group == "mmlu")] if stated else [], said)
    found = [changed(one, config_hash=header.config_hash) for one in found]
    missing = [*keys[2:], *["gsm8k"] * (group == "mmlu")]
    assert unfinished(header, found) == missing
    runs.save(tmp_path, header, found)
    with pytest.raises(CommandError, match=rf"without 2 whole tasks \({', '.join(missing)}\);"):
        main("compare", [str(tmp_path)])
    main("compare", [str(tmp_path), "--unfinished"])
    printed = capsys.readouterr().out
    assert f"Unfinished: without 2 whole tasks ({', '.join(missing)})." in printed
    # The task of another group is none of this one's.
    key = "ruler-32768" if length else "mmlu"
    assert f"{key} (2 of {len(names)} tasks)" in printed


def test_what_an_older_run_does_not_tell_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    header, found = tasks_of("mmlu", {"mmlu_a": (30, 0.9), "mmlu_b": (30, 0.9)})
    header = header_of(header, [], {"tasks": [{"task": "mmlu", "length": 32768}]})
    assert unfinished(header, found) == []
    (remark,) = remarks(header, found, [])
    assert "does not say what tasks mmlu-32768 has" in remark
    assert compare(header, found)[-1].title == "mmlu-32768 (2 tasks)"


def test_what_is_left_out_is_listed_up_to_a_number() -> None:
    assert describe_missing(["a", "b/arm/seed-0"]) == (
        "1 whole task (a) and 1 result (b/arm/seed-0)"
    )
    assert describe_missing(list("abc"), most=3) == "3 whole tasks (a, b, c)"
    assert describe_missing(list("abcd"), most=3) == "4 whole tasks (a, b, c, …)"


def test_mixed_machines_versions_and_commits_are_said() -> None:
    header, found = one_task(documents=20)
    assert remarks(header, found, []) == []
    other = {"device": "another", "commit": "4567", "versions": {"torch": "2.14.0"}}
    found[-1] = changed(found[-1], provenance=runs.PROVENANCE | other)
    (remark,) = remarks(header, found, [])
    for part in (
        "devices a machine (7), another (1)",
        "commits 0123abcd (7), 4567 (1)",
        "versions of torch 2.13.0 (7), 2.14.0 (1)",
        "versions of lm-eval 0.4.13 (7), None (1)",
    ):
        assert part in remark


def test_a_path_that_cannot_be_written_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match=r"file/compare\.json cannot be written"):
        main("compare", [str(run), "--json", str(tmp_path / "file/compare.json")])


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
