"""SantaConfig on a model: it lives as a plain dict in the text config, and is resolved per layer.

Precedence, highest first: the `santa=` keyword of a forward call, the model's `config.santa`, the
file named by SANTA_HF_CONFIG, the defaults of `SantaConfig`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ..config import CONFIG_VARIABLE, LayerConfig, SantaConfig, environment_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["configure", "layer_config", "traced_seed"]


def configure(
    model: PreTrainedModel, config: SantaConfig | Mapping[str, Any] | str | os.PathLike[str]
) -> SantaConfig:
    """Set how the attention layers of `model` are sampled; takes effect at the next step.

    Args:
        model: a model loaded with `attn_implementation="santa"`.
        config: a SantaConfig, a mapping of its fields, or the path of a YAML file.

    Returns:
        The validated configuration, which `save_pretrained` stores with the model.

    Raises:
        TypeError, ValueError: `config` is not valid, names a layer that the model lacks, or the
            model does not use the "santa" attention.
        FileNotFoundError: the YAML file does not exist.
    """
    if isinstance(config, (str, os.PathLike)):
        config = SantaConfig.from_yaml(config)
    elif not isinstance(config, SantaConfig):
        config = SantaConfig.from_dict(config)
    text_configs = _text_configs(model)
    others = [c for c in text_configs if c._attn_implementation != "santa"]
    if others:
        raise ValueError(
            f"the model's attention is {others[0]._attn_implementation!r}, so a santa configuration "
            'would do nothing; load it with attn_implementation="santa" or call '
            'model.set_attn_implementation("santa")'
        )
    config.check_layers(model.config.get_text_config(decoder=True).num_hidden_layers)
    stored = _Stored(config.to_dict())
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    stored.seeds = {d: torch.tensor([config.seed], device=d) for d in devices}
    for text_config in text_configs:
        text_config.santa = stored
    return config


def _text_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that the layers of the text decoder read, and the one that is saved.

    They are one object, except in encoder-decoder models: these answer `get_text_config` with a
    copy, and some hand further copies to their halves.
    """
    text_config = model.config.get_text_config(decoder=True)
    stored = model.config if type(text_config) is type(model.config) else text_config
    read = [getattr(module, "config", None) for module in model.modules()]
    same = [config for config in read if type(config) is type(stored)]
    return list({id(config): config for config in (stored, *same)}.values())


class _Stored(dict[str, Any]):
    """What `configure` stores: a dict, and its seed as a tensor int64 (1,) on each device of the model.

    A graph takes the tensor as an input, so a new seed compiles nothing again. Of a plain dict (a loaded
    model, a config set by hand) or one that was changed, the seed is a constant of the graph. Copies are
    plain dicts.
    """

    seeds: Mapping[torch.device, torch.Tensor]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _forgetting_the_seeds(name: str) -> Callable[..., Any]:
    change = getattr(dict, name)

    def method(self: _Stored, *args: Any, **kwargs: Any) -> Any:
        self.seeds = {}
        return change(self, *args, **kwargs)

    return method


for _name in (
    "__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update",
):  # fmt: skip
    setattr(_Stored, _name, _forgetting_the_seeds(_name))


_Source = tuple[Any, str | None, int | None]
_resolved: WeakKeyDictionary[torch.nn.Module, tuple[_Source, LayerConfig]] = WeakKeyDictionary()


def layer_config(
    module: torch.nn.Module,
    override: SantaConfig | Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> LayerConfig:
    """The settings of an attention layer for this call, by the precedence of this module.

    Where `traced_seed` gives a tensor for `device` and nothing overrides it, the seed is that tensor's
    and not the one here.

    Raises:
        TypeError, ValueError: the model's `config.santa`, the file named by the environment, or
            `override` is not valid.
    """
    config = getattr(module, "config", None)
    if config is None or torch.compiler.is_compiling():
        stored = getattr(config, "santa", None)
    else:  # ten times as fast as past the attribute map of a configuration
        stored = object.__getattribute__(config, "__dict__").get("santa")
    path = None if stored is not None else os.environ.get(CONFIG_VARIABLE)
    layer = getattr(module, "layer_idx", None)
    if override is None and not torch.compiler.is_compiling():
        # Resolved again only when the dict on the config or the environment changes: a decode step
        # costs a comparison, not a validation.
        known = _resolved.get(module)
        if known is not None and known[0] == (stored, path, layer):
            return known[1]
    num_layers = (
        None
        # Of an encoder-decoder, this would be the encoder's.
        if getattr(config, "is_encoder_decoder", False)
        else getattr(config, "num_hidden_layers", None)
    )
    if override is not None:
        if not isinstance(override, SantaConfig):
            override = _model_config(stored, path, num_layers).merged(override)
        if num_layers is not None:
            override.check_layers(num_layers)
        return override.for_layer(layer or 0)
    copied: dict[str, Any] | None
    if stored is None or traced_seed(module, device) is None:
        copied = _copied(stored)
    else:  # all but the seed, on which the graph would guard
        copied = {name: _copied(value) for name, value in stored.items() if name != "seed"}
    resolved = _layer_config(copied, path, layer or 0, num_layers)
    if not torch.compiler.is_compiling():
        _resolved[module] = (copied, path, layer), resolved
    return resolved


def traced_seed(module: torch.nn.Module, device: torch.device | None) -> torch.Tensor | None:
    """The seed of `config.santa` as a graph being traced takes it, int64 (1,) on `device`; None if it is
    a constant of the graph, or nothing is traced."""
    if device is None or not torch.compiler.is_compiling():
        return None
    stored = getattr(getattr(module, "config", None), "santa", None)
    return stored.seeds.get(device) if isinstance(stored, _Stored) else None


def _copied(value: Any) -> Any:
    """A deep copy of nested dicts; walking them is what makes a graph guard on their contents."""
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


@torch.compiler.assume_constant_result
def _layer_config(
    stored: Mapping[str, Any] | None, path: str | None, layer: int, num_layers: int | None
) -> LayerConfig:
    """Not traced: a graph guards on the arguments and holds the result as a constant."""
    return _model_config(stored, path, num_layers).for_layer(layer)


def _model_config(
    stored: Mapping[str, Any] | None, path: str | None, num_layers: int | None
) -> SantaConfig:
    if stored is None:
        source = CONFIG_VARIABLE
        config = environment_config(path) if path else SantaConfig()
    else:
        source = "the model's config.santa"
        with _named(source):
            config = SantaConfig.from_dict(stored)
    if num_layers is not None:
        with _named(source):
            config.check_layers(num_layers)
    return config


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Begin the message of an error with where the configuration comes from."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{source}: {error}") from error
