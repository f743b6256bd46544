"""A run: decode window, the model class "santa", local data, resuming, two processes, bad input.

The model is tiny and random, with the tokenizer of SmolLM2: scores mean nothing here, agreement does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pyarrow
import pyarrow.parquet
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

import santa_hf
from eval import compare, results, run
from eval.arms import DENSE, use_arm
from eval.cli import CommandError
from eval.data import VARIABLE
from eval.decode import Prefix, count_value_rows, score
from eval.lm import Request, SantaLM, batches
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
            each = [count_value_rows(model, prefix.row(i), windows[i]) for i in range(2)]
            read, visible = map(sum, zip(*each, strict=True))
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
            assert share == 0
        elif arm == "dense":
            assert share == 1
        else:
            assert 0.5 < share < 0.6 if arm == "per-layer" else 0 < share < 0.2
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
    save, respond = results.save_result, SantaLM.respond
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

    calls: list[int] = []

    def count(self: SantaLM, prefix: Prefix, windows: Any, requests: list[Request]) -> list[Any]:
        calls.append(len(requests))
        return respond(self, prefix, windows, requests)

    monkeypatch.setattr(SantaLM, "respond", count)
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
    finished, out, suite = whole[1], tmp_path / "out", tmp_path / "suite.yaml"
    lines = whole[0].read_text().splitlines()
    suite.write_text("\n".join(line for line in lines if "niah" not in line))
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 -m eval run"
    few = ("--arms", "santa-4", "top-4", "--seeds", "1")
    done = subprocess.run(
        [sys.executable, *launch.split(), *command(model_dir, suite, out, *few)],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            VARIABLE: str(data_dir),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, found = load_results(out)
    expected = {(r.task.key, r.arm.name, r.seed): r for r in load_results(finished)[1]}
    assert len(found) == 2 * 3
    for two in found:
        one = expected[two.task.key, two.arm.name, two.seed]
        assert (one.processes, two.processes) == (1, 2)
        assert two.documents == one.documents
        assert two.metrics == one.metrics
        assert two.tokens == one.tokens


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
    with pytest.raises(CommandError, match=r"seed-0\.json: corrupt"):
        run_suite(model_dir, suite, out)
    results.save_result(out, found[0])
    (out / "run.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CommandError, match=r"run\.json.*missing"):
        run_suite(model_dir, suite, out)
