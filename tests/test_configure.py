"""SantaConfig on a model: where it is stored, what it survives, and which source wins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

import santa_hf

PROMPT = tiny.prompts(60)[0]


def draws_per_head(model: PreTrainedModel, **kwargs: object) -> list[int]:
    """How many draws each layer makes in one decode step; 0 where it is dense."""
    cache = DynamicCache(config=model.config)
    santa_hf.reset_stats(model)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache, **kwargs)
        model(PROMPT[:, :1], past_key_values=cache, **kwargs)
    layers = santa_hf.stats(model).layers
    return [layers[i].samples // tiny.HEADS for i in range(tiny.LAYERS)]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny.build("llama")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved model whose configuration knows nothing of santa."""
    tiny.build("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(directory: Path, santa: object = None) -> PreTrainedModel:
    """Load with attention "santa", after writing a `santa` entry into config.json."""
    if santa is not None:
        config = json.loads((directory / "config.json").read_text())
        config["santa"] = santa
        (directory / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="santa")


def test_a_model_samples_by_the_defaults_unless_told(model: PreTrainedModel) -> None:
    assert draws_per_head(model) == [santa_hf.SantaConfig().samples] * tiny.LAYERS


@pytest.mark.parametrize("form", ["object", "mapping", "file", "path"])
def test_configure_takes_every_form(model: PreTrainedModel, form: str, tmp_path: Path) -> None:
    config = santa_hf.SantaConfig(samples=9, layers={1: {"samples": 3}, 2: {"estimator": "dense"}})
    config.to_yaml(tmp_path / "budget.yaml")
    forms = {
        "object": config,
        "mapping": config.to_dict(),
        "file": str(tmp_path / "budget.yaml"),
        "path": tmp_path / "budget.yaml",
    }
    assert santa_hf.configure(model, forms[form]) == config
    assert draws_per_head(model) == [9, 3, 0]


def test_configure_takes_effect_at_the_next_step(model: PreTrainedModel) -> None:
    for samples in (5, 7):
        santa_hf.configure(model, {"samples": samples})
        assert draws_per_head(model) == [samples] * 3
    model.config.santa["samples"] = 8  # the stored dict is the configuration, not a copy of it
    assert draws_per_head(model) == [8] * 3


def test_precedence_is_keyword_then_model_then_environment_then_default(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    santa_hf.SantaConfig(samples=4, layers={0: {"samples": 2}}).to_yaml(tmp_path / "env.yaml")
    monkeypatch.setenv("SANTA_HF_CONFIG", str(tmp_path / "env.yaml"))
    assert draws_per_head(model) == [2, 4, 4]
    santa_hf.configure(model, {"samples": 5, "layers": {2: {"samples": 6}}})
    assert draws_per_head(model) == [5, 5, 6]  # not merged with the environment
    assert draws_per_head(model, santa={"samples": 7}) == [7, 7, 6]  # merged with the model's
    assert draws_per_head(model, santa=santa_hf.SantaConfig(samples=8)) == [8, 8, 8]
    assert draws_per_head(model) == [5, 5, 6]  # the keyword was for those calls alone
    del model.config.santa
    assert draws_per_head(model) == [2, 4, 4]
    monkeypatch.delenv("SANTA_HF_CONFIG")
    assert draws_per_head(model) == [128] * 3


def test_it_survives_saving(model: PreTrainedModel, tmp_path: Path) -> None:
    config = santa_hf.SantaConfig(samples=9, seed=2**40, layers={1: {"samples": 3}})
    santa_hf.configure(model, config)
    draws = draws_per_head(model)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["santa"]
    assert stored["layers"] == {"1": {"samples": 3}}  # JSON has string keys only
    loaded = load(tmp_path)
    assert santa_hf.SantaConfig.from_dict(loaded.config.santa) == config
    assert draws_per_head(loaded) == draws == [9, 3, 9]
    loaded.save_pretrained(tmp_path / "again")
    assert draws_per_head(load(tmp_path / "again")) == [9, 3, 9]


def test_an_entry_in_config_json_needs_no_code(saved: Path) -> None:
    model = load(saved, {"samples": 6, "layers": {"0": {"estimator": "dense"}}})
    assert draws_per_head(model) == [0, 6, 6]


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("systematic", TypeError, "must be a mapping, got 'systematic'"),
        ([1], TypeError, "must be a mapping"),
        ({"sample": 3}, ValueError, "no field 'sample'"),
        ({"samples": "3"}, TypeError, "samples must be an integer"),
        ({"samples": 0}, ValueError, "samples must be in"),
        ({"estimator": "exact"}, ValueError, "estimator must be one of"),
        ({"layers": {"first": {}}}, TypeError, "keyed by layer indices"),
        ({"layers": {"3": {"samples": 1}}}, ValueError, "the model has layers 0 to 2"),
        ({"layers": {"0": {"strict": True}}}, ValueError, r"layers\[0\] has no field 'strict'"),
    ],
)
def test_a_malformed_entry_in_config_json_is_named(
    saved: Path, entry: object, error: type[Exception], message: str
) -> None:
    model = load(saved, entry)
    with pytest.raises(error, match=f"the model's config.santa: .*{message}"):
        draws_per_head(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("samples: [", "not a plain YAML file"),
        ("!!python/object/apply:os.getcwd []", "not a plain YAML file"),
        ("samples: -1", "samples must be in"),
        ("layers: {7: {samples: 1}}", "the model has layers 0 to 2"),
    ],
)
def test_a_bad_file_in_the_environment_is_named(
    model: PreTrainedModel,
    text: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if text is not None:
        (tmp_path / "env.yaml").write_text(text)
    monkeypatch.setenv("SANTA_HF_CONFIG", str(tmp_path / "env.yaml"))
    with pytest.raises(ValueError, match=f"SANTA_HF_CONFIG: .*{message}"):
        draws_per_head(model)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"layers": {3: {"samples": 1}}}, ValueError, "layers names layer 3"),
        ({"samples": True}, TypeError, "samples must be an integer"),
        ({"budget": 3}, ValueError, "no field 'budget'"),
        ("missing.yaml", FileNotFoundError, "missing.yaml"),
        (3, TypeError, "must be a mapping"),
    ],
)
def test_configure_and_the_keyword_refuse_bad_input(
    model: PreTrainedModel, config: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        santa_hf.configure(model, config)
    assert not hasattr(model.config, "santa")
    if isinstance(config, dict):
        with pytest.raises(error, match=message):
            draws_per_head(model, santa=config)


def test_configure_refuses_a_model_that_does_not_use_santa(model: PreTrainedModel) -> None:
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"attention is 'sdpa'.*attn_implementation=\"santa\""):
        santa_hf.configure(model, {"samples": 3})
    assert not hasattr(model.config, "santa")


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def llava() -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, projection_dim=16),
        text_config=LlamaConfig(**tiny.COMMON),
        image_token_index=5,
    )


def gemma3() -> Gemma3Config:
    text = {**tiny.COMMON, **tiny.FAMILIES["gemma3"][1]}
    return Gemma3Config(
        vision_config=SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=Gemma3TextConfig(**text),
        mm_tokens_per_image=16,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )


@pytest.mark.parametrize("composite", [llava, gemma3])
def test_a_model_with_a_vision_tower(
    composite: Callable[[], PreTrainedConfig], tmp_path: Path
) -> None:
    """The plain string reaches the tower, which stays exact; the configuration is the text model's."""
    model = AutoModelForImageTextToText.from_config(composite(), attn_implementation="santa")
    model.double().eval().generation_config.eos_token_id = None
    text = tiny.prompts(100)[0].clamp(min=8)
    image = torch.full((1, 16), 5)
    inputs = {
        "input_ids": torch.cat([image, text], 1),
        "pixel_values": torch.randn(1, 3, 16, 16, dtype=torch.float64),
    }
    if composite is gemma3:
        inputs["token_type_ids"] = (inputs["input_ids"] == 5).long()

    def generate(model: PreTrainedModel) -> torch.Tensor:
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1)

    assert model.config.vision_config._attn_implementation == "santa"
    santa_hf.configure(model, {"samples": 16, "strict": True, "layers": {1: {"samples": 20}}})
    assert not hasattr(model.config, "santa")
    assert model.config.text_config.santa["samples"] == 16
    sampled = generate(model)
    counters = santa_hf.stats(model).total
    assert counters.samples == 3 * (16 + 20 + 16) * tiny.HEADS
    assert counters.multi_token == tiny.LAYERS + 2  # the tower runs once
    assert not counters.fallbacks

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="santa")
    loaded.generation_config.eos_token_id = None
    torch.testing.assert_close(generate(loaded), sampled)

    santa_hf.configure(model, {"estimator": "dense"})
    dense = generate(model)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(dense, generate(model))
    assert (dense - sampled)[:, 1:].abs().max() > 1e-2
