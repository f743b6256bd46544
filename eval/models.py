"""Models as a run describes them: a checkpoint, changes to its config, an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .cli import CommandError

__all__ = ["CONFIG_FILE", "adapters_config", "changed_config", "dense_attention", "load"]

# Beside an adapter: the changes to the base model's config that it was trained with.
CONFIG_FILE = "model_config.json"


def load(
    name: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    model_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model, and an adapter, if any, merged into its weights.

    Args:
        name: directory or hub id.
        adapter: directory or hub id.
        dtype: of the weights; "auto" for that of the checkpoint.
        model_config: changes to the model's config, made before the weights are loaded.
        **options: for `from_pretrained` (revision).

    Raises:
        CommandError: `model_config` is not valid.
    """
    from peft import PeftModel

    options |= changed_config(name, model_config, options)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    if adapter is None:
        return model
    # Merged, the adapter costs nothing at a decode step.
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def changed_config(
    name: str | os.PathLike[str],
    changes: str | Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The keyword that loads a model with changes to its config; empty without changes.

    Args:
        name: directory or hub id.
        changes: attributes of the config and their values, or JSON of that.
        options: those for `from_pretrained`.

    Raises:
        CommandError: `changes` is not a mapping, or names what the config does not have.
    """
    if not changes:
        return {}
    if isinstance(changes, str):
        try:
            changes = json.loads(changes)
        except ValueError as error:
            raise CommandError(f"the changes to the model's config are no JSON: {error}") from error
    if not isinstance(changes, Mapping):
        raise CommandError(f"the changes to the model's config must be a mapping, got {changes!r}")
    known = ("revision", "trust_remote_code")
    config = AutoConfig.from_pretrained(
        name, **{key: options[key] for key in known if options.get(key) is not None}
    )
    for attribute, value in changes.items():
        if not hasattr(config, attribute):
            raise CommandError(f"the config of {name} has no {attribute!r}")
        setattr(config, attribute, value)
    return {"config": config}


def adapters_config(adapter: str | None) -> Any:
    """What a local adapter's model_config.json holds; None where there is none.

    Raises:
        CommandError: the file is not JSON.
    """
    path = None if adapter is None else Path(adapter) / CONFIG_FILE
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {error}") from error


def dense_attention(model: PreTrainedModel) -> str:
    """The attention that the dense arm uses: what Transformers chose for the model, but eager for
    soft-capped scores, which SDPA ignores."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "eager"
    return str(config._attn_implementation)
