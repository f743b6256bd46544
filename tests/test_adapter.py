"""The adapter's recipe: truthful sequences in lm-eval's wording, the loss, training that goes on."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from eval import adapter, models, results, run, synthetic
from eval.cli import CommandError
from eval.synthetic import TASKS, Example, Source, draw

PROSE = ["The hills were quiet that year.", "Nobody asked her why.", "Rain came late, and stayed."]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def source(tokenizer: Any) -> Source:
    return Source(tokenizer, PROSE, seed=1)


def split(tokenizer: Any, example: Example) -> tuple[str, list[tuple[str, str]]]:
    """Text before the first answer, and (text after the answer before, answer) pairs."""
    starts = [t.position + 1 for t in example.targets]
    ends = [p for p in starts if example.token_ids[p] == tokenizer.eos_token_id]
    pairs, at = [], 0
    for end in ends:
        first = next(p for p in starts if p >= at)
        pairs.append(
            (
                tokenizer.decode(example.token_ids[at:first]),
                tokenizer.decode(example.token_ids[first:end]),
            )
        )
        at = end + 1
    return pairs[0][0], pairs


@pytest.mark.model
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [512, 1100, 4096])
def test_sequences_fit_and_targets_are_what_comes_next(
    source: Source, tokenizer: Any, task: str, length: int
) -> None:
    # A solved example of 400 tokens leaves next to no room for a second one in 512.
    least = 0.25 if (task, length) == ("variables", 512) else 0.6
    for _ in range(3):
        example = draw(source, task, length)
        assert least * length < len(example.token_ids) <= length
        for target in example.targets:
            assert example.token_ids[target.position + 1] in target.tokens
        # A prompt is tokenised as one text, as in an evaluation.
        prompt = example.token_ids[: example.targets[0].position + 1]
        assert tokenizer(tokenizer.decode(prompt)).input_ids == prompt
        assert example.token_ids[-1] == tokenizer.eos_token_id


@pytest.mark.model
def test_needles_are_answered_truthfully(source: Source, tokenizer: Any) -> None:
    kinds = set()
    for _ in range(60):
        context, pairs = split(tokenizer, draw(source, "needles", 2048))
        keys = re.findall(r"magic \w+ for (\S+) is:", context)
        for question, answer in pairs:
            names = re.split(r", and |, ", question.rsplit(" for ", 1)[1].split(" mentioned")[0])
            facts = {
                name: re.findall(rf"magic \w+ for {re.escape(name)} is: (\S+)\.", context)
                for name in names
            }
            assert answer.strip().split(", ") == [value for name in names for value in facts[name]]
            # Of no key but those that are to have several, there are two needles.
            assert max(Counter(keys).values()) == len(facts[names[0]])
            kinds.add((len(names), len(facts[names[0]]), "-" in answer))
    assert kinds == {(1, 1, False), (1, 1, True), (1, 4, False), (4, 1, False)}


@pytest.mark.model
@pytest.mark.parametrize("variant", synthetic._VARIANTS)
def test_some_needles_are_as_few_as_rulers(
    source: Source, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, variant: Any
) -> None:
    monkeypatch.setattr(synthetic, "_VARIANTS", {variant: 1})
    for alone in (0, 1):
        monkeypatch.setattr(synthetic, "_RULERS_OWN", alone)
        context, pairs = split(tokenizer, draw(source, "needles", 4096))
        needles = len(re.findall("One of the special", context))
        hidden = variant.keys * variant.values
        if alone:
            assert len(pairs) == 1
            assert needles > 20 if variant.haystack == "needle" else needles == hidden
        else:
            assert len(pairs) > 4
            assert needles > hidden


@pytest.mark.model
def test_keys_share_words_rarely_or_often_and_differ(source: Source) -> None:
    from lm_eval.tasks.ruler import cwe_utils

    theirs = {word.lower() for word in cwe_utils.WORDS}
    count, shared = 1375, []
    for _ in range(60):
        keys = list(itertools.islice(synthetic._keys(source, count), count))
        assert len(set(keys)) == count
        words = [key.split("-", 1) for key in keys]
        assert not theirs & {part for key in keys for part in key.split("-")}
        uses = [Counter(pair[i] for pair in words) for i in (0, 1)]
        several = sum(uses[0][one] > 1 or uses[1][two] > 1 for one, two in words)
        shared.append(several / count)
    # RULER's own share is 0.8.
    assert min(shared) < 0.8
    assert max(shared) == 1
    assert 0.85 < sum(shared) / len(shared) < 1


@pytest.mark.model
def test_keys_have_as_many_tokens_as_rulers(source: Source, tokenizer: Any) -> None:
    from lm_eval.tasks.ruler import prepare_niah

    def tokens(keys: list[str]) -> float:
        return sum(map(len, tokenizer([f" {key}" for key in keys]).input_ids)) / len(keys)

    ours = [next(synthetic._keys(source, 1)) for _ in range(1000)]
    assert tokens(ours) == pytest.approx(tokens(prepare_niah.WORDS[::5000]), rel=0.1)


@pytest.mark.model  # of the fixture that imports RULER's modules without their download
def test_essays_are_joined_as_rulers(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks.ruler import prepare_niah

    depths = [0, 50, 80, 100]
    monkeypatch.setattr(prepare_niah, "DEPTHS", depths)
    monkeypatch.setattr(
        prepare_niah, "cached_sent_tokenize", lambda text: adapter.sentences([text])
    )
    hay = PROSE * 7
    words = " ".join(hay).split()
    theirs, _, _ = prepare_niah.generate_input_output(
        len(words),
        words,
        type_haystack="essay",
        num_needle_k=4,
        type_needle_k="words",
        num_needle_v=1,
        type_needle_v="numbers",
        template="{context}",
    )
    needles = re.findall(r"One of [^.]*\.", theirs)
    assert len(needles) == 4
    assert synthetic._essay(hay, needles, depths) == theirs


@pytest.mark.model
def test_chains_are_answered_truthfully(source: Source, tokenizer: Any) -> None:
    for _ in range(10):
        context, pairs = split(tokenizer, draw(source, "variables", 1500))
        for question, answer in pairs:
            value = re.findall(r"assgined the value (\d+), they are:$", question)[0]
            names = set(re.findall(rf"VAR (\w{{5}}) = {value}\b", context))
            for _ in range(4):
                names |= {a for a, b in re.findall(r"VAR (\w+) = VAR (\w+)", context) if b in names}
            assert len(names) == 5
            assert set(answer.split()) == names


@pytest.mark.model
@pytest.mark.parametrize(("length", "ratio"), [(1200, 2), (4096, 5), (16384, 10)])
def test_common_words_are_the_most_common(
    source: Source, tokenizer: Any, length: int, ratio: int
) -> None:
    example = draw(source, "common_words", length)
    context, ((_, answer),) = split(tokenizer, example)
    counts = Counter(re.findall(r"\d+\. (\S+)", context.split("\nQuestion")[0]))
    named = re.findall(r"\d+\. (\S+)", answer)
    assert sorted(named) == sorted(word for word, _ in counts.most_common(10))
    assert counts[named[0]] >= ratio * counts.most_common(11)[10][1]
    # Any of the words still to be named is right: ten before the first, one before the last.
    first = [t for t in example.targets if len(t.tokens) > 1]
    starts = {tokenizer(f" {word}").input_ids[0] for word in named}
    assert set(first[0].tokens) == starts
    named_first = example.token_ids[first[0].position + 1]
    assert set(first[1].tokens) <= starts
    assert len(first[1].tokens) >= len(first[0].tokens) - 1
    assert named_first in starts


@pytest.mark.model
def test_frequent_words_are_the_most_frequent(source: Source, tokenizer: Any) -> None:
    context, ((_, answer),) = split(tokenizer, draw(source, "frequent_words", 4096))
    text = context.split("coded words. ")[1].split("\nQuestion")[0]
    ranked = [word for word, _ in Counter(text.split()).most_common(4)]
    assert ranked[0] == "..."
    assert answer.split() == ranked[1:]


def lm_evals_prompts(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A task of `TASKS` and a short prompt, as lm-eval joins its parts, of each kind."""
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils

    for module, name in (
        (niah_utils, "generate_samples"),
        (vt_utils, "sys_vartrack_w_noise_random"),
        (cwe_utils, "sys_word_pair_random"),
        (fwe_utils, "sys_kwext"),
    ):
        whole = getattr(module, name)

        def one(*args: Any, whole: Any = whole, **options: Any) -> Any:
            return whole(*args, **(options | {"num_samples": 1}))

        monkeypatch.setattr(module, name, one)
    haystacks = {
        "essay": (" ".join(PROSE * 100)).split(),
        "repeat": prepare_niah.get_haystack("repeat"),
        "needle": prepare_niah.get_haystack("needle"),
    }
    monkeypatch.setattr(niah_utils, "get_haystack", lambda type_haystack: haystacks[type_haystack])
    monkeypatch.setattr(
        prepare_niah, "cached_sent_tokenize", lambda text: adapter.sentences([text])
    )
    made = [
        ("needles", niah_utils.niah_single_1),
        ("needles", niah_utils.niah_single_3),
        ("needles", niah_utils.niah_multikey_3),
        ("needles", niah_utils.niah_multivalue),
        ("needles", niah_utils.niah_multiquery),
        ("variables", vt_utils.get_vt_dataset),
        ("common_words", cwe_utils.get_cw_dataset),
        ("frequent_words", fwe_utils.fwe_download),
    ]
    prompts = []
    for task, make in made:
        (document,) = make(tokenizer=str(smollm2), max_seq_lengths=[1024])["test"]
        between = "\n\n" if task == "common_words" else " "
        prompts.append((task, f"{document['input']}{between}{document['gen_prefix']}"))
    return prompts


@pytest.mark.model
def test_wording_is_that_of_lm_evals_prompts(
    smollm2: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worded(prompt: str) -> tuple[str, str]:
        """The first and last line, without what differs by design: words, numbers, names."""
        first, last = prompt.split("\n")[0], prompt[prompt.rfind("\n") + 1 :]
        if "magic" not in first:  # the context may begin on the first line
            first = first[:60]
        # Some of RULER's words have spaces, hyphens or apostrophes.
        last = re.sub(r"(, and |, |for )(?!and )[^,]+?(?=,| mentioned)", r"\1#", last)
        return first, re.sub(r"\d{5,}", "#", last)

    source = Source(tokenizer, PROSE, seed=2)
    drawn: dict[str, set[tuple[str, str]]] = {}
    for task in TASKS:
        drawn[task] = {worded(split(tokenizer, draw(source, task, 1024))[0]) for _ in range(60)}
    for task, prompt in lm_evals_prompts(smollm2, monkeypatch):
        assert worded(prompt) in drawn[task], task


@pytest.mark.model
def test_words_are_not_those_of_the_evaluation(source: Source) -> None:
    from lm_eval.tasks.ruler import cwe_utils

    theirs = {word.lower() for word in cwe_utils.WORDS}
    ours = {source.word() for _ in range(20_000)}
    assert len(ours) > 10_000
    assert not ours & theirs


@pytest.mark.model
def test_draws_depend_on_their_seed_alone(tokenizer: Any) -> None:
    def drawn(seed: int) -> list[Example]:
        one = Source(tokenizer, PROSE, seed)
        return [draw(one, task, 700) for task in TASKS]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.model
@pytest.mark.parametrize(("task", "length"), [("chess", 1024), ("needles", 100)])
def test_draw_refuses(source: Source, task: str, length: int) -> None:
    with pytest.raises(ValueError, match=r"task must be one of|length must be at least 512"):
        draw(source, task, length)


# Training


@pytest.mark.model
def test_loss_is_the_probability_of_any_right_token(tiny_llama: Path) -> None:
    model = models.load(tiny_llama, dtype=torch.float64)
    examples = [
        Example([5, 6, 7, 8, 9], [synthetic.Target(1, (7,)), synthetic.Target(3, (9, 11))]),
        Example([5, 6, 7], [synthetic.Target(1, (7, 1, 2))]),
    ]
    batch = adapter.collate(examples, 6, 2)
    found = adapter.losses(model, batch)
    for row, example in enumerate(examples):
        with torch.no_grad():
            probabilities = model(torch.tensor([example.token_ids])).logits[0].softmax(-1)
        expected = [
            -math.log(sum(probabilities[t.position, token] for token in t.tokens))
            for t in example.targets
        ]
        assert found[row].item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.model
def test_training_learns_saves_and_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"longest": 512, "workers": 0, "device": "cpu"}
    record = adapter.train(tiny_llama, tmp_path / "one", PROSE, seconds=4, **options)
    assert record["steps"] >= 5
    assert record["tokens"] == 512 * record["steps"]
    assert (tmp_path / "one/adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    written = json.loads((tmp_path / "one/training.json").read_text())
    assert written["steps"] == record["steps"]
    assert written["versions"]["peft"]
    assert json.loads((tmp_path / "one/model_config.json").read_text()) == adapter.MODEL_CONFIG

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    source = Source(tokenizer, PROSE, seed=9)
    drawn = [draw(source, task, 512) for task in TASKS]
    batch = adapter.collate(drawn, 512, tokenizer.eos_token_id)

    def loss(directory: Path | None) -> float:
        model = models.load(
            tiny_llama, directory, dtype=torch.float32, model_config=adapter.MODEL_CONFIG
        )
        assert model.config.rope_parameters["rope_theta"] == 1e6
        assert model.config.max_position_embeddings == 33792
        with torch.inference_mode():
            return adapter.losses(model, batch).mean().item()

    untrained, trained = loss(None), loss(tmp_path / "one")
    assert trained < untrained
    adapter.train(
        tiny_llama, tmp_path / "two", PROSE, seconds=3, initial=tmp_path / "one", seed=1, **options
    )
    assert loss(tmp_path / "two") < trained


def test_prose_is_read_from_local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    for split in ("train", "test"):
        path = tmp_path / f"gsm8k/main/{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        questions = [f"One {split}.  Two\nlines? Three", "Four."]
        table = pyarrow.table({"question": questions, "answer": ["#### 1", "#### 2"]})
        pyarrow.parquet.write_table(table, path)
    monkeypatch.setenv("SANTA_HF_DATA", str(tmp_path))
    assert adapter._prose() == ["One train.", "Two lines?", "Three", "Four."]
    (tmp_path / "gsm8k/main/train.parquet").unlink()
    with pytest.raises(CommandError, match=r"train\.parquet is missing"):
        adapter._prose()


@pytest.mark.model
def test_the_repositorys_checkpoint_answers_through_a_run(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    suite = tmp_path / "suite.yaml"
    suite.write_text("tasks: [{task: ruler_vt, length: 1024, limit: 2}]\n")
    out = tmp_path / "out"
    command = ["--model", str(smollm2), "--suite", str(suite), "--out", str(out), "--quiet"]
    adapter_option = ["--adapter", str(adapter.DIRECTORY)]
    run.main("run", [*command, *adapter_option, "--device", "cpu", "--arms", "santa:samples=256"])
    header, found = results.load_results(out)
    assert header.model["model_config"] == adapter.MODEL_CONFIG
    # The base alone names one variable of five, or two.
    assert {result.arm.name: result.score.value for result in found} == {"dense": 1, "santa": 1}


def test_a_run_makes_the_changes_to_the_config_that_an_adapter_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[Any] = []
    monkeypatch.setattr(run, "run", lambda model, *_: changes.append(model["model_config"]))
    command = ["--model", "some", "--suite", "smoke", "--out", str(tmp_path / "out")]
    adapter_option = ["--adapter", str(tmp_path)]
    run.main("run", [*command, *adapter_option])
    (tmp_path / models.CONFIG_FILE).write_text('{"rope_scaling": 2}')
    run.main("run", command)
    run.main("run", [*command, *adapter_option])
    run.main("run", [*command, *adapter_option, "--model-config", "{}"])
    assert changes == [None, None, {"rope_scaling": 2}, {}]
    (tmp_path / models.CONFIG_FILE).write_text("{")
    with pytest.raises(CommandError, match=r"model_config\.json"):
        run.main("run", [*command, *adapter_option])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds must be positive"),
        (["--learning-rate", "-1"], "--learning-rate must be positive"),
        (["--longest", "100"], r"--longest must be in \[512, 32768\], got 100"),
        (["--initial", "nowhere"], "nowhere holds no adapter"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        adapter.main("adapter", arguments)
