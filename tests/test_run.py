"""A run: decode window, the model class "santa", local data, resuming, two processes, bad input.

The model is tiny and random, with the tokenizer of SmolLM2: scores mean nothing here, agreement does.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import accelerate
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

import santa_hf
from eval import compare, partial, provenance, results, run
from eval.arms import DENSE, check_model, use_arm
from eval.cli import CommandError
from eval.data import VARIABLE
from eval.decode import Prefix, count_value_rows, score
from eval.lm import Request, SantaLM, batches
from eval.partial import Progress
from eval.processes import processes
from eval.results import Arm, load_results
from tests import tiny

pytestmark = pytest.mark.model

ROOT = Path(__file__).parent.parent
LAYERS = 2
SUITE = """
arms: {santa-4: {samples: 4}, top-4: {top_k: 4}, per-layer: {config: LAYERED}}
seeds: [0, 1]
window: 3
tasks:
  - {task: niah_single_1, length: 1024, limit: 3, max_new_tokens: 4}
  - {task: mmlu_anatomy, num_fewshot: 2}
  - {task: gsm8k, num_fewshot: 2, max_new_tokens: 5}
"""
RESULTS = 3 * (1 + 2 + 1 + 2)  # of tasks and (arm, seed)
QUESTIONS = [
    ("Which bone is in the thigh?", ["Femur", "Ulna", "Tibia", "Sternum"], 0),
    ("The heart has how many chambers in all?", ["Two", "Four", "Three", "Six"], 1),
    ("Bile is made in the", ["spleen", "lung", "liver", "pancreas"], 2),
    ("What lies behind the lens of the eye?", ["Iris", "Pupil", "Cornea", "Vitreous body"], 3),
    ("A nerve cell is called a", ["neuron", "nephron", "axon", "myocyte"], 0),
]
SUMS = [(f"Ann has {i} apples and buys {i + 2} more. How many?", 2 * i + 2) for i in range(5)]


@pytest.fixture(scope="module")
def model_dir(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(directory)
    model = tiny.build(
        "llama", vocab_size=49152, num_hidden_layers=LAYERS, max_position_embeddings=4096
    )
    # Independent of santa, as other checkpoints are.
    model.set_attn_implementation("sdpa")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")

    def write(path: str, rows: list[dict[str, Any]]) -> None:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / path)

    questions = [
        {"question": q, "subject": "anatomy", "choices": choices, "answer": answer}
        for q, choices, answer in QUESTIONS
    ]
    write("mmlu/dev/anatomy.parquet", questions[:2])
    write("mmlu/test/anatomy.parquet", questions)
    sums = [{"question": q, "answer": f"Added up.\n#### {n}"} for q, n in SUMS]
    write("gsm8k/main/train.parquet", sums[:4])
    write("gsm8k/main/test.parquet", sums[2:])
    return directory


@pytest.fixture
def local(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(data_dir))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    layered = tmp_path / "layered.yaml"
    layered.write_text("samples: 4\nlayers: {0: {estimator: dense}, 1: {samples: 2}}\n")
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace("LAYERED", str(layered)))
    return path


def command(model_dir: Path, suite: Path | str, out: Path, *more: str) -> list[str]:
    return [
        *("--model", str(model_dir), "--dtype", "float64", "--suite", str(suite)),
        *("--out", str(out), "--device", "cpu", "--quiet", *more),
    ]


def run_suite(model_dir: Path, suite: Path | str, out: Path, *more: str) -> None:
    run.main("run", command(model_dir, suite, out, *more))


def answers(found: list[results.Result]) -> dict[tuple[str, str, int], list[results.Document]]:
    return {(r.task.key, r.arm.name, r.seed): r.documents for r in found}


# The model class


def model_class(kind: Any, model_dir: Path, **settings: Any) -> Any:
    return kind(str(model_dir), device="cpu", dtype="float64", batch_size=3, **settings)


def pairs() -> list[Any]:
    """Requests of several lengths, continuations of one and of several tokens."""
    return [
        SimpleNamespace(args=(f"{question}\nAnswer:", f" {choice}"))
        for question, choices, _ in QUESTIONS
        for choice in ("A", "B", *choices)
    ]


def log_likelihoods(lm: Any) -> list[tuple[float, bool]]:
    return lm.loglikelihood(pairs(), disable_tqdm=True)


def texts(lm: Any) -> list[str]:
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    asked = [SimpleNamespace(args=(question, settings)) for question, _ in SUMS]
    return lm.generate_until(asked, disable_tqdm=True)


@pytest.fixture(scope="module")
def stock(model_dir: Path) -> tuple[list[tuple[float, bool]], list[str]]:
    lm = model_class(HFLM, model_dir)
    return log_likelihoods(lm), texts(lm)


@pytest.mark.parametrize("window", [1, 4, 100])
def test_dense_decode_steps_give_what_stock_lm_eval_gives(
    window: int, model_dir: Path, stock: tuple[list[tuple[float, bool]], list[str]]
) -> None:
    lm = model_class(SantaLM, model_dir, attention="dense", window=window)
    for (value, greedy), (expected, stock_greedy) in zip(
        log_likelihoods(lm), stock[0], strict=True
    ):
        assert math.isclose(value, expected, abs_tol=1e-4)  # stock rounds logits to float32
        assert greedy == stock_greedy
    assert texts(lm) == stock[1]


def test_santa_decodes_the_window_and_the_choices(
    model_dir: Path, stock: tuple[list[tuple[float, bool]], list[str]]
) -> None:
    exact = model_class(SantaLM, model_dir, estimator="dense", window=4)
    for (value, _), (expected, _) in zip(log_likelihoods(exact), stock[0], strict=True):
        assert math.isclose(value, expected, abs_tol=1e-4)
    errors = []
    for samples in (4, 1024):
        lm = model_class(SantaLM, model_dir, samples=samples, window=4)
        got = log_likelihoods(lm)
        differences = [abs(a - b) for (a, _), (b, _) in zip(got, stock[0], strict=True)]
        errors.append(sum(differences) / len(differences))
        # Two batches of at most three contexts: a window each, and continuations of several tokens.
        assert santa_hf.stats(lm.model).total.sampled > LAYERS * 4 * 2
        assert log_likelihoods(model_class(SantaLM, model_dir, samples=samples, window=4)) == got
    assert errors[0] > 4 * errors[1] > 0
    other = model_class(SantaLM, model_dir, samples=4, window=4, seed=1)
    assert log_likelihoods(other) != got


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"attention": "flash"}, "attention must be santa or dense"),
        ({"samples": 0}, r"samples must be in \[1"),
        ({"kernel": "flash"}, "needs a CUDA device"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"model_config": '{"rope": 3}'}, "has no 'rope'"),
        ({"model_config": "{"}, "no JSON"),
        ({"sampels": 3}, "takes no argument 'sampels'; there are .*samples.*window"),
    ],
)
def test_bad_arguments_are_named_before_the_model_is_loaded(
    settings: dict[str, Any], message: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFLM, "__init__", None)
    with pytest.raises(CommandError, match=message):
        model_class(SantaLM, model_dir, **settings)


def test_a_prompt_is_never_truncated(model_dir: Path) -> None:
    lm = model_class(SantaLM, model_dir, max_length=30)
    words = " word" * 29
    lm.loglikelihood([SimpleNamespace(args=(words, " A"))], disable_tqdm=True)
    with pytest.raises(CommandError, match="29 tokens and 2 more would be truncated"):
        lm.loglikelihood([SimpleNamespace(args=(words, " A B"))], disable_tqdm=True)
    asked = SimpleNamespace(args=(words, {"max_gen_toks": 2}))
    with pytest.raises(CommandError, match="would be truncated"):
        lm.generate_until([asked], disable_tqdm=True)
    with pytest.raises(NotImplementedError, match="prefill"):
        lm.loglikelihood_rolling([])


# `python -m eval`, but for lm-eval's index of all its tasks, which takes half a minute.
EVAL_WITH_GSM8K_ALONE = """
import pathlib, runpy
import lm_eval.tasks as tasks
folder = pathlib.Path(tasks.__file__).parent / "gsm8k"
init = tasks.TaskManager.__init__
tasks.TaskManager.__init__ = lambda self, *args, **kwargs: init(
    self, include_defaults=False, include_path=str(folder), metadata=kwargs.get("metadata")
)
runpy.run_module("eval", run_name="__main__")
"""


def test_lm_evals_own_command_line_has_the_model_class(
    model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    arguments = f"""lm-eval run --model santa --tasks gsm8k --num_fewshot 1 --limit 2 --device cpu
        --model_args pretrained={model_dir},dtype=float64,samples=2,seed=3,window=2 --batch_size 2
        --gen_kwargs max_gen_toks=5 --log_samples --output_path {tmp_path / "out"}"""
    done = subprocess.run(
        [sys.executable, "-c", EVAL_WITH_GSM8K_ALONE, *arguments.split()],
        cwd=ROOT,
        env={**os.environ, VARIABLE: str(data_dir), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("samples_gsm8k_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    asked = [
        SimpleNamespace(args=tuple(sample["arguments"]["gen_args_0"].values()))
        for sample in {sample["doc_id"]: sample for sample in samples}.values()
    ]
    assert len(asked) == 2

    def texts_of(**settings: Any) -> list[str]:
        lm = model_class(SantaLM, model_dir, window=2, **settings)
        return lm.generate_until(asked, disable_tqdm=True)

    answered = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    assert list(answered.values()) == texts_of(samples=2, seed=3)
    assert list(answered.values()) != texts_of(attention="dense")


def test_answers_keep_lm_evals_order_and_one_batch_is_held_at_a_time(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model_class(SantaLM, model_dir, attention="dense")
    asked = [request.args for request in pairs()]
    # Two documents with contexts of several lengths, which batches order otherwise, and interleaved.
    requests = [asked[::3] + asked[1::3], asked[2::3][::-1]]
    responses: dict[int, Any] = {}

    def evaluate(given: dict[int, Any]) -> tuple[dict[str, Any], list[Any]]:
        responses.update(given)
        return {}, []

    task = MagicMock(output_type="multiple_choice", length=None, key="t", documents_sha256="")
    documents = MagicMock(task=task, ids=[3, 8], requests=requests, evaluate=evaluate)
    documents.__len__ = lambda self: 2
    work = run._Work(documents, 1, [(DENSE, 0)])
    header = MagicMock(config_hash="", provenance={}, seeds=[0])
    runner = run._TaskRunner(lm, work, run.Options(batch_size=2), header, tmp_path)
    prefixes: list[weakref.ref[Prefix]] = []
    prefill = lm.prefill

    def prefill_alone(chosen: Any) -> Any:
        assert not any(prefix() for prefix in prefixes)
        prefix, windows = prefill(chosen)
        prefixes.append(weakref.ref(prefix))
        return prefix, windows

    monkeypatch.setattr(lm, "prefill", prefill_alone)
    list(runner.results(SimpleNamespace(update=lambda n: None), None))
    assert len(prefixes) > 2
    for doc_id, arguments in zip(documents.ids, requests, strict=True):
        alone = lm.loglikelihood([SimpleNamespace(args=a) for a in arguments], disable_tqdm=True)
        for (value, _), (expected, _) in zip(responses[doc_id].values, alone, strict=True):
            assert math.isclose(value, expected, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--device", "cpu"], 16),
        (["--device", "cuda:1"], 512),
        (["--device", "cuda", "--batch-size", "3"], 3),
    ],
)
def test_a_gpu_has_large_batches(
    more: list[str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[run.Options] = []
    monkeypatch.setattr(run, "run", lambda *arguments: asked.append(arguments[3]) or [])
    run.main("run", ["--model", "DIR", "--suite", "smoke", "--out", str(tmp_path), *more])
    assert asked[0].batch_size == expected


def test_batches_hold_requests_of_one_kind_within_their_limits() -> None:
    requests = [
        *(Request(tuple(range(n)), 8) for n in (5, 30, 10, 20)),
        *(Request(tuple(range(n)), continuations=((1,), (2, 3))) for n in (7, 9)),
        Request((1,), 8),
    ]
    found = list(batches(requests, 4, batch_size=2))
    assert sorted(i for batch in found for i in batch) == list(range(7))
    assert [0, 2] in found or [2, 0] in found
    assert all(len(batch) <= 2 for batch in found)
    for batch in found:
        assert (
            len({(requests[i].continuations is None, requests[i].max_new_tokens) for i in batch})
            == 1
        )
        assert len({min(4, len(requests[i].tokens)) for i in batch}) == 1
    small = list(batches(requests, 4, batch_size=7, batch_tokens=60))
    assert {len(batch) for batch in small} == {1, 2, 3} - ({3} if [0, 2, 3] not in small else set())
    for batch in small:
        longest = max(len(requests[i].tokens) + requests[i].room for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= 60


def test_the_foil_keeps_the_largest_scores() -> None:
    model = tiny.build("llama", torch.float64)
    rows = [row[0].tolist() for row in tiny.prompts(60, 45)]
    windows = [row[-1:] for row in rows]
    choices = [[[token] for token in range(3, 20)]] * 2

    def values(arm: Arm) -> torch.Tensor:
        use_arm(model, DENSE, 0, "sdpa")
        prefix = Prefix(model, [row[:-1] for row in rows], 4)
        use_arm(model, arm, 0, "sdpa")
        scored = score(model, prefix, windows, choices)
        if arm.method == "top-k":
            k = (arm.config or {})["k"]
            use_arm(model, arm, 0, "sdpa")
            read, visible = count_value_rows(model, prefix, windows)
            assert visible == (60 + 45) * tiny.LAYERS * tiny.KV_HEADS
            # Two query heads share a KV head, and at most double its rows.
            one = 2 * tiny.LAYERS * tiny.KV_HEADS * k
            assert min(one, visible) <= read <= min(2 * one, visible)
        return torch.tensor([[s.log_likelihood for s in row] for row in scored])

    dense = values(DENSE)
    errors = [
        (values(Arm("t", "top-k", {"k": k}, True)) - dense).abs().mean().item()
        for k in (1, 8, 30, 60)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gemma2"])
def test_rows_beyond_a_sliding_window_are_neither_visible_nor_read(family: str) -> None:
    model = tiny.build(family, torch.float64)
    length = 100
    row = tiny.prompts(length)[0][0].tolist()
    window = [tiny.WINDOW] * tiny.LAYERS
    if family != "mistral":
        window[1] = length  # the layer in the middle sees everything
    expected = sum(window) * tiny.KV_HEADS
    use_arm(model, DENSE, 0, tiny.baseline(family))
    prefix = Prefix(model, [row[:-2]], 3)

    def count(arm: Arm) -> tuple[int, int]:
        use_arm(model, arm, 0, tiny.baseline(family))
        return count_value_rows(model, prefix, [row[-2:]])

    assert count(DENSE) == (expected, expected)
    # The first layer is exact by its configuration.
    exact = {"samples": 2, "layers": {"0": {"estimator": "dense"}}}
    for settings, whole_layers in (({"samples": 2}, 0), (exact, 1)):
        read, visible = count(Arm("s", "santa", settings, False))
        assert visible == expected
        dense = whole_layers * tiny.WINDOW * tiny.KV_HEADS
        sampled = (tiny.LAYERS - whole_layers) * tiny.HEADS
        assert dense + sampled <= read <= dense + 2 * sampled
    if family == "mistral":
        read, visible = count(Arm("t", "top-k", {"k": 3}, True))
        assert visible == expected
        assert read <= 3 * tiny.HEADS * tiny.LAYERS


@pytest.mark.parametrize(
    "arm",
    [
        Arm("s", "santa", {"samples": 4}, False),
        Arm("s", "santa", {"samples": 4, "min_context": 50}, False),
        Arm("t", "top-k", {"k": 3}, True),
    ],
    ids=["santa", "santa-min-context", "top-k"],
)
def test_rows_of_a_batch_are_those_of_its_prompts(arm: Arm) -> None:
    model = tiny.build("llama", torch.float64)
    rows = [row[0].tolist() for row in tiny.prompts(60, 45, 70)]

    def count(rows: list[list[int]]) -> tuple[int, int]:
        use_arm(model, DENSE, 0, "sdpa")
        prefix = Prefix(model, [row[:-2] for row in rows], 3)
        use_arm(model, arm, 0, "sdpa")
        return count_value_rows(model, prefix, [row[-2:] for row in rows])

    read, visible = count(rows)
    assert (read, visible) == tuple(map(sum, zip(*(count([row]) for row in rows), strict=True)))
    assert visible == (60 + 45 + 70) * tiny.LAYERS * tiny.KV_HEADS
    assert 0 < read < visible
    if "min_context" in (arm.config or {}):  # the row of 45 tokens is exact
        assert read >= 45 * tiny.LAYERS * tiny.KV_HEADS


@pytest.mark.parametrize(
    ("family", "reason"), [("gemma2", "soft-capped"), ("gpt_oss", "attention sinks")]
)
def test_the_foil_refuses_what_it_would_not_compute(family: str, reason: str) -> None:
    arm = Arm("t", "top-k", {"k": 3}, True)
    model = tiny.build(family)
    with pytest.raises(ValueError, match=f"arm 't': top_k knows nothing of.*{reason}"):
        check_model(arm, model.config)
    use_arm(model, arm, 0, "eager")
    with pytest.raises(CommandError, match=f"top_k=3 knows nothing of.*{reason}"):
        model(torch.tensor([[5]]))
    check_model(arm, tiny.shared("llama").config)
    check_model(Arm("s", "santa", {"layers": {}}, False), model.config)


# Runs


@pytest.fixture(scope="module")
def whole(
    model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A suite, and its finished run."""
    directory = tmp_path_factory.mktemp("run")
    layered = directory / "layered.yaml"
    layered.write_text("samples: 4\nlayers: {0: {estimator: dense}, 1: {samples: 2}}\n")
    path = directory / "suite.yaml"
    path.write_text(SUITE.replace("LAYERED", str(layered)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(VARIABLE, str(data_dir))
        patched.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        run_suite(model_dir, path, directory / "out")
    return path, directory / "out"


def test_results_say_what_ran(whole: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    header, found = load_results(whole[1])
    assert len(found) == RESULTS
    assert list(header.arms) == ["dense", "santa-4", "top-4", "per-layer"]
    assert header.tasks == ["niah_single_1-1024", "mmlu_anatomy", "gsm8k"]
    assert header.settings["data"] == {"source": "local", "haystack": "none"}
    by_key = {(r.task.name, r.arm.name, r.seed): r for r in found}
    for (task, arm, seed), result in by_key.items():
        counters = result.counters
        assert not counters.fallbacks
        assert len(result.documents) == {"niah_single_1": 3, "mmlu_anatomy": 5, "gsm8k": 3}[task]
        share = counters.share_of_rows_read or 0
        if arm == "per-layer":
            assert counters.sampled == counters.dense > 0
        elif arm != "santa-4":
            assert counters.sampled == 0
        if seed == 1:  # counted for the first seed alone
            assert share == counters.rows_counted_documents == 0
        elif arm == "dense":
            assert share == 1
        else:
            assert 0.5 < share < 0.6 if arm == "per-layer" else 0 < share < 0.2
        if seed == 0:
            assert counters.rows_counted_documents == len(result.documents)
        assert result.seconds > 0
        assert result.provenance["versions"]["lm-eval"]
    # One prompt token and the answer, or one step for the choices, goes through decode steps.
    assert by_key["mmlu_anatomy", "dense", 0].tokens == 5 * 3
    needle = by_key["niah_single_1", "santa-4", 0]
    assert needle.tokens == sum(3 + document.n_tokens - 1 for document in needle.documents)
    assert by_key["mmlu_anatomy", "dense", 0].task.chance == 0.25
    assert by_key["mmlu_anatomy", "dense", 0].task.num_fewshot == 2
    seeds = [by_key["gsm8k", "santa-4", seed].documents for seed in (0, 1)]
    assert [d.doc_hash for d in seeds[0]] == [d.doc_hash for d in seeds[1]]
    assert [d.output for d in seeds[0]] != [d.output for d in seeds[1]]
    compare.main("compare", [str(whole[1])])
    assert "niah_single_1-1024" in capsys.readouterr().out


@pytest.mark.usefixtures("local")
def test_a_run_that_a_full_disk_stopped_goes_on(
    whole: tuple[Path, Path], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, finished = whole
    out = tmp_path / "out"
    save = results.save_result
    done: list[Path] = []

    def fill(directory: Path, result: results.Result) -> Path:
        if len(done) == 8:
            raise OSError("No space left on device")
        done.append(save(directory, result))
        return done[-1]

    with monkeypatch.context() as patched:
        patched.setattr(results, "save_result", fill)
        with pytest.raises(CommandError, match=r"No space left.*finished before are kept"):
            run_suite(model_dir, suite, out)
    before = {path: path.stat().st_mtime_ns for path in done}
    assert len(load_results(out)[1]) == 8

    calls = counted_answers(monkeypatch)
    run_suite(model_dir, suite, out)
    _, found = load_results(out)
    assert {path: path.stat().st_mtime_ns for path in done} == before
    missing = [r for r in found if results.result_path(
        out, r.task.key, r.arm.name, r.seed) not in before]  # fmt: skip
    assert sum(calls) == sum(len(result.documents) for result in missing)
    assert answers(found) == answers(load_results(finished)[1])
    # Nothing is left: no model is loaded.
    monkeypatch.setattr(run, "_load", None)
    run_suite(model_dir, suite, out)


def test_two_processes_give_what_one_gives(
    whole: tuple[Path, Path], data_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    suite, finished = whole
    out = tmp_path / "out"
    # --multi_gpu: torch's launcher, where accelerate has MPI for CPUs.
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += f" --mixed_precision no --dynamo_backend no --main_process_port {free_port()}"
    few = ("--arms", "santa-4", "top-4", "--seeds", "0")
    done = subprocess.run(
        [
            sys.executable,
            *launch.split(),
            *("-m", "eval", "run"),
            *command(model_dir, suite, out, *few),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "1",
            "OMP_NUM_THREADS": "1",
            VARIABLE: str(data_dir),
            "XDG_CACHE_HOME": str(suite.parent / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("niah_single_1-1024") == 2  # one table, of one process
    _, found = load_results(out)
    expected = {(r.task.key, r.arm.name, r.seed): r for r in load_results(finished)[1]}
    assert len(found) == 3 * 3
    for two in found:
        one = expected[two.task.key, two.arm.name, two.seed]
        assert (one.processes, two.processes) == (1, 2)
        same(one, two)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def same(one: results.Result, two: results.Result) -> None:
    """All that must not depend on how the documents were shared or batched."""
    assert two.documents == one.documents
    assert two.metrics == one.metrics
    assert two.tokens == one.tokens
    for name in ("value_rows_read", "value_rows_visible", "rows_counted_documents"):
        assert getattr(two.counters, name) == getattr(one.counters, name)


def forked(*actions: Callable[[], None], **environment: str) -> list[int]:
    """Run actions in processes of their own, one rank each, which inherit all that is imported.

    Returns:
        What each ended with: 0, 1 for an exception, or minus the signal that killed it.
    """
    port = free_port()
    children = []
    for rank, action in enumerate(actions):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            if len(actions) > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(actions)),
                    LOCAL_WORLD_SIZE=str(len(actions)), MASTER_ADDR="localhost", MASTER_PORT=str(port),
                )  # fmt: skip
            # Threads are no use after a fork.
            os.environ.update(HF_DEACTIVATE_ASYNC_LOAD="1", **environment)
            accelerate.PartialState._reset_state()
            action()
            code = 0
        except BaseException:  # noqa: BLE001 - a child never returns into pytest
            traceback.print_exc()
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def killed_at(call: int, action: Callable[[], None]) -> Callable[[], None]:
    """An action that kill -9 ends as the model is about to answer its `call`-th batch."""
    respond = SantaLM.respond

    def act() -> None:
        calls = []

        def answer(self: SantaLM, *arguments: Any) -> list[Any]:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return respond(self, *arguments)

        SantaLM.respond = answer  # type: ignore[method-assign]
        action()

    return act


def counted_answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of prompts of every batch that a model answers from now on."""
    calls: list[int] = []
    respond = SantaLM.respond

    def count(self: SantaLM, prefix: Prefix, windows: Any, requests: list[Request]) -> list[Any]:
        calls.append(len(requests))
        return respond(self, prefix, windows, requests)

    monkeypatch.setattr(SantaLM, "respond", count)
    return calls


FEW = ("--arms", "santa-4", "--batch-size", "1")
FEW_RESULTS = 3 * (1 + 2)
FEW_PROMPTS = (3 + 5 + 3) * (1 + 2)


@pytest.mark.usefixtures("local")
def test_a_killed_run_repeats_one_batch_and_a_stopped_one_none(
    whole: tuple[Path, Path], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, finished = whole
    out = tmp_path / "out"

    def go_on(*more: str) -> None:
        run_suite(model_dir, suite, out, *FEW, *more)

    # Three documents times three (arm, seed): the third document's first arm is finished with it.
    assert forked(killed_at(7, go_on)) == [-signal.SIGKILL]
    assert not load_results(out)[1]
    assert len(list((out / ".partial").rglob("[!.]*.json"))) == 6
    # As if the kill had come in the middle of a write.
    (kept, *_) = (out / ".partial").rglob("[!.]*.json")
    kept.with_name(f".{kept.name}-abc").write_text("{")

    calls = counted_answers(monkeypatch)
    go_on("--time-limit", "0")
    assert not calls
    with monkeypatch.context() as patched:
        asked: list[int] = []
        patched.setattr(run, "_is_over", lambda _: bool(asked.append(1)) or len(asked) > 12)
        go_on("--time-limit", "1000")
    stopped = len(calls)
    assert 0 < stopped < FEW_PROMPTS - 6
    assert (out / ".partial").exists()
    go_on()
    assert sum(calls) == FEW_PROMPTS - 6
    assert not (out / ".partial").exists()
    _, found = load_results(out)
    expected = {(r.task.key, r.arm.name, r.seed): r for r in load_results(finished)[1]}
    assert len(found) == FEW_RESULTS
    for result in found:
        same(expected[result.task.key, result.arm.name, result.seed], result)
        assert result.seconds > 0 < result.prefill_seconds


@pytest.mark.usefixtures("local")
@pytest.mark.parametrize("common_disk", [False, True])
def test_two_processes_go_on_with_and_without_a_common_disk(
    common_disk: bool, whole: tuple[Path, Path], model_dir: Path, tmp_path: Path
) -> None:
    suite, finished = whole

    def rank(number: int, *more: str) -> Callable[[], None]:
        out = tmp_path / ("out-0" if common_disk else f"out-{number}")
        return lambda: run_suite(model_dir, suite, out, *FEW, *more)

    def exactly(prompts: int, action: Callable[[], None]) -> Callable[[], None]:
        def act() -> None:
            with pytest.MonkeyPatch.context() as patched:
                calls = counted_answers(patched)
                action()
                assert sum(calls) == prompts

        return act

    # Two of three needles are the first process's. The other has one answer and waits for it.
    assert forked(killed_at(4, rank(0)), rank(1)) == [-signal.SIGKILL, 1]
    assert not load_results(tmp_path / "out-0")[1]
    assert not (tmp_path / "out-1/run.json").exists()
    # What is left of the shares of 7 and 4 documents with three (arm, seed) each.
    assert forked(exactly(21 - 3, rank(0)), exactly(12 - 1, rank(1))) == [0, 0]
    _, found = load_results(tmp_path / "out-0")
    expected = {(r.task.key, r.arm.name, r.seed): r for r in load_results(finished)[1]}
    assert len(found) == FEW_RESULTS
    for result in found:
        same(expected[result.task.key, result.arm.name, result.seed], result)
    # What one process refuses ends the others too, here what only the first one sees.
    assert forked(rank(0, "--window", "2"), rank(1, "--window", "2")) == [1, 1]


def test_two_processes_share_documents_and_what_lm_eval_gathers(
    model_dir: Path, tmp_path: Path
) -> None:
    def gather(rank: int) -> Callable[[], None]:
        def act() -> None:
            processes("cpu")
            runner = a_runner(model_dir, tmp_path)
            # The bar is of a process's own share: of five documents, with three (arm, seed) each.
            updates: list[int] = []
            found = [r for *_, r in runner.results(SimpleNamespace(update=updates.append), None)]
            assert sum(updates) == runner.prompts == (9, 6)[rank]
            assert [r is None for r in found] == [rank == 1] * 3
            lm = runner.lm
            assert (lm.rank, lm.world_size) == (rank, 2)
            assert lm.all_gather(torch.tensor(rank + 5)).tolist() == [5, 6]
            lm.barrier()

        return act

    assert forked(gather(0), gather(1)) == [0, 0]


def a_runner(
    model_dir: Path, out: Path, max_length: int | None = None, **options: Any
) -> run._TaskRunner:
    """Five questions for dense and two seeds of an arm, none answered yet."""
    lm = model_class(SantaLM, model_dir, max_length=max_length)
    asked = [[(question, {"until": ["\n"], "max_gen_toks": 3})] for question, _ in SUMS]
    task = MagicMock(output_type="generate_until", length=None, key="t", documents_sha256="")
    documents = MagicMock(task=task, ids=list(range(5)), requests=asked, max_new_tokens=None)
    documents.__len__ = lambda self: 5
    documents.evaluate = lambda given: ({}, [])
    arm = Arm("s", "santa", {"samples": 4, "layers": {}}, False)
    work = run._Work(documents, 1, [(DENSE, 0), (arm, 0), (arm, 1)])
    header = MagicMock(config_hash="", provenance={}, seeds=[0])
    return run._TaskRunner(lm, work, run.Options(**{"batch_size": 2, **options}), header, out)


def test_the_bar_the_clock_and_the_counted_documents(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = a_runner(model_dir, tmp_path)
    respond, prefill = SantaLM.respond, SantaLM.prefill

    def slowly(self: SantaLM, *arguments: Any) -> list[Any]:
        time.sleep(0.1)
        return respond(self, *arguments)

    monkeypatch.setattr(SantaLM, "respond", slowly)
    monkeypatch.setattr(
        SantaLM, "prefill", lambda self, chosen: (time.sleep(0.03), prefill(self, chosen))[1]
    )
    updates: list[int] = []
    found = [r for *_, r in runner.results(SimpleNamespace(update=updates.append), None) if r]
    assert len(found) == 3
    assert sum(updates) == runner.prompts == 5 * 3
    for result in found:  # three batches
        assert 0.3 <= result.seconds < 0.3 + 1
        assert 0.09 <= result.prefill_seconds < 0.09 + 1
    # All of them, for dense and the first seed.
    assert [r.counters.rows_counted_documents for r in found] == [5, 5, 0]
    cached = runner.lm.model.config
    prompts = sum(len(request.tokens) for request in runner.requests)
    visible = prompts * cached.num_hidden_layers * cached.num_key_value_heads
    assert [r.counters.value_rows_visible for r in found] == [visible, visible, 0]


def test_a_prompt_that_the_model_class_finds_too_long_is_named(
    model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match=r"t, document 0: a prompt of .* would be truncated"):
        a_runner(model_dir, tmp_path, max_length=12)


def test_what_is_answered_twice_or_not_at_all_is_an_error(model_dir: Path, tmp_path: Path) -> None:
    runner = a_runner(model_dir, tmp_path)
    half = Progress(answers={0: {0: "a"}, 1: {0: "b"}})
    rest = Progress(answers={i: {0: "c"} for i in (2, 3, 4)})
    assert runner._result(DENSE, 0, [half, rest])
    with pytest.raises(RuntimeError, match=r"\[0, 1\] were answered twice"):
        runner._result(DENSE, 0, [half, rest, half])
    with pytest.raises(RuntimeError, match="2 of 5 requests were answered"):
        runner._result(DENSE, 0, [half])


def test_kept_answers_are_what_they_were_and_no_others(tmp_path: Path) -> None:
    done = Progress(
        answers={3: {0: (-1 / 3, True), 1: (-math.inf, False)}, 4: {0: "an answer"}},
        n_tokens=run.Counter({3: 2, 4: 7}),
        counters=run.Counter(sampled=5),
        fallbacks=run.Counter(mask=1),
        seconds=0.1,
        prefill_seconds=0.2,
        tokens=9,
    )
    of = {"config_hash": "ab"}
    partial.save(tmp_path, "task", "arm", 1, of, done)
    (found,) = partial.load(tmp_path, "task", "arm", 1, of).values()
    assert found == done
    assert not partial.load(tmp_path, "task", "arm", 1, {"config_hash": "cd"})
    assert not partial.load(tmp_path, "task", "arm", 2, of)
    partial.save(tmp_path, "task", "arm", 1, of, done)
    assert len(partial.load(tmp_path, "task", "arm", 1, of)) == 1  # no answer twice
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text()[:-30])
    assert not partial.load(tmp_path, "task", "arm", 1, of)
    partial.remove(tmp_path, "task", "arm", 1)
    assert not list(tmp_path.iterdir())


def test_provenance_says_what_ran_and_where() -> None:
    config = SimpleNamespace(_commit_hash="0a1b")
    model = SimpleNamespace(dtype=torch.bfloat16, config=config)
    lm = SimpleNamespace(device=torch.device("cpu"), model=model, dense="sdpa")
    found = run._model_provenance(lm, {"model_sha256": "ff"}, 3)
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found["commit"].rstrip("+") == commit.strip()
    assert found["device"] == provenance.cpu_model()
    assert len(found["device"]) > 1
    assert found["model_revision"] == "0a1b"
    assert found["model_sha256"] == "ff"
    assert (found["processes"], found["dtype"]) == (3, "bfloat16")
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(
        found["date"]
    )
    assert abs(age.total_seconds()) < 60


@pytest.mark.usefixtures("local")
def test_ruler_is_scored_at_every_length_and_may_overshoot_it(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.yaml"
    names = ("niah_single_1", "ruler_fwe")
    tasks = ", ".join(
        f"{{task: {name}, length: {length}, limit: 2, max_new_tokens: 50}}"
        for length in (1024, 1200)
        for name in names
    )
    # fwe, with a chat template, takes up to 1206 tokens and an answer at 1200.
    suite.write_text(f"arms: {{santa-2: {{samples: 2}}}}\nchat: true\ntasks: [{tasks}]\n")
    # As long as the prompts are meant to be: what lm-eval leaves out of a length has no room.
    run_suite(
        model_dir, suite, tmp_path / "out", "--model-config", '{"max_position_embeddings": 1200}'
    )
    header, found = load_results(tmp_path / "out")
    rows = {row.task: row for row in compare.compare(header, found) if len(row.tasks) > 1}
    assert set(rows) == {"ruler-1024", "ruler-1200"}
    for key, row in rows.items():
        for arm, mean in (("dense", row.dense), ("santa-2", row.score)):
            each = [r for r in found if r.arm.name == arm and r.task.length == int(key[6:])]
            assert mean == pytest.approx(sum(r.score.value for r in each) / 2)
        assert (row.arm, len(row.tasks), row.documents) == ("santa-2", 2, 4)
    printed = capsys.readouterr().out
    assert "ruler-1024" in printed
    assert "ruler-1200" in printed


# Bad input, named before a model is loaded


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run, "_load", load)


NEEDLE = "tasks: [{task: niah_single_1, length: 1024, limit: 1}]\n"


@pytest.mark.usefixtures("local", "no_model")
@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("tasks: [{task: mmlu_astronomy}]", [], r"astronomy.parquet is missing"),
        (
            "tasks: [{task: niah_single_2, length: 1024, limit: 1}]",
            [],
            "train.parquet is missing|punkt",
        ),
        ("tasks: [{task: ruler_qa_squad, length: 1024, limit: 1}]", [], "squad_dev.* is missing"),
        ("tasks: [{task: ruler_vt, length: 8192, limit: 1}]", [], "longer than the 4096"),
        (NEEDLE + "arms: {a: {kernel: flash}}", [], "'a'.*needs a CUDA device"),
        (NEEDLE + "arms: {a: {config: nowhere.yaml}}", [], "nowhere.yaml"),
        (NEEDLE, ["--arms", "a:samples=x"], "samples must be"),
        (NEEDLE, ["--arms", "a/b:samples=4"], "'a/b' is no name of an arm"),
        (NEEDLE, ["--arms", "a:samples=4", "a:samples=5"], "arm 'a' is given twice"),
        (NEEDLE + "arms: {a: {layers: {99: {samples: 3}}}}", [], "'a'.*layer 99.*has 0 to 1"),
        ("tasks: [{task: mmlu_anatomy}, {task: mmlu}]", [], "'mmlu_anatomy' and 'mmlu' both come"),
        (
            "tasks: [{task: ruler, length: 1024}, {task: niah_single_1, length: 1024}]",
            [],
            "'ruler' and 'niah_single_1' both.*at 1024 tokens",
        ),
        (
            "tasks: [{task: gsm8k, num_fewshot: 2}]",
            ["--model-config", '{"max_position_embeddings": 290}'],
            r"gsm8k, document 0: a prompt of \d+ tokens and 256 more would be truncated to.*290",
        ),
        (NEEDLE, ["--batch-size", "0"], "--batch-size must be at least 1"),
        (NEEDLE, ["--seeds", "-1"], "seeds must be"),
        (NEEDLE, ["--model-config", "{"], "not JSON"),
        (NEEDLE, ["--model-config", '{"rope": 1}'], "has no 'rope'"),
        (NEEDLE, ["--adapter", "nowhere"], "nowhere holds no adapter"),
        (NEEDLE, ["--dtype", "float31"], "float31"),
        (NEEDLE, ["--device", "gpu"], "gpu"),
        (NEEDLE, ["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(
    text: str, more: list[str], message: str, model_dir: Path, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(text)
    with pytest.raises(CommandError, match=message):
        run_suite(model_dir, suite, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local", "no_model")
def test_what_cannot_be_written_or_formatted_is_named_before_a_model_is_loaded(
    model_dir: Path, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(NEEDLE + "chat: true\n")
    with pytest.raises(CommandError, match=r"suite\.yaml/out cannot be written"):
        run_suite(model_dir, suite, suite / "out")
    with pytest.raises(CommandError, match="cannot be written"):
        run_suite(model_dir, suite, Path("/proc/nowhere/out"))
    plain = tmp_path / "plain"
    shutil.copytree(model_dir, plain, ignore=shutil.ignore_patterns("chat_template*"))
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CommandError, match=r"chat is true.*has no chat template"):
        run_suite(plain, suite, tmp_path / "out")


@pytest.mark.usefixtures("local", "no_model")
def test_a_directory_of_something_else_is_left_alone(
    whole: tuple[Path, Path], model_dir: Path, tmp_path: Path
) -> None:
    suite, finished = whole
    with pytest.raises(CommandError, match=r"tasks\[0\].window is 3 there and 2 here"):
        run_suite(model_dir, suite, finished, "--window", "2")
    with pytest.raises(CommandError, match="arm 'santa-4' is configured otherwise"):
        run_suite(model_dir, suite, finished, "--arms", "santa-4:samples=5")
    with pytest.raises(CommandError, match="no suite 'nowhere'"):
        run_suite(model_dir, "nowhere", finished)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CommandError, match="not the directory of a run"):
        run_suite(model_dir, suite, tmp_path)
    # What the first write of a run leaves when it is killed is no other's.
    out = tmp_path / "out"
    out.mkdir()
    (out / ".run.json-abc").write_text("{")
    with pytest.raises(AssertionError, match="a model was loaded"):
        run_suite(model_dir, suite, out)


@pytest.mark.usefixtures("local", "no_model")
def test_other_documents_or_weights_are_not_added_to_a_run(
    whole: tuple[Path, Path], model_dir: Path, data_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    suite, finished = whole
    out = shutil.copytree(finished, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(provenance, "weights", lambda model: {"model_sha256": "ab"})
        with pytest.raises(CommandError, match=r"model_sha256 is .* there and ab here"):
            run_suite(model_dir, suite, out, "--seeds", "2")
    other = shutil.copytree(data_dir, tmp_path / "data")
    path = other / "gsm8k/main/test.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows[0]["question"] = "Ben has 7 pears. How many?"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    monkeypatch.setenv(VARIABLE, str(other))
    with pytest.raises(
        CommandError, match=r"gsm8k.*its documents are not those that the data give"
    ):
        run_suite(model_dir, suite, out, "--seeds", "2")


@pytest.mark.usefixtures("local", "no_model")
def test_a_corrupt_result_is_named(
    whole: tuple[Path, Path], model_dir: Path, tmp_path: Path
) -> None:
    suite, finished = whole
    out = tmp_path / "out"
    header, found = load_results(finished)
    results.save_header(out, header)
    path = results.save_result(out, found[0])
    path.write_text(path.read_text()[:100])
    with pytest.raises(
        CommandError, match=r"seed-0\.json: corrupt.*delete the file, and the same command makes"
    ):
        run_suite(model_dir, suite, out)
    results.save_result(out, found[0])
    (out / "run.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CommandError, match=r"run\.json.*missing"):
        run_suite(model_dir, suite, out)
