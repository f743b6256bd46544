"""SantaConfig: what is refused and how it says so, and round trips that lose nothing."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from santa_hf.config import (
    ESTIMATORS,
    KERNELS,
    LayerConfig,
    SantaConfig,
    environment_config,
)

CONFIGS = Path(__file__).parents[1] / "configs"
ESTIMATORS_ALLOWED = "systematic, stratified, multinomial, dense"
KERNELS_ALLOWED = "auto, reference, prop, flash"

OVERRIDES = {
    "estimator": st.sampled_from(ESTIMATORS),
    "samples": st.integers(1, 2**24),
    "kernel": st.sampled_from(KERNELS),
    "min_context": st.integers(0, 2**62),
}
FIELDS = {
    **OVERRIDES,
    "seed": st.integers(0, 2**63 - 1),
    "strict": st.booleans(),
    "layers": st.dictionaries(
        st.integers(0, 500), st.fixed_dictionaries({}, optional=OVERRIDES), max_size=5
    ),
}
configs = st.builds(SantaConfig, **FIELDS)
fixed = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def test_defaults() -> None:
    config = SantaConfig()
    assert config.to_dict() == {
        "estimator": "systematic",
        "samples": 128,
        "kernel": "auto",
        "min_context": 0,
        "seed": 0,
        "strict": False,
        "layers": {},
    }
    assert config.for_layer(7) == LayerConfig("systematic", 128, "auto", 0, 0, False)


# Value, what the message must hold, for a field of the configuration.
REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("samples", 0, ValueError, "samples must be in [1, 16777216], got 0"),
    ("samples", -3, ValueError, "samples must be in [1, 16777216], got -3"),
    ("samples", 2**24 + 1, ValueError, "samples must be in [1, 16777216], got 16777217"),
    ("samples", 2.0, TypeError, "samples must be an integer in [1, 16777216], got 2.0"),
    ("samples", "128", TypeError, "samples must be an integer in [1, 16777216], got '128'"),
    ("samples", True, TypeError, "samples must be an integer in [1, 16777216], got True"),
    ("samples", None, TypeError, "samples must be an integer in [1, 16777216], got None"),
    ("samples", np.int64(8), TypeError, "samples must be an integer in [1, 16777216], got "),
    ("samples", torch.tensor(8), TypeError, "samples must be an integer in [1, 16777216], got "),
    ("samples", [8], TypeError, "samples must be an integer in [1, 16777216], got [8]"),
    ("min_context", -1, ValueError, "min_context must be in [0, "),
    ("min_context", False, TypeError, "min_context must be an integer in [0, "),
    ("estimator", "sys", ValueError, f"estimator must be one of {ESTIMATORS_ALLOWED}, got 'sys'"),
    ("estimator", "Dense", ValueError, f"estimator must be one of {ESTIMATORS_ALLOWED}, got"),
    ("estimator", ["dense"], ValueError, f"of {ESTIMATORS_ALLOWED}, got ['dense']"),
    ("estimator", {"a": 1}, ValueError, f"of {ESTIMATORS_ALLOWED}, got {{'a': 1}}"),
    ("estimator", np.array(["dense", "a"]), ValueError, f"of {ESTIMATORS_ALLOWED}, got array"),
    ("estimator", None, ValueError, f"estimator must be one of {ESTIMATORS_ALLOWED}, got None"),
    ("kernel", "triton", ValueError, f"kernel must be one of {KERNELS_ALLOWED}, got 'triton'"),
    ("kernel", 3, ValueError, f"kernel must be one of {KERNELS_ALLOWED}, got 3"),
]
REFUSED_AT_THE_TOP: list[tuple[str, Any, type[Exception], str]] = [
    ("seed", -1, ValueError, "seed must be in [0, 9223372036854775807], got -1"),
    (
        "seed",
        2**63,
        ValueError,
        "seed must be in [0, 9223372036854775807], got 9223372036854775808",
    ),
    ("seed", 1.5, TypeError, "seed must be an integer in [0, 9223372036854775807], got 1.5"),
    ("strict", 1, TypeError, "strict must be True or False, got 1"),
    ("strict", "yes", TypeError, "strict must be True or False, got 'yes'"),
    ("layers", None, TypeError, "layers must map a layer index to overrides, got None"),
    ("layers", [1], TypeError, "layers must map a layer index to overrides, got [1]"),
    ("layers", {-1: {}}, ValueError, "layers must be keyed by layer indices (0, 1, ...), got -1"),
    (
        "layers",
        {"-1": {}},
        TypeError,
        "layers must be keyed by layer indices (0, 1, ...), got '-1'",
    ),
    ("layers", {"first": {}}, TypeError, "keyed by layer indices (0, 1, ...), got 'first'"),
    ("layers", {"\u0663": {}}, TypeError, "keyed by layer indices (0, 1, ...), got"),
    ("layers", {1.0: {}}, TypeError, "keyed by layer indices (0, 1, ...), got 1.0"),
    ("layers", {True: {}}, TypeError, "keyed by layer indices (0, 1, ...), got True"),
    ("layers", {None: {}}, TypeError, "keyed by layer indices (0, 1, ...), got None"),
    ("layers", {"1": {}, 1: {}}, ValueError, "layers names layer 1 twice"),
    ("layers", {1: "dense"}, TypeError, "layers[1] must be a mapping, got 'dense'"),
    ("layers", {1: None}, TypeError, "layers[1] must be a mapping, got None"),
    (
        "layers",
        {3: {"sample": 1}},
        ValueError,
        "layers[3] has no field 'sample'; it has estimator,",
    ),
    ("layers", {3: {"seed": 1}}, ValueError, "layers[3] has no field 'seed'; it has estimator,"),
    ("layers", {3: {"layers": {}}}, ValueError, "layers[3] has no field 'layers'; it has"),
    ("layers", {3: {1: 2}}, ValueError, "layers[3] has no field 1; it has estimator, samples,"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), REFUSED + REFUSED_AT_THE_TOP)
def test_refused_values_name_field_value_and_what_is_allowed(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    for build in (
        lambda: SantaConfig(**{name: value}),
        lambda: SantaConfig.from_dict({name: value}),
        lambda: SantaConfig().merged({name: value}),
    ):
        with pytest.raises(error) as caught:
            build()
        assert message in str(caught.value)


@pytest.mark.parametrize(("name", "value", "error", "message"), REFUSED)
def test_overrides_are_checked_as_fields_are(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        SantaConfig(layers={4: {name: value}})
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"layers[4].{name} must be ")


def test_unknown_fields_are_refused() -> None:
    message = (
        "SantaConfig has no field 'sample'; "
        "it has estimator, samples, kernel, min_context, seed, strict, layers"
    )
    for build in (
        lambda: SantaConfig.from_dict({"sample": 3}),
        lambda: SantaConfig().merged({"samples": 3, "sample": 3}),
    ):
        with pytest.raises(ValueError, match="has no field") as caught:
            build()
        assert str(caught.value) == message
    with pytest.raises(TypeError):
        SantaConfig(sample=3)  # type: ignore[call-arg]
    for values in (None, [], "dense", 3):
        with pytest.raises(TypeError, match="a santa configuration must be a mapping, got"):
            SantaConfig.from_dict(values)


def test_immutable() -> None:
    overrides = {2: {"samples": 4}}
    config = SantaConfig(layers=overrides)
    with pytest.raises(FrozenInstanceError):
        config.samples = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.layers[3] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        config.layers[2]["samples"] = 5  # type: ignore[index]
    # Nor through what it was built from, or what it hands out.
    overrides[2]["samples"] = 0
    overrides[9] = {}
    config.to_dict()["layers"][2]["samples"] = 0
    assert config == SantaConfig(layers={2: {"samples": 4}})
    with pytest.raises(FrozenInstanceError):
        config.for_layer(2).samples = 3  # type: ignore[misc]


def test_for_layer_applies_overrides_only_there() -> None:
    config = SantaConfig(
        samples=64, seed=9, strict=True, layers={0: {"estimator": "dense"}, "5": {"samples": 512}}
    )
    assert config.for_layer(0) == LayerConfig("dense", 64, "auto", 0, 9, True)
    assert config.for_layer(1) == LayerConfig("systematic", 64, "auto", 0, 9, True)
    assert config.for_layer(5) == LayerConfig("systematic", 512, "auto", 0, 9, True)
    assert list(config.layers) == [0, 5]


def test_merged_replaces_whole_fields() -> None:
    config = SantaConfig(samples=64, layers={1: {"samples": 2}})
    assert config.merged({}) == config
    assert config.merged({"samples": 3}) == SantaConfig(samples=3, layers={1: {"samples": 2}})
    assert config.merged({"layers": {"2": {}}}) == SantaConfig(samples=64, layers={2: {}})
    assert config == SantaConfig(samples=64, layers={1: {"samples": 2}})


def test_check_layers() -> None:
    config = SantaConfig(layers={0: {}, 31: {"samples": 3}})
    config.check_layers(32)
    message = "layers names layer 31, but the model has layers 0 to 30"
    with pytest.raises(ValueError, match=message):
        config.check_layers(31)


@fixed
@given(configs)
def test_round_trips(config: SantaConfig) -> None:
    as_dict = config.to_dict()
    assert type(as_dict) is type(as_dict["layers"]) is dict
    assert all(type(overrides) is dict for overrides in as_dict["layers"].values())
    for other in (
        SantaConfig.from_dict(as_dict),
        SantaConfig.from_dict(json.loads(json.dumps(as_dict))),  # string layer keys
        SantaConfig.from_dict(yaml.safe_load(yaml.safe_dump(as_dict))),
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
        config.merged({}),
        config.merged(as_dict),
    ):
        assert other == config
        assert hash(other) == hash(config)
        assert other.to_dict() == as_dict
        assert [other.for_layer(i) for i in range(501)] == [config.for_layer(i) for i in range(501)]


@settings(fixed, max_examples=15)
@given(configs)
def test_yaml_files_round_trip(
    tmp_path_factory: pytest.TempPathFactory, config: SantaConfig
) -> None:
    path = tmp_path_factory.mktemp("yaml") / "budget.yaml"
    config.to_yaml(path)
    assert SantaConfig.from_yaml(path) == config
    assert SantaConfig.from_yaml(str(path)) == config


@fixed
@given(st.sampled_from(sorted(FIELDS)), st.from_type(object) | st.text() | st.integers())
def test_any_value_is_taken_as_it_is_or_refused_by_name(name: str, value: object) -> None:
    message = ""
    try:
        assert SantaConfig(**{name: value}).to_dict()[name] == value
    except (TypeError, ValueError) as error:
        message = str(error)
    assert not message or name in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("samples: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("!!python/object:santa_hf.SantaConfig {}", "could not determine a constructor"),
        ("samples: [1, 2", "expected ',' or ']'"),
        ("samples: 3\n  kernel: auto", "mapping values are not allowed"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("samples: 2024-13-45", "month must be in 1..12"),
        ("samples: 3\nsamples: 4", "'samples' appears twice, at line 2"),
        ("layers:\n  5: {samples: 1}\n  5: {samples: 2}", "'5' appears twice, at line 3"),
        ("layers:\n  5: {samples: 1}\n  '5': {samples: 2}", "'5' appears twice, at line 3"),
        ("layers: {5: {samples: 1, samples: 2}}", "'samples' appears twice, at line 1"),
        ("- samples", "must be a mapping, got ['samples']"),
        ("dense", "must be a mapping, got 'dense'"),
        ("sample: 3", "has no field 'sample'"),
        ("samples: 1.5", "samples must be an integer in [1, 16777216], got 1.5"),
        ("layers:", "layers must map a layer index to overrides, got None"),
        ("layers: {yes: {}}", "keyed by layer indices (0, 1, ...), got True"),
        ("? [1, 2]\n: 3", "unhashable key"),
        ("layers: &a\n  0: *a", "layers[0] has no field 0"),
    ],
)
def test_bad_yaml_names_the_file_and_the_reason(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml") as caught:
        SantaConfig.from_yaml(path)
    assert message in str(caught.value)


def test_yaml_files_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01samples")
    with pytest.raises(ValueError, match=r"bytes\.yaml is not a plain YAML file"):
        SantaConfig.from_yaml(path)
    with pytest.raises(FileNotFoundError):
        SantaConfig.from_yaml(tmp_path / "none.yaml")


def test_empty_yaml_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    for text in ("", "# nothing but a comment: \u00e9\n", "{}"):
        path.write_text(text, encoding="utf-8")
        assert SantaConfig.from_yaml(path) == SantaConfig()


def test_a_bad_file_of_the_environment_names_the_variable_and_the_file(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    SantaConfig(samples=7).to_yaml(good)
    bad.write_text("samples: 0")
    assert environment_config(str(good)) == SantaConfig(samples=7)
    with pytest.raises(ValueError, match=r"SANTA_HF_CONFIG: .*bad\.yaml: samples must be in"):
        environment_config(str(bad))
    with pytest.raises(ValueError, match=r"SANTA_HF_CONFIG: .*none\.yaml"):
        environment_config(str(tmp_path / "none.yaml"))


# Budgets of models are the YAML files directly in configs/; its subfolders hold other schemas.
BUDGETS = sorted(path.name for path in CONFIGS.glob("*.y*ml"))
NUM_LAYERS = {"llama-3.1-8b": 32, "deepseek-r1-distill-qwen-7b": 28, "smollm2-135m": 30}


@pytest.mark.parametrize("name", BUDGETS)
def test_every_ready_budget_loads(name: str) -> None:
    config = SantaConfig.from_yaml(CONFIGS / name)
    assert SantaConfig.from_dict(config.to_dict()) == config
    if Path(name).stem in NUM_LAYERS:
        config.check_layers(NUM_LAYERS[Path(name).stem])


def test_ready_budgets_exist_and_the_example_shows_every_field() -> None:
    assert {f"{stem}.yaml" for stem in (*NUM_LAYERS, "example")} <= set(BUDGETS)
    example = yaml.safe_load((CONFIGS / "example.yaml").read_text(encoding="utf-8"))
    assert set(example) == set(SantaConfig().to_dict())
    assert SantaConfig.from_dict({**example, "layers": {}}) == SantaConfig()
