"""SantaConfig: what to draw, how many, and where; per-layer overrides; dict and YAML round trips."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = [
    "CONFIG_VARIABLE",
    "ESTIMATORS",
    "KERNELS",
    "LayerConfig",
    "SantaConfig",
    "environment_config",
]

ESTIMATORS = ("systematic", "stratified", "multinomial", "dense")
KERNELS = ("auto", "reference", "prop", "flash")
CONFIG_VARIABLE = "SANTA_HF_CONFIG"

_INTEGER_RANGES = {
    "samples": (1, 2**24),
    "min_context": (0, 2**62),
    "seed": (0, 2**63 - 1),
}
_CHOICES = {"estimator": ESTIMATORS, "kernel": KERNELS}


@dataclass(frozen=True)
class LayerConfig:
    """The settings of one attention layer, with the overrides of `SantaConfig.layers` applied.

    Attributes:
        estimator: "systematic", "stratified", "multinomial" or "dense".
        samples: draws per query head and step, at least 1.
        kernel: "auto", "reference", "prop" or "flash".
        min_context: a step whose row sees fewer keys than this is dense.
        seed: key of the counter RNG.
        strict: raise where a decode call cannot be sampled, instead of going dense.
    """

    estimator: str
    samples: int
    kernel: str
    min_context: int
    seed: int
    strict: bool


@dataclass(frozen=True)
class SantaConfig:
    """Sampling configuration of a model; immutable and validated when it is built.

    Attributes:
        estimator: how the draws are spread over the softmax (paper sections on SANTA and S2ANTA):
            "systematic" (lowest measured variance), "stratified", "multinomial", or "dense" for
            exact attention.
        samples: draws S per query head and step, at least 1.
        kernel: "auto" picks the fastest that can run; "reference", "prop" and "flash" are explicit
            choices that raise where they cannot run.
        min_context: a step whose row sees fewer keys than this is dense.
        seed: key of the counter RNG, in [0, 2**63).
        strict: raise where a decode call cannot be sampled, instead of going dense with a warning.
        layers: overrides of estimator, samples, kernel and min_context by layer index.

    Raises:
        TypeError, ValueError: a field has the wrong type or a value that is not allowed; the
            message names the field, the value and what is allowed.
    """

    estimator: str = "systematic"
    samples: int = 128
    kernel: str = "auto"
    min_context: int = 0
    seed: int = 0
    strict: bool = False
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name != "layers":
                _check(f.name, getattr(self, f.name))
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers must map a layer index to overrides, got {self.layers!r}")
        layers = {}
        for key, overrides in self.layers.items():
            index = _layer_index(key)
            if index in layers:
                raise ValueError(f"layers names layer {index} twice")
            if not isinstance(overrides, Mapping):
                raise TypeError(f"layers[{index}] must be a mapping, got {overrides!r}")
            _refuse_unknown(overrides, _OVERRIDABLE, f"layers[{index}]")
            for name, value in overrides.items():
                _check(name, value, f"layers[{index}].{name}")
            layers[index] = MappingProxyType(dict(overrides))
        object.__setattr__(self, "layers", MappingProxyType({i: layers[i] for i in sorted(layers)}))

    def __reduce__(self) -> tuple[Any, ...]:
        return SantaConfig.from_dict, (self.to_dict(),)

    def for_layer(self, layer: int) -> LayerConfig:
        """The settings of layer `layer`, overrides applied."""
        values = {name: getattr(self, name) for name in _LAYER_FIELDS}
        return LayerConfig(**{**values, **self.layers.get(layer, {})})

    def merged(self, changes: Mapping[str, Any]) -> SantaConfig:
        """A copy with the fields in `changes` replaced; unknown names are refused."""
        _refuse_unknown(changes, _FIELDS, "SantaConfig")
        return replace(self, **changes)

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError if an override names a layer that a model of `num_layers` lacks."""
        unknown = [index for index in self.layers if index >= num_layers]
        if unknown:
            raise ValueError(
                f"layers names layer {unknown[0]}, but the model has layers 0 to {num_layers - 1}"
            )

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON and YAML can hold; `from_dict` restores it."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["layers"] = {index: dict(overrides) for index, overrides in self.layers.items()}
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SantaConfig:
        """Build from a mapping; unknown names are refused, string layer keys (JSON) are accepted."""
        if not isinstance(values, Mapping):
            raise TypeError(f"a santa configuration must be a mapping, got {values!r}")
        _refuse_unknown(values, _FIELDS, "SantaConfig")
        return cls(**values)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration to a YAML file."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> SantaConfig:
        """Read a YAML file with the safe loader.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not YAML, or it holds tags, a key twice, unknown names or values that are
                not allowed.
        """
        import yaml

        try:
            values = _load_yaml(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is not a plain YAML file: {error}") from error
        try:
            return cls.from_dict({} if values is None else values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


_FIELDS = tuple(f.name for f in fields(SantaConfig))
_LAYER_FIELDS = tuple(f.name for f in fields(LayerConfig))
_OVERRIDABLE = ("estimator", "samples", "kernel", "min_context")


@lru_cache(maxsize=8)
def environment_config(path: str) -> SantaConfig:
    """The configuration in the YAML file that SANTA_HF_CONFIG names; read once per path."""
    try:
        return SantaConfig.from_yaml(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{CONFIG_VARIABLE}: {error}") from error


def _check(name: str, value: Any, label: str | None = None) -> None:
    label = label or name
    if name in _CHOICES:
        if not isinstance(value, str) or value not in _CHOICES[name]:
            raise ValueError(f"{label} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
    elif name in _INTEGER_RANGES:
        low, high = _INTEGER_RANGES[name]
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{label} must be an integer in [{low}, {high}], got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{label} must be in [{low}, {high}], got {value}")
    elif not isinstance(value, bool):
        raise TypeError(f"{label} must be True or False, got {value!r}")


def _layer_index(key: Any) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit():
        key = int(key)
    if not isinstance(key, int) or isinstance(key, bool):
        raise TypeError(f"layers must be keyed by layer indices (0, 1, ...), got {key!r}")
    if key < 0:
        raise ValueError(f"layers must be keyed by layer indices (0, 1, ...), got {key}")
    return key


def _load_yaml(text: str) -> Any:
    """Load YAML without tags, refusing a key given twice, of which `yaml.safe_load` keeps the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise ValueError(f"{key.value!r} appears twice, at line {line}")
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader=Loader)


def _refuse_unknown(values: Mapping[str, Any], allowed: tuple[str, ...], label: str) -> None:
    unknown = [name for name in values if name not in allowed]
    if unknown:
        raise ValueError(f"{label} has no field {unknown[0]!r}; it has {', '.join(allowed)}")
