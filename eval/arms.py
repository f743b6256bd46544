"""Arms: the ways to decode that a run compares, and how a model is set to one of them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import santa_hf
from santa_hf import SantaConfig

# `santa_hf.stats` is the function; the module's parts are imported by name.
from santa_hf.stats import counting_value_rows, layer_stats

from .cli import CommandError
from .results import Arm

__all__ = [
    "DENSE",
    "arms_from_settings",
    "check_device",
    "check_model",
    "parse_arm",
    "use_arm",
]

DENSE = Arm("dense", "dense", None, deterministic=True)


def arms_from_settings(arms: Mapping[str, Any]) -> dict[str, Arm]:
    """All arms of a suite by name, dense first.

    Raises:
        TypeError, ValueError, OSError: one of them is not valid.
    """
    made = {DENSE.name: DENSE}
    for name, settings in arms.items():
        made[str(name)] = _make_arm(str(name), settings)
    return made


def _make_arm(name: str, settings: Mapping[str, Any] | None) -> Arm:
    """An arm from what a suite says of it.

    Args:
        name: letters, digits and "._-".
        settings: nothing for dense; {"top_k": k} for the foil; {"config": path of a YAML file} or the
            fields of a SantaConfig, whose seed is that of the run and whose `strict` is true unless
            given: a step that goes dense unseen must not pass for a sampled one.

    Raises:
        TypeError, ValueError, OSError: the settings are not valid; the message says why.
    """
    if settings is None or name == DENSE.name:
        if settings or name != DENSE.name:
            raise ValueError("an arm without settings is called dense, and only that")
        return DENSE
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"{name!r} is no name of an arm: it names a folder, of letters, digits and ._-"
        )
    if not isinstance(settings, Mapping):
        raise TypeError(f"the settings of arm {name!r} must be a mapping, got {settings!r}")
    for key, rest in (("top_k", 1), ("config", 1)):
        if key in settings and len(settings) > rest:
            raise ValueError(f"arm {name!r}: {key} stands alone, got {sorted(settings)}")
    if "top_k" in settings:
        k = settings["top_k"]
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"arm {name!r}: top_k must be an integer of at least 1, got {k!r}")
        return Arm(name, "top-k", {"k": k}, deterministic=True)
    if "seed" in settings:
        raise ValueError(f"arm {name!r}: the seeds of a run are given by 'seeds'")
    try:
        if "config" in settings:
            config = SantaConfig.from_yaml(settings["config"]).merged({"seed": 0, "strict": True})
        else:
            config = SantaConfig.from_dict({"strict": True, **settings})
    except (TypeError, ValueError) as error:
        raise ValueError(f"arm {name!r}: {error}") from error
    values = config.to_dict()
    # As JSON has it, so that an arm equals itself when read back.
    values["layers"] = {str(index): overrides for index, overrides in values["layers"].items()}
    estimators = {config.estimator, *(o.get("estimator") for o in config.layers.values())} - {None}
    return Arm(name, "santa", values, deterministic=estimators == {"dense"})


def parse_arm(text: str) -> tuple[str, dict[str, Any] | None]:
    """Name and settings from the command line: "dense", "NAME:FILE.yaml" or "NAME:KEY=VALUE,...".

    Raises:
        ValueError: something else.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        return name, None
    if "=" not in rest:
        return name, {"config": rest}
    settings: dict[str, Any] = {}
    for pair in rest.split(","):
        key, equals, value = pair.partition("=")
        if not equals or key in settings:
            raise ValueError(f"{text!r} is not NAME:KEY=VALUE,... with every key once")
        settings[key] = (
            int(value) if value.isdigit() else {"true": True, "false": False}.get(value, value)
        )
    return name, settings


def check_device(arm: Arm, device: str) -> None:
    """Raise ValueError if the kernels an arm asks for cannot run on a device ("cpu", "cuda", ...)."""
    if arm.method != "santa" or arm.config is None:
        return
    config = SantaConfig.from_dict(arm.config)
    kernels = {config.kernel, *(o.get("kernel") for o in config.layers.values())} & {
        "prop",
        "flash",
    }
    if kernels and not device.startswith("cuda"):
        raise ValueError(
            f"arm {arm.name!r} asks for kernel={kernels.pop()!r}, which needs a CUDA device; "
            f"the device is {device!r}"
        )
    if kernels and importlib.util.find_spec("triton") is None:
        raise ValueError(f"arm {arm.name!r} needs Triton, which is not installed")


def check_model(arm: Arm, config: Any) -> None:
    """Raise ValueError if a model cannot decode with an arm, as far as its configuration tells.

    Args:
        arm: what to decode with.
        config: the model's.
    """
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    if arm.method == "santa" and arm.config is not None and layers is not None:
        beyond = [index for index in map(int, arm.config["layers"]) if index >= layers]
        if beyond:
            raise ValueError(
                f"arm {arm.name!r}: layers names layer {beyond[0]}, and the model has 0 to {layers - 1}"
            )
    if arm.method == "top-k":
        if getattr(text, "attn_logit_softcapping", None) is not None:
            reason = "soft-capped scores (attn_logit_softcapping)"
        elif _has_sinks(config):
            reason = "attention sinks"
        else:
            return
        raise ValueError(f"arm {arm.name!r}: top_k knows nothing of this model's {reason}")


def _has_sinks(config: Any) -> bool:
    """Whether attention layers have sinks, which no configuration says: the model is built without
    memory for its weights."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ImportError, OSError, ValueError):  # whatever it is, loading will say it
        return False
    return any(name.endswith("sinks") for name, _ in model.named_parameters())


def use_arm(model: PreTrainedModel, arm: Arm, seed: int, dense: str) -> None:
    """Set how a model attends.

    Args:
        model: any causal language model.
        arm: what to set it to.
        seed: key of the draws.
        dense: the model's own attention implementation, for the dense arm.
    """
    if arm.method == "dense":
        model.set_attn_implementation(dense)
    elif arm.method == "top-k":
        assert arm.config is not None
        model.set_attn_implementation(_register_top_k(arm.config["k"]))
    else:
        assert arm.config is not None
        model.set_attn_implementation("santa")
        santa_hf.configure(model, SantaConfig.from_dict({**arm.config, "seed": seed}))


@cache
def _register_top_k(k: int) -> str:
    name = f"eval_top_{k}"
    AttentionInterface.register(name, partial(_top_k_attention, k))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _top_k_attention(
    k: int,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax over the k largest scores of each head, at decode steps; dense elsewhere.

    The foil: it reads as many value rows as k draws at most, and drops what lies below the k-th.

    Raises:
        CommandError: scores are soft-capped, or there are attention sinks; neither is computed here.
    """
    for name, what in (("softcap", "soft-capped scores"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise CommandError(f"top_k={k} knows nothing of this model's {what}")
    if query.shape[2] != 1:
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out
    batch, heads, _, dim = query.shape
    kv_heads, length = key.shape[1:3]
    # (B, KVH, G, D) against (B, KVH, N, D): scores (B, KVH, G, N)
    # In float32 at least: 16-bit scores would round the ranking, which the kernels of santa do not.
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.view(batch, kv_heads, heads // kv_heads, dim).to(wide)
    scores = (grouped @ key.to(wide).transpose(2, 3)) * (dim**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask, -torch.inf)
    top, index = scores.topk(min(k, length), dim=-1)
    weights = top.softmax(-1)
    rows = index.flatten(2)[..., None].expand(-1, -1, -1, value.shape[-1])
    chosen = value.gather(2, rows).view(*index.shape, value.shape[-1])
    out_heads = (weights[..., None] * chosen.to(wide)).sum(-2)
    if counting_value_rows():
        read = torch.zeros(batch, kv_heads, length, dtype=torch.bool, device=query.device)
        read.scatter_(2, index.flatten(2), top.isfinite().flatten(2))
        counters = layer_stats(module)
        counters.rows_read += int(read.sum())
        visible = batch * length if attention_mask is None else int(attention_mask.sum())
        counters.rows_visible += visible * kv_heads
    return out_heads.to(query.dtype).view(batch, 1, heads, -1), None
