"""Draws are a pure function of (seed, layer, head, position, sample), whoever else is in the batch.

The uniforms are compared bit by bit in every layout. Tokens are compared in float64: one draw that falls
on the other side of a rounding error would change every later layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    Qwen2VLConfig,
    StaticCache,
)

import santa_hf
from santa_hf import reference
from santa_hf.rng import Stream

ESTIMATORS = ("systematic", "stratified", "multinomial")
# The second crosses a tile while it grows, the third outgrows the sliding window.
ROWS = tiny.prompts(150, 117, 25)
PADDED = tiny.left_padded(ROWS)


@dataclass
class Step:
    """One decode call of one layer: the position and the uniforms of every row, and how many visible
    keys before the newest one each draw fell, (B, KVH, G, S)."""

    layer: int
    position: torch.Tensor
    uniforms: dict[Stream, torch.Tensor]
    age: torch.Tensor


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Step]]:
    """Returns the steps since it was last called."""
    steps: list[Step] = []
    uniform, draw = reference.uniform, reference.draw

    def recorded_draw(query: torch.Tensor, key: torch.Tensor, **kwargs: object) -> reference.Draws:
        uniforms = {}

        def recorded_uniform(*args: object) -> torch.Tensor:
            uniforms[args[-1]] = uniform(*args)
            return uniforms[args[-1]]

        with monkeypatch.context() as patch:
            patch.setattr(reference, "uniform", recorded_uniform)
            draws = draw(query, key, **kwargs)
        mask = kwargs["mask"]
        visible = torch.ones(key.shape[0], key.shape[2], dtype=torch.int64)
        if mask is not None:
            visible = mask[:, 0, 0].long().expand_as(visible)
        newer = (
            visible.flip(-1).cumsum(-1).flip(-1)[:, None, None].expand(*draws.index.shape[:3], -1)
        )
        steps.append(
            Step(kwargs["layer"], kwargs["position"], uniforms, newer.gather(-1, draws.index) - 1)
        )
        return draws

    monkeypatch.setattr(reference, "draw", recorded_draw)

    def taken() -> list[Step]:
        out = steps.copy()
        steps.clear()
        return out

    return taken


def generate(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], new_tokens: int, **kwargs: object
) -> torch.Tensor:
    """New tokens of each row, (B, new_tokens)."""
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **kwargs)
    return out[:, inputs["input_ids"].shape[1] :]


def layouts(model: PreTrainedModel) -> dict[str, tuple[list[int], dict[str, object]]]:
    """The ways to run the same sequences: the rows of ROWS that take part, and how."""
    static = partial(StaticCache, config=model.config)
    return {
        **{f"row {r} alone": ([r], {}) for r in range(len(ROWS))},
        "row 2 alone, static": ([2], {"past_key_values": static(max_cache_len=256)}),
        "padded": ([0, 1, 2], {}),
        "padded, other order": ([2, 0], {}),
        "padded, full cache": ([0, 1, 2], {"past_key_values": DynamicCache()}),
        "padded, static": ([0, 1, 2], {"past_key_values": static(max_cache_len=300)}),
    }


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_uniforms_are_bitwise_equal(
    family: str, estimator: str, record: Callable[[], list[Step]]
) -> None:
    """In float32: the uniforms may depend on no score, so rounding cannot touch them."""
    model = tiny.use(tiny.shared(family), "santa", samples=16, estimator=estimator, seed=7)
    steps = 4
    reference_rows: dict[int, list[Step]] = {}
    for name, (rows, kwargs) in layouts(model).items():
        inputs = tiny.left_padded([ROWS[r] for r in rows])
        generate(model, inputs, steps + 1, **kwargs)
        calls = record()
        assert [call.layer for call in calls] == list(range(tiny.LAYERS)) * steps, name
        for i, r in enumerate(rows):
            expected = reference_rows.setdefault(r, calls if len(rows) == 1 else [])
            for n, (call, other) in enumerate(zip(calls, expected, strict=True)):
                # 0-based position of the query token, without the padding.
                assert int(call.position[i]) == ROWS[r].shape[1] + n // tiny.LAYERS, name
                for stream, uniforms in call.uniforms.items():
                    # The offsets of the tiles are looked up by the tile that a draw fell into.
                    if stream is not Stream.TILE:
                        assert torch.equal(uniforms[i], other.uniforms[stream][0]), name
                assert call.uniforms.keys() == other.uniforms.keys()


@pytest.mark.parametrize(
    ("family", "santa"),
    [
        # Gemma 2's own prefill rounds to float32, and gpt_oss's experts have no float64.
        *[(family, {}) for family in tiny.FAMILIES if family not in tiny.WITHOUT_SDPA],
        ("llama", {"estimator": "stratified"}),
        ("llama", {"estimator": "multinomial"}),
        ("llama", {"min_context": 130}),  # row 1 crosses it
        ("mistral", {"min_context": 30}),  # row 2 crosses it
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_draws_and_tokens_are_equal_in_float64(
    family: str, santa: dict[str, object], record: Callable[[], list[Step]]
) -> None:
    """Over 40 tokens, in which row 1 crosses a tile and row 2 outgrows the sliding window."""
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=16, **santa)
    tokens: dict[int, torch.Tensor] = {}
    draws: dict[tuple[int, int, int], torch.Tensor] = {}
    for name, (rows, kwargs) in layouts(model).items():
        tokens_here = generate(model, tiny.left_padded([ROWS[r] for r in rows]), 40, **kwargs)
        calls = record()
        for i, r in enumerate(rows):
            assert torch.equal(tokens_here[i], tokens.setdefault(r, tokens_here[i])), (name, r)
            for call in calls:
                where = (r, call.layer, int(call.position[i]))
                # Rows below min_context are drawn along with the others in a batch, and not used.
                if not santa.get("min_context"):
                    assert len(rows) == 1 or where in draws, (name, where)
                assert torch.equal(call.age[i], draws.setdefault(where, call.age[i])), (name, where)
    assert all(len(set(row.tolist())) > 5 for row in tokens.values())

    tiny.use(model, "santa", samples=16, seed=1, **santa)
    other = generate(model, PADDED, 40)
    assert any(not torch.equal(other[r], tokens[r]) for r in range(len(ROWS)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_another_seed_draws_other_keys(estimator: str, record: Callable[[], list[Step]]) -> None:
    """In every head: scores of the first layer in the first step are equal."""
    first = []
    for seed in (0, 1, 2**40):
        model = tiny.use(tiny.shared("llama"), "santa", samples=16, estimator=estimator, seed=seed)
        generate(model, PADDED, 2)
        first.append(record()[0])
    for one, other in combinations(first, 2):
        assert (one.age != other.age).any(-1).any(0).all()  # some rows of a head are peaked
        for stream, uniforms in one.uniforms.items():
            assert (uniforms != other.uniforms[stream]).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_no_uniform_is_used_twice(
    family: str, estimator: str, cache: str, record: Callable[[], list[Step]]
) -> None:
    """Not in two layers, two heads or two steps, also where a sliding window is full and the number of
    visible keys stands still."""
    model = tiny.use(tiny.shared(family), "santa", samples=16, estimator=estimator)
    generate(model, {"input_ids": ROWS[0]}, 7, cache_implementation=cache)
    calls = record()
    assert len(calls) == tiny.LAYERS * 6
    for stream in calls[0].uniforms:
        if stream is Stream.TILE:  # one offset per tile, which several draws of a call share
            sets = [
                set(head.tolist()) for call in calls for head in call.uniforms[stream].flatten(0, 2)
            ]
            assert len(set.union(*sets)) == sum(map(len, sets))
        else:
            used = torch.cat([call.uniforms[stream].flatten() for call in calls])
            assert len(used.unique()) == len(used)


def test_positions_of_several_axes() -> None:
    """Qwen2-VL rotates by three positions per token; draws go by the text position among them."""
    text = {**tiny.COMMON, "hidden_size": 64}
    text.pop("head_dim")
    config = Qwen2VLConfig(
        text_config={
            **text,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 1e4,
            },
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        image_token_id=4,
        video_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="santa")
    model.double().eval().generation_config.eos_token_id = None
    santa_hf.configure(model, {"samples": 16, "strict": True})
    rows = [row.clamp(min=8) for row in ROWS]
    padded = generate(model, tiny.left_padded(rows), 20, pad_token_id=0)
    for row, tokens in zip(rows, padded, strict=True):
        assert torch.equal(generate(model, {"input_ids": row}, 20)[0], tokens)
    santa_hf.configure(model, {"samples": 16, "seed": 1})
    assert not torch.equal(generate(model, tiny.left_padded(rows), 20, pad_token_id=0), padded)


@pytest.mark.model
def test_smollm2_tokens_are_equal_in_float64(
    smollm2: Path, record: Callable[[], list[Step]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float64, attn_implementation="santa"
    )
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    shelves = [
        f"Box {i} stands on shelf {i * 7 % 31}, beside box {i * 5 % 29}. " for i in range(20)
    ]
    rows = [
        tokenizer("".join(shelves), return_tensors="pt")["input_ids"],
        tokenizer("".join(shelves[3:12]), return_tensors="pt")["input_ids"],
    ]
    assert rows[0].shape[1] > 300
    assert rows[1].shape[1] > 100
    padded = tiny.left_padded(rows)
    santa_hf.configure(model, {"samples": 16, "strict": True})
    alone = [generate(model, {"input_ids": row}, 32)[0] for row in rows]
    static = StaticCache(config=model.config, max_cache_len=rows[0].shape[1] + 40)
    for cache in (None, static):
        tokens = generate(model, padded, 32, past_key_values=cache)
        assert torch.equal(tokens[0], alone[0])
        assert torch.equal(tokens[1], alone[1])
    assert len(record()) == 4 * 31 * model.config.num_hidden_layers
