"""Teacher-forced fidelity: what is measured, against a plain forward pass, and the files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from eval import fidelity, provenance, results
from eval.arms import DENSE, use_arm
from eval.cli import CommandError
from eval.fidelity import Fidelity, Passage, cut, load_fidelity, main, measure, summarise
from eval.results import load_header, write_json
from tests import runs, tiny

CONTEXT, FED = 90, 20


@pytest.fixture
def model() -> Any:
    return tiny.build("llama", torch.float64)


def passages(count: int) -> list[list[int]]:
    return [row[0].tolist() for row in tiny.prompts(*[CONTEXT + FED + 1] * count)]


def test_dense_is_a_plain_forward_pass(model: Any) -> None:
    texts = passages(2)
    (dense,) = measure(model, texts, CONTEXT, [(DENSE, 0)], dense="sdpa")
    model.set_attn_implementation("sdpa")
    tokens = torch.tensor(texts)
    with torch.inference_mode():
        log_probs = model(tokens).logits.log_softmax(-1)
    for row, passage in enumerate(dense):
        assert passage.kl == pytest.approx([0.0] * FED, abs=1e-9)
        assert passage.agrees == [True] * FED
        expected = [
            -log_probs[row, i - 1, tokens[row, i]].item()
            for i in range(CONTEXT + 1, CONTEXT + FED + 1)
        ]
        assert passage.nll == pytest.approx(expected, rel=1e-4)
    assert dense[0].sha256 != dense[1].sha256


def test_divergence_is_that_of_the_distributions(model: Any) -> None:
    texts = passages(2)
    top = runs.top_k(3)
    _, found = measure(model, texts, CONTEXT, [(DENSE, 0), (top, 0)], dense="sdpa")
    # The same decode steps by hand, one passage at a time.
    for row, text in enumerate(texts):
        logits = []
        for arm in (DENSE, top):
            use_arm(model, DENSE, 0, "sdpa")
            cache = DynamicCache(config=model.config)
            with torch.inference_mode():
                model(torch.tensor([text[:CONTEXT]]), past_key_values=cache)
                use_arm(model, arm, 0, "sdpa")
                steps = [
                    model(torch.tensor([[token]]), past_key_values=cache).logits[:, -1]
                    for token in text[CONTEXT:-1]
                ]
            logits.append(torch.cat(steps).log_softmax(-1))
        p, q = logits
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        assert found[row].kl == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
        assert found[row].agrees == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert np.mean(found[0].kl) > 0.01
    assert not all(found[0].agrees)


def test_more_samples_diverge_less_and_seeds_differ(model: Any) -> None:
    arms = [(runs.santa(s), seed) for s in (2, 512) for seed in (0, 1)]
    found = list(measure(model, passages(1), CONTEXT, arms, dense="sdpa"))
    few, again, many, _ = (np.mean(arm[0].kl) for arm in found)
    assert few > 5 * many > 0
    assert few != again
    repeated = measure(model, passages(1), CONTEXT, arms[:1], dense="sdpa")
    assert list(repeated) == found[:1]


def test_passages_are_spread_and_measured_parts_do_not_overlap() -> None:
    found = cut(range(1000), 300, 50, 5)
    assert [len(passage) for passage in found] == [350] * 5
    assert found[0][0] == 0
    assert found[-1][-1] == 999
    measured = [token for passage in found for token in passage[300:]]
    assert len(set(measured)) == len(measured)
    with pytest.raises(CommandError, match=r"500 tokens; 5 passages of 300 .* need 550"):
        cut(range(500), 300, 50, 5)


# Files and their summary


def made(arm: Any, seed: int, kl: float, hash_: str = "h") -> Fidelity:
    rng = np.random.default_rng(seed)
    texts = [
        Passage(
            f"{hash_}{i}",
            (kl * rng.exponential(size=128)).tolist(),
            (rng.random(128) >= kl).tolist(),
            [2.0 + kl] * 128,
        )
        for i in range(3)
    ]
    config_hash = runs.header([]).config_hash
    return Fidelity(1, arm, seed, config_hash, "some text", 4096, texts)


S8 = runs.santa(8)


def test_summary_holds_means_and_their_intervals() -> None:
    results = [made(DENSE, 0, 0.0), *(made(S8, seed, 0.1) for seed in (0, 1, 2))]
    (summary,) = summarise(results)
    every = [k for r in results[1:] for p in r.passages for k in p.kl]
    assert (summary.arm, summary.seeds, summary.tokens) == ("santa-8", [0, 1, 2], 384)
    assert summary.kl.value == pytest.approx(np.mean(every))
    assert summary.kl.low < 0.1 < summary.kl.high
    # Exponential and independent: standard error = mean / sqrt(tokens), whatever the blocks.
    assert summary.kl.standard_error == pytest.approx(0.1 / np.sqrt(3 * 384), rel=0.5)
    assert summary.agreement.low < 0.9 < summary.agreement.high
    assert summary.perplexity == pytest.approx(np.exp(2.1))
    assert summary.dense_perplexity == pytest.approx(np.exp(2.0))
    assert summary.dense_kl == 0
    noisy = summarise([made(DENSE, 0, 0.01), *results[1:]])[0]
    assert noisy.dense_kl == pytest.approx(0.01, rel=0.2)


def test_tokens_that_follow_one_another_are_resampled_together() -> None:
    # Runs of 32 equal values carry 1/32 of the information that as many independent ones would.
    result = made(S8, 0, 0.1)
    steps = [dataclasses.replace(p, kl=np.repeat(p.kl[::32], 32).tolist()) for p in result.passages]
    (summary,) = summarise([made(DENSE, 0, 0.0), dataclasses.replace(result, passages=steps)])
    values = np.array([p.kl for p in steps])[:, ::32]
    assert summary.kl.standard_error == pytest.approx(values.std() / np.sqrt(12), rel=0.1)


def test_summary_needs_dense_on_the_same_passages() -> None:
    assert summarise([]) == []
    with pytest.raises(CommandError, match="no result of dense"):
        summarise([made(S8, 0, 0.1)])
    with pytest.raises(CommandError, match="not on the passages of dense"):
        summarise([made(DENSE, 0, 0.0), made(S8, 0, 0.1, "other")])


def test_files_are_checked_against_the_run(tmp_path: Path) -> None:
    header = runs.header([S8])
    for result in (made(S8, 1, 0.1), made(S8, 0, 0.1), made(DENSE, 0, 0.0)):
        write_json(fidelity._path(tmp_path, result), dataclasses.asdict(result))
    found = load_fidelity(tmp_path, header)
    assert [(r.arm.name, r.seed) for r in found] == [("dense", 0), ("santa-8", 0), ("santa-8", 1)]
    path = tmp_path / "fidelity/santa-8-seed-1.json"
    good = json.loads(path.read_text())
    for change, message in [
        ({"seed": 2}, "not that of run.json"),
        ({"config_hash": "other"}, "another configuration"),
        ({"format": 9}, "format 9"),
        ({"extra": 1}, "'extra' is not a field"),
        ({"weights": {"model_sha256": "ff"}}, "model_sha256 is ff, elsewhere in the run 00"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(CommandError, match=message) as raised:
            load_fidelity(tmp_path, header)
        assert "santa-8-seed-1.json" in str(raised.value)


def test_weights_that_the_run_does_not_say_are_those_of_the_first_file(tmp_path: Path) -> None:
    header = dataclasses.replace(runs.header([S8]), provenance={})
    for result, sha256 in ((made(DENSE, 0, 0.0), "aa"), (made(S8, 0, 0.1), "aa")):
        result = dataclasses.replace(result, weights={"adapter_sha256": sha256})
        write_json(fidelity._path(tmp_path, result), dataclasses.asdict(result))
    older = dataclasses.asdict(made(S8, 1, 0.1))
    del older["weights"]
    write_json(tmp_path / "fidelity/santa-8-seed-1.json", older)
    assert [r.weights.get("adapter_sha256") for r in load_fidelity(tmp_path, header)] == [
        "aa",
        "aa",
        None,
    ]
    write_json(
        tmp_path / "fidelity/santa-8-seed-1.json", older | {"weights": {"adapter_sha256": "bb"}}
    )
    with pytest.raises(CommandError, match=r"seed-1\.json: adapter_sha256 is bb, .* run aa"):
        load_fidelity(tmp_path, header)


@pytest.mark.model
def test_the_command_measures_the_arms_of_a_run(
    smollm2: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    model = {"name": str(smollm2), "revision": None, "adapter": None, "dtype": "float32"}
    header = dataclasses.replace(
        runs.header([S8], seeds=[0, 1]),
        model=model,
        provenance=provenance.weights(model),
        config_hash=results.config_hash(model, runs.SETTINGS),
    )
    results.save_header(run, header)
    text = tmp_path / "text.txt"
    text.write_text(
        "The river runs to the sea, and the sea gives the rain back to the hills. " * 12
    )
    arguments = [str(run), "--text", str(text), "--context", "100", "--tokens", "6"]
    arguments += ["--passages", "2", "--quiet", "--device", "cpu"]

    def killed(*args: Any, **options: Any) -> Any:
        arms = measure(*args, **options)
        yield next(arms)
        yield next(arms)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fidelity, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            main("fidelity", arguments)
    assert [(r.arm.name, r.seed) for r in load_fidelity(run, header)] == [
        ("dense", 0),
        ("santa-8", 0),
    ]
    main("fidelity", arguments)
    printed = capsys.readouterr().out
    assert "santa-8" in printed
    assert "dense: perplexity" in printed
    found = load_fidelity(run, header)
    assert [(r.arm.name, r.seed) for r in found] == [("dense", 0), ("santa-8", 0), ("santa-8", 1)]
    assert all(r.weights == header.provenance | {"model_revision": None} for r in found)
    assert [len(passage.kl) for passage in found[1].passages] == [6, 6]
    assert max(found[0].passages[0].kl) < 1e-6 < min(found[1].passages[0].kl)
    # Nothing is left to do, and the files are refused for another text.
    before = [path.stat().st_mtime_ns for path in sorted((run / "fidelity").iterdir())]
    main("fidelity", arguments)
    assert before == [path.stat().st_mtime_ns for path in sorted((run / "fidelity").iterdir())]
    with pytest.raises(CommandError, match=r"measured on text\.txt, sha256 .* after 100 tokens"):
        main("fidelity", [*arguments, "--context", "50"])


def run_of(directory: Path, model: Path, arms: list[Any]) -> Path:
    """A directory with a run.json of a model, and a text for it."""
    named = {"name": str(model), "revision": None, "adapter": None, "dtype": "float32"}
    header = dataclasses.replace(
        runs.header(arms, seeds=[0]),
        model=named,
        provenance={},
        config_hash=results.config_hash(named, runs.SETTINGS),
    )
    results.save_header(directory / "run", header)
    (directory / "text.txt").write_text("a b c d e f g h " * 100)
    return directory / "run"


class _Letters:
    """A tokenizer for tiny models: a token for each character."""

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> _Letters:
        return cls()

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[3 + ord(letter) % 90 for letter in text])


def command(run: Path, *more: str) -> None:
    arguments = ["--text", str(run.parent / "text.txt"), "--context", "40", "--tokens", "4"]
    main("fidelity", [str(run), *arguments, "--quiet", "--device", "cpu", *more])


def test_a_model_with_sliding_windows_is_measured_at_the_default_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.build("gemma3", torch.float32).save_pretrained(tmp_path / "model")
    run = run_of(tmp_path, tmp_path / "model", [S8])
    monkeypatch.setattr(fidelity, "AutoTokenizer", _Letters)
    command(run)
    assert "santa-8" in capsys.readouterr().out
    found = load_fidelity(run, load_header(run))
    assert [len(result.passages) for result in found] == [8, 8]


def test_weights_that_changed_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build("llama", torch.float32).save_pretrained(tmp_path / "model")
    run = run_of(tmp_path, tmp_path / "model", [])
    monkeypatch.setattr(fidelity, "AutoTokenizer", _Letters)
    command(run)
    results.save_header(run, dataclasses.replace(load_header(run), arms=runs.header([S8]).arms))
    before = provenance.weights(load_header(run).model)
    tiny.build("llama", torch.float64).save_pretrained(tmp_path / "model")
    assert provenance.weights(load_header(run).model) != before
    with pytest.raises(
        CommandError, match=r"run\.json: model_sha256 is .* the weights have changed"
    ):
        command(run)


def test_what_cannot_run_is_named_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = runs.santa(8, kernel="flash")
    run = run_of(tmp_path, tmp_path / "nowhere", [flash])
    with pytest.raises(CommandError, match=r"kernel='flash', which needs a CUDA device"):
        command(run)
    run = run_of(tmp_path, tmp_path / "nowhere", [S8])
    with pytest.raises(CommandError, match="--device quantum cannot be used"):
        command(run, "--device", "quantum")
    with pytest.raises(CommandError, match="nowhere has no tokenizer"):
        command(run)
    monkeypatch.setattr(fidelity, "AutoTokenizer", _Letters)
    with pytest.raises(CommandError, match=r"the text has 1600 tokens; 8 passages of 2000"):
        command(run, "--context", "2000")
    with pytest.raises(CommandError, match="nowhere cannot be loaded"):
        command(run)


def test_a_hub_out_of_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.delenv("SANTA_HF_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    run = run_of(tmp_path, tmp_path / "nowhere", [S8])
    with pytest.raises(CommandError, match=r"essays .* Couldn't reach the Hub; give .* --text"):
        main("fidelity", [str(run)])


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, tmp_path / "nowhere", [S8])
    (run / "fidelity").write_text("")
    with pytest.raises(CommandError, match="run/fidelity cannot be written"):
        command(run)
    (run / "fidelity").unlink()
    tiny.build("llama", torch.float32).save_pretrained(tmp_path / "nowhere")
    monkeypatch.setattr(fidelity, "AutoTokenizer", _Letters)

    def full(path: Path, values: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fidelity, "write_json", full)
    with pytest.raises(CommandError, match=r"dense-seed-0\.json cannot be written: No space left"):
        command(run)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3e-9, "0"),
        (0.0000123, "0.0000123"),
        (0.000456, "0.000456"),
        (0.0123, "0.0123"),
        (0.5, "0.500"),
        (12.34, "12.3"),
        (1234.5, "1234"),
    ],
)
def test_divergences_are_written_in_plain_decimals(value: float, text: str) -> None:
    assert fidelity.decimal(value) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--text", "nowhere.txt"], r"nowhere\.txt"),
    ],
)
def test_bad_arguments_are_named_before_a_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    results.save_header(tmp_path, runs.header([S8]))
    with pytest.raises(CommandError, match=message):
        main("fidelity", [str(tmp_path), *arguments])
    with pytest.raises(CommandError, match=r"run\.json"):
        main("fidelity", [str(tmp_path / "none")])
