"""Layers on several devices, with weights that are elsewhere until their layer runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import santa_hf

pytest.importorskip("accelerate")

NEW_TOKENS = 20
PADDED = tiny.left_padded(tiny.prompts(150, 90))
SANTA = {"samples": 8, "strict": True}


def tokens(model: PreTrainedModel) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    santa_hf.configure(model, SANTA)
    inputs = {name: tensor.to(model.device) for name, tensor in PADDED.items()}
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    calls = tiny.LAYERS * (NEW_TOKENS - 1)
    assert santa_hf.stats(model).total.sampled == calls
    return out.cpu()


def placed(last: str | int, elsewhere: str | int) -> dict[str, str | int]:
    """The middle layer elsewhere, the rest on one device."""
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    layers = [f"model.layers.{i}" for i in range(tiny.LAYERS)]
    return {**dict.fromkeys([*names, *layers], last), layers[1]: elsewhere}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_weights_on_disk_are_left_there(family: str, tmp_path: Path) -> None:
    model = tiny.build(family, torch.float64)
    expected = tokens(model)
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        attn_implementation="santa",
        dtype=torch.float64,
        device_map=placed("cpu", "disk"),
        offload_folder=tmp_path / "disk",
    )
    weight = offloaded.model.layers[1].self_attn.o_proj.weight
    assert weight.is_meta
    assert torch.equal(tokens(offloaded), expected)
    assert offloaded.model.layers[1].self_attn.o_proj.weight.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("elsewhere", ["cpu", 1])
def test_a_layer_elsewhere_of_a_model_on_a_gpu(elsewhere: str | int, tmp_path: Path) -> None:
    """On a second GPU, or with weights that come to the GPU for their layer: the same draws."""
    if elsewhere == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = tiny.build("llama")
    model.save_pretrained(tmp_path)
    expected = tokens(model.cuda())
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="santa", device_map=placed(0, elsewhere)
    )
    assert torch.equal(tokens(other), expected)
