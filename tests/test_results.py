"""Result files: what is written, what is refused, and which tasks a run is to finish."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import results
from eval.cli import CommandError
from eval.results import config_hash, expected_tasks, load_header, load_results, result_path
from tests import runs

S8 = runs.santa(8)
TASKS = [runs.task("niah_single_1"), runs.task("ruler_vt")]


def finished(documents: int = 6) -> Any:
    return runs.finished([(task, runs.flipped(documents, 0.7, {})) for task in TASKS], [S8])


def with_settings(header: results.Header, settings: dict[str, Any]) -> results.Header:
    hashed = config_hash(header.model, settings)
    return dataclasses.replace(header, settings=settings, config_hash=hashed)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    header, found = finished()
    header = dataclasses.replace(header, tasks=[task.key for task in TASKS])
    runs.save(tmp_path, header, found)
    assert load_results(tmp_path) == (header, found)


def test_a_header_without_tasks_is_an_older_one(tmp_path: Path) -> None:
    header, found = finished()
    runs.save(tmp_path, header, found)
    path = tmp_path / "run.json"
    values = json.loads(path.read_text())
    del values["tasks"]
    path.write_text(json.dumps(values))
    assert load_header(tmp_path) == header
    rewrite(path, tasks=None)
    with pytest.raises(CommandError, match="tasks: expected list"):
        load_header(tmp_path)
    rewrite(path, tasks=["a", "b", "a"])
    with pytest.raises(CommandError, match="each once, got 'a'"):
        load_header(tmp_path)
    del values["seeds"]
    path.write_text(json.dumps(values))
    with pytest.raises(CommandError, match="'seeds' is missing"):
        load_header(tmp_path)


def test_a_result_of_a_task_that_the_run_does_not_have_is_refused(tmp_path: Path) -> None:
    header, found = finished()
    runs.save(tmp_path, dataclasses.replace(header, tasks=[TASKS[0].key]), found)
    with pytest.raises(CommandError, match=r"task 'ruler_vt-32768' is none of those in run\.json"):
        load_results(tmp_path)


def test_expected_tasks_are_those_of_the_header_or_of_its_settings() -> None:
    header, found = finished()
    stated = dataclasses.replace(header, tasks=["ruler_vt-32768", "niah_single_1-32768", "other"])
    assert expected_tasks(stated, found) == (stated.tasks, [])
    older = with_settings(
        header,
        {"tasks": [{"task": "ruler_cwe", "length": 32768}, {"task": "gsm8k", "length": None}]},
    )
    assert expected_tasks(older, found) == (
        ["ruler_cwe-32768", "gsm8k", "niah_single_1-32768", "ruler_vt-32768"],
        [],
    )
    # Of a group, what there is tells nothing of what there should be.
    mmlu = with_settings(header, {"tasks": [{"task": "mmlu", "length": None}]})
    subject = runs.task("mmlu_anatomy", group="mmlu", length=None)
    one = runs.result(subject, runs.DENSE, 0, np.ones(3))
    assert expected_tasks(mmlu, [one]) == (["mmlu_anatomy"], ["mmlu"])
    assert expected_tasks(mmlu, []) == (["mmlu"], [])


def test_results_on_other_documents_are_refused(tmp_path: Path) -> None:
    header, found = finished()
    runs.save(tmp_path, header, found)
    path = result_path(tmp_path, TASKS[0].key, "santa-8", 2)
    values = json.loads(path.read_text())
    other = {**values["documents"][1], "doc_hash": "another"}
    changes: tuple[dict[str, Any], ...] = (
        {"documents": [values["documents"][0], other, *values["documents"][2:]]},
        {"documents": values["documents"][:-1]},
        {"task": {**values["task"], "documents_sha256": "cd" * 32}},
    )
    for change in changes:
        path.write_text(json.dumps(values | change))
        with pytest.raises(CommandError, match=r"seed-2\.json: its documents are not those of"):
            load_results(tmp_path)


@pytest.mark.parametrize("name", ["model_sha256", "adapter_sha256", "model_revision"])
def test_results_of_other_weights_are_refused(name: str, tmp_path: Path) -> None:
    header, found = finished()
    runs.save(tmp_path, header, found)
    path = result_path(tmp_path, TASKS[1].key, "santa-8", 1)
    rewrite(path, provenance=runs.PROVENANCE | {name: "ff"})
    with pytest.raises(CommandError, match=rf"seed-1\.json: {name} is ff, that of .*seed-0\.json"):
        load_results(tmp_path)
    # Another machine or commit is none: whoever reads the results is told.
    rewrite(path, provenance=runs.PROVENANCE | {"device": "another", "commit": "4567"})
    assert len(load_results(tmp_path)[1]) == len(found)


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file.json"
    results.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write_json(path, {"a": [1] * 10, "b": float("nan")})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        # What was written before the disk was full is in a file of another name.
        patched.setattr(os, "fsync", full)
        with pytest.raises(CommandError, match=r"file\.json cannot be written: No space left"):  # noqa: SIM117
            with results.writing(path):
                results.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [one.name for one in path.parent.iterdir()] == ["file.json"]

    seen: list[Any] = []

    def replace(source: Path, target: Path) -> None:
        seen.append((json.loads(Path(source).read_text()), json.loads(Path(target).read_text())))
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    results.write_json(path, {"a": 3})
    assert seen == [({"a": 3}, {"a": 1})]
    assert json.loads(path.read_text()) == {"a": 3}
