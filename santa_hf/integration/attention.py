"""The attention function that `attn_implementation="santa"` resolves to.

A call with one query token per row is a decode step and is sampled, but where that token is a prompt's
(see `prefill`); anything else is dense by design.
A decode step that cannot be sampled goes to the exact path of the model's own kind, is counted, and
warns once per reason, or raises under `strict`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .. import reference
from ..config import LayerConfig, SantaConfig
from ..functional import are_valid, decode_valid, plain_step, santa_decode
from ..reference import in_order, length_of
from ..shared import once
from ..stats import count_as_dense, counting_value_rows, layer_stats, warn_once
from . import mla
from .compat import heads_of_layer
from .configure import layer_config, traced_seed
from .prefill import is_prefill

__all__ = ["santa_attention"]


def santa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    santa: SantaConfig | Mapping[str, Any] | None = None,
    rows: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention function of Transformers' AttentionInterface.

    Args:
        module: the attention layer; its `layer_idx` and `config` are read.
        query: (B, H, q, D). key, value: (B, KVH, N, D), (B, KVH, N, Dv), or the latents (B, 1, N, r)
            and rotary keys (B, 1, N, dr) of multi-head latent attention, see `mla`.
        attention_mask: bool (B or 1, 1, q, N), True where visible, or None.
        santa: overrides for this call alone, the `santa=` keyword of the model's forward.
        rows: int (B, N), the slot of each key, where key and value are the storage of a paged cache,
            expanded to (B, KVH, slots, D); None elsewhere.

    Returns:
        (B, q, H, Dv) contiguous, and the attention weights where the caller asked for them (dense), else
        None.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            'a paged cache reached attention "santa": continuous batching runs through '
            "`model.generate_batch`, which switches the model by itself"
        )
    if not torch.compiler.is_compiling():
        mla.adopt(module)
    exact = (module, query, key, value, attention_mask, dropout, scaling, kwargs, rows)
    if query.shape[2] != 1 or is_prefill():
        _count(module, "multi_token")
        return _exact_attention(*exact)

    latent = mla.are_latents(module, key, value)
    position = _position(query.shape[0], kwargs)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    config = layer_config(module, santa, query.device)
    plain = None
    if config.kernel == "prop" or (config.kernel == "auto" and query.is_cuda):
        traced = torch.compiler.is_compiling()
        if not (latent or traced) and rows is None and softcap is None and sinks is None:
            plain = plain_step(query, key, value, attention_mask, position)
    valid = plain is not None or (
        not latent and are_valid(query, key, value, attention_mask, position, softcap, sinks, rows)
    )
    if not valid:
        if rows is not None:
            key, value, rows = in_order(key, rows), in_order(value, rows), None
        _check_inputs(query, key, value, attention_mask, latent)
    seed = None if santa is not None else traced_seed(module, query.device)
    head_offset = _head_offset(module, query.shape[1])
    if head_offset is None:
        reason: str | None = "the heads of the layer are sharded in an unknown way"
    else:
        reason = _why_not_sampled(
            module, query, key, value, attention_mask, position, dropout, kwargs, valid
        )
    # Exact attention is what was asked for, but not to expand a cache of latents for it.
    falls_back = config.estimator != "dense" or mla.caches_latents(module)
    if reason is not None and falls_back:
        _fall_back(module, reason, config)
        return _exact_attention(*exact)
    if config.estimator == "dense":
        _count(module, "dense")
        if reason is not None:
            return _exact_attention(*exact)

    if latent:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, value, rotary_key = mla.absorb(module, query), key, value
    else:
        rotary_key = None
    out = _decode(
        module, query, key, value, attention_mask, scaling, config, seed, position, head_offset, kwargs,
        rotary_key, rows, valid, plain,
    )  # fmt: skip
    if latent:
        out = mla.project(module, out)
    return out.transpose(1, 2).contiguous(), None


def _check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    latent: bool,
) -> None:
    """Refuse what no attention can compute, in words that name it."""
    mixed = query.dtype != key.dtype or query.dtype != value.dtype
    if mixed and not torch.is_autocast_enabled(query.device.type):
        raise TypeError(
            f"the query is {query.dtype}, and the cache holds {key.dtype} keys and {value.dtype} "
            "values: they must share one dtype"
        )
    if key.shape[0] != query.shape[0] or not (latent or key.shape[3] == query.shape[3]):
        raise ValueError(
            f"the query is {tuple(query.shape)}, and the cache holds keys {tuple(key.shape)}: batch "
            "and head size must agree; is it the cache of another model or batch?"
        )
    if isinstance(mask, torch.Tensor) and mask.shape[-1] != 1 and mask.shape[-1] != key.shape[2]:
        raise ValueError(
            f"attention_mask must end in the {key.shape[2]} keys of the cache, got {tuple(mask.shape)}"
        )


def _count(module: torch.nn.Module, calls: str, samples: int = 0) -> None:
    """Count one call of the layer; a graph being traced is not a call."""
    if not torch.compiler.is_compiling():
        counters = layer_stats(module)
        setattr(counters, calls, getattr(counters, calls) + 1)
        counters.samples += samples


def _fall_back(module: torch.nn.Module, reason: str, config: LayerConfig) -> None:
    """Count and announce that a decode call goes dense or expands its latents, or refuse it."""
    if config.strict:
        wanted = "computed over its latents" if config.estimator == "dense" else "sampled"
        raise NotImplementedError(
            f"layer {getattr(module, 'layer_idx', None)} of {type(module).__name__} cannot be "
            f"{wanted} under strict=True: {reason}"
        )
    if not torch.compiler.is_compiling():
        layer_stats(module).fallbacks[reason] += 1
    _announce(type(module).__name__, reason)


@torch.compiler.assume_constant_result
def _announce(layer: str, reason: str) -> None:
    """Warn once per reason; in a compiled graph this runs when it is traced."""
    warn_once(
        reason,
        f"santa_hf: {layer} decodes with exact attention: {reason}. "
        "This is counted in santa_hf.stats(model) and not repeated.",
    )


def _decode(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    config: LayerConfig,
    seed: torch.Tensor | None,
    position: torch.Tensor | None,
    head_offset: int | None,
    kwargs: Mapping[str, Any],
    rotary_key: torch.Tensor | None,
    rows: torch.Tensor | None,
    valid: bool,
    plain: Any,
) -> torch.Tensor:
    """One decode step as configured, but for a `seed`, int64 (1,), of a traced graph: (B, H, 1, Dv).

    Args:
        valid: whether the tensors are known to be valid, and need no check that names what is wrong.
        plain: what `plain_step` says of them; None where another kernel is wanted.
    """
    batch, heads = query.shape[:2]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5

    def decode(**choices: Any) -> torch.Tensor:
        if valid:
            choices["rows"] = rows
        return (decode_valid if valid else santa_decode)(
            query, key, value, mask=mask, scaling=scaling, softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"), rotary_key=rotary_key, kernel=config.kernel, **choices,
        )  # fmt: skip

    def decode_densely() -> torch.Tensor:
        if plain is not None:
            return cast(torch.Tensor, plain.dense(query, key, value, mask, scaling))
        return decode(estimator="dense")

    if config.estimator == "dense":
        return decode_densely()
    over_latents = rotary_key is not None and config.kernel == "auto"
    unprofitable = over_latents and not mla.sampling_pays(query.device)
    if length_of(key, rows) < config.min_context or unprofitable:
        _count(module, "dense")
        return decode_densely()
    exact = _short_rows(mask, batch, config.min_context)
    assert head_offset is not None  # such a layer went dense
    layer = cast(int, module.layer_idx)
    if plain is not None and exact is None:
        out = plain.prop(
            query, key, value, mask, position, config.samples, config.estimator, scaling, config.seed,
            layer, head_offset,
        )  # fmt: skip
    else:
        out = decode(
            exact=exact,
            head_offset=head_offset,
            samples=config.samples,
            estimator=config.estimator,
            seed=config.seed if seed is None else seed.expand(batch).contiguous(),
            layer=layer,
            position=position,
        )
    if not torch.compiler.is_compiling():
        _count(module, "sampled", config.samples * heads * batch)
        if exact is not None and not (exact.is_cuda and torch.cuda.is_current_stream_capturing()):
            count_as_dense(module, exact, config.samples * heads)
        if counting_value_rows():
            sampled = None if exact is None else ~exact
            _count_rows(
                module, query, key, mask, scaling, config, position, head_offset, sampled, kwargs,
                rotary_key, rows,
            )  # fmt: skip
    return out


def _exact_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: Mapping[str, Any],
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the model computes without this package: SDPA, or its own eager function where SDPA
    would ignore a feature (soft-capped scores, attention sinks) or attention weights are asked for."""
    if rows is not None:
        key, value = in_order(key, rows), in_order(value, rows)
    if mla.are_latents(module, key, value):
        key, value = mla.expand(module, key, value)
    mask = _chosen(mask, kwargs.get("indices"), query, key)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is None and sinks is None and not kwargs.get("output_attentions"):
        kwargs = {name: value for name, value in kwargs.items() if name not in ("softcap", "s_aux")}
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} asks for softcap={softcap!r}, attention sinks or attention "
            "weights, and its model file has no eager_attention_forward to compute them"
        )
    queries = query.shape[2]
    if mask is None and queries > 1 and _is_causal(module, kwargs):
        # Without a mask, queries attend causally to an equal number of keys; a static cache that
        # was empty before holds unfilled slots after them.
        key, value = key[:, :, :queries], value[:, :, :queries]
        mask = query.new_ones(1, 1, queries, queries, dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, hidden)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _chosen(
    mask: torch.Tensor | None,
    indices: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor | None:
    """The mask of sparse attention: of the keys that `mask` shows, those at `indices` (B, q, n).

    DeepSeek V3.2 and its relatives mask for "eager" and "sdpa" themselves, and leave it to others.
    """
    if indices is None:
        return mask
    chosen = indices.new_zeros(
        query.shape[0], query.shape[2], key.shape[2], dtype=torch.bool
    ).scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        if query.shape[2] > 1:
            raise NotImplementedError(
                f"sparse attention over {query.shape[2]} query tokens needs a mask that says what "
                "each of them sees, got attention_mask=None"
            )
        return chosen
    if mask.dtype == torch.bool:
        return mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _why_not_sampled(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position: torch.Tensor | None,
    dropout: float,
    kwargs: Mapping[str, Any],
    valid: bool,
) -> str | None:
    """Why this decode call cannot be sampled, in the words of the warning; None if it can."""
    sinks = kwargs.get("s_aux")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        return "the attention sinks are not one per query head"
    if kwargs.get("position_bias") is not None:
        return "scores carry a position bias"
    if kwargs.get("output_attentions"):
        return "attention weights were asked for"
    if kwargs.get("indices") is not None:
        return "the layer attends to keys that it chose (sparse attention)"
    if not _is_causal(module, kwargs):
        return "the layer is not causal (cross-attention or an encoder)"
    if module.training or dropout:
        return "the model is in training mode"
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return "autograd needs a gradient"
    if query.dtype != key.dtype or query.dtype != value.dtype:
        return "autocast left the query, keys and values in different dtypes"
    if mla.caches_latents(module):
        if not mla.are_latents(module, key, value):
            return "the latents were expanded beforehand (continuous batching, or an own expand_kv)"
        reason = mla.why_not_absorbed(module, query, key)
        if reason is not None:
            return reason
    if getattr(module, "layer_idx", None) is None:
        return "the layer has no layer_idx, and layers must not share draws"
    if not (valid or mask is None) and not (
        isinstance(mask, torch.Tensor)
        and mask.dtype == torch.bool
        and mask.ndim == 4
        and mask.shape[0] in (1, query.shape[0])
        and mask.shape[1:] == (1, 1, key.shape[2])
    ):
        return "the mask is not a boolean row per sequence"
    if position is not None:
        return None
    if not hasattr(module, "is_causal") and kwargs.get("is_causal") is None:
        return "the layer does not say that it is causal, and was called without position_ids"
    if kwargs.get("sliding_window") is not None:
        # The index of the last visible key saturates in a full window: every step would draw alike.
        return "a sliding layer was called without position_ids"
    return None


def _is_causal(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the call is causal: the keyword, else the layer's attribute, as SDPA decides it."""
    is_causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _position(batch: int, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Position of this step's token in each row, (B,), from position_ids (B or 1, 1)."""
    position_ids = kwargs.get("position_ids")
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != 1:
        return None
    row = cast(torch.Tensor, position_ids).reshape(-1)
    return row if position_ids.shape[0] == batch else row.expand(batch)


def _head_offset(module: torch.nn.Module, heads: int) -> int | None:
    """Index of the first of `heads` query heads within the whole layer; None if it is not known.

    Tensor parallelism leaves each rank an equal run of heads, in the order of the ranks; the weights
    say how they are sharded. A layer that every rank has as a whole draws alike everywhere.
    """
    traced = torch.compiler.is_compiling()
    known = None if traced else _offsets.get(module)
    if known is None or known[0] != heads:
        whole = heads_of_layer(module)
        all_here = whole is None or heads == whole
        known = (heads, 0 if all_here else _sharded_offset(module, heads, cast(int, whole)))
        if not traced:
            _offsets[module] = known
    return known[1]


_offsets: WeakKeyDictionary[torch.nn.Module, tuple[int, int | None]] = WeakKeyDictionary()


def _sharded_offset(module: torch.nn.Module, heads: int, whole: int) -> int | None:
    from torch.distributed.tensor import DTensor

    for weight in module.parameters():
        if isinstance(weight, DTensor):
            for i, placement in enumerate(weight.placements):
                if placement.is_shard() and weight.device_mesh.size(i) * heads == whole:
                    return int(weight.device_mesh.get_local_rank(i)) * heads
    return None


def _short_rows(mask: torch.Tensor | None, batch: int, min_context: int) -> torch.Tensor | None:
    """Rows that see fewer keys than `min_context`, bool (B,); None where there is no mask to say.

    Decided row by row, so that a sequence is treated alike alone and in a batch, and on the mask's
    device: the host never waits.
    """
    if mask is None or min_context <= 1:
        return None

    def derive() -> torch.Tensor:
        return (mask.sum(-1).flatten() < min_context).expand(batch)

    if torch.compiler.is_compiling():
        return derive()
    return once(mask, ("short rows", min_context, batch), derive)


def _count_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    config: LayerConfig,
    position: torch.Tensor | None,
    head_offset: int,
    sampled: torch.Tensor | None,
    kwargs: Mapping[str, Any],
    rotary_key: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    """Repeat the draws of a call in the reference and count the value rows they read, over the rows
    of the batch that are `sampled`, bool (B,); None for all."""
    if rows is not None:
        key = in_order(key, rows)
    if sampled is not None:
        if not bool(sampled.any()):
            return
        query, key = query[sampled], key[sampled]
        rotary_key = None if rotary_key is None else rotary_key[sampled]
        mask = None if mask is None else mask.expand(len(sampled), -1, -1, -1)[sampled]
        position = None if position is None else position[sampled]
    batch, kv_heads, length = key.shape[:3]
    draws = reference.draw(
        query,
        key,
        samples=config.samples,
        estimator=config.estimator,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=mask,
        seed=config.seed,
        layer=cast(int, module.layer_idx),
        position=position,
        head_offset=head_offset,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        allocation="tile" if config.kernel == "flash" else "global",
        stash=query.is_cuda and config.kernel in ("auto", "prop"),
        rotary_key=rotary_key,
    )
    visible = batch * length if mask is None else int(mask.expand(batch, -1, -1, -1).sum())
    counters = layer_stats(module)
    counters.rows_read += int(draws.rows_read(length))
    counters.rows_visible += visible * kv_heads
