"""santa_decode: shapes, validation and dispatch of one decode step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from . import ops, reference
from .config import ESTIMATORS, KERNELS
from .rng import MAX_LAYERS

__all__ = ["are_valid", "decode_valid", "plain_step", "santa_decode"]

KINDS = 1024  # of tensors, that `plain_step` remembers
_plain: dict[tuple[Any, ...], tuple[Any, int]] = {}


def santa_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    samples: int = 128,
    estimator: str = "systematic",
    scaling: float | None = None,
    mask: torch.Tensor | None = None,
    seed: int | torch.Tensor = 0,
    layer: int = 0,
    position: torch.Tensor | None = None,
    head_offset: int = 0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    rotary_key: torch.Tensor | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Attention of one query token per row over a KV cache, by drawing value rows (arXiv 2605.01910).

    An unbiased estimate of `softmax(query key^T * scaling) value`: every visible key is read, and
    about `samples` value rows per query head. Randomness is a pure function of (seed, layer, query
    head, position): the same call gives the same draws, and torch's generator is not touched.

    Args:
        query: (B, H, 1, D), float16, bfloat16, float32 or float64.
        key: (B, KVH, N, D), the dtype of `query`, any strides with a unit last stride; H is a
            multiple of KVH.
        value: (B, KVH, N, Dv), likewise.
        samples: draws per query head, at least 1. With kernel "flash", the total over tiles.
        estimator: "systematic", "stratified", "multinomial" or "dense" (exact).
        scaling: softmax scale; None for D ** -0.5.
        mask: bool, broadcastable to (B, 1, 1, N), True where a key is visible; None if all are.
        seed: int in [0, 2**63), or int64 (B,), one per row.
        layer: index of the layer; layers never share draws.
        position: int64 (B,), 0-based position of the query token; None for the index of each row's
            last visible key.
        head_offset: index of the first query head here within the whole layer (sharded heads).
        softcap: scores become cap * tanh(score / cap) before the softmax; None for none.
        sinks: (H,), a logit per query head that joins the softmax with a value of zero; None for none.
        exact: bool (B,), True for rows that are computed exactly, without draws; None for none. The
            kernels decide on the device, so it costs no synchronisation.
        rotary_key: (B, KVH, N, Dr), a second part of the keys, which the last Dr columns of `query`
            meet; `key` is then (B, KVH, N, D - Dr). Multi-head latent attention caches it apart from
            the latents, which are both `key` and `value`. None for keys in one part.
        kernel: "auto", "reference" and "prop" draw by one grid over the row and agree for one seed;
            "flash" gives every tile of 256 keys ceil(samples / tiles) draws. An explicit choice
            that cannot run here raises.

    Returns:
        (B, H, 1, Dv) in query's dtype. As with SDPA, a row with no visible key is zero and a NaN
        in a visible score makes the head's output NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.
        NotImplementedError: the kernel asked for cannot run on these tensors.
    """
    mask, position, seed = _validate(
        query, key, value, rotary_key, samples, estimator, mask, seed, layer, position, head_offset,
        kernel,
    )  # fmt: skip
    _validate_scores(query, scaling, softcap, sinks)
    exact = _validate_exact(query, exact)
    return decode_valid(
        query, key, value, samples=samples, estimator=estimator, scaling=scaling, mask=mask, seed=seed,
        layer=layer, position=position, head_offset=head_offset, softcap=softcap, sinks=sinks,
        exact=exact, rotary_key=rotary_key, kernel=kernel,
    )  # fmt: skip


def decode_valid(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    samples: int = 128,
    estimator: str = "systematic",
    scaling: float | None = None,
    mask: torch.Tensor | None = None,
    seed: int | torch.Tensor = 0,
    layer: int = 0,
    position: torch.Tensor | None = None,
    head_offset: int = 0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    rotary_key: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """`santa_decode` of arguments that are known to be valid, of which `are_valid` says so for tensors:
    to check them takes the host as long as half of the rest.

    Args:
        rows: int32 or int64 (B, N), the row of `key` and `value` that holds each of the N keys, of
            hidden ones too; None for keys in their order. `key` and `value` are then the storage
            of a paged cache, expanded to (B, KVH, slots, D), and the kernels read them in place.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_compiling():
        row_seed, seed = (seed, 0) if isinstance(seed, torch.Tensor) else (None, seed)
        return ops.decode(
            query, key, value, mask, position, row_seed, sinks, exact, rotary_key, rows, seed=seed,
            samples=samples, estimator=estimator, scaling=scaling, softcap=softcap, layer=layer,
            head_offset=head_offset, implementation=kernel,
        )  # fmt: skip
    return _run(
        query, key, value, mask=mask, position=position, seed=seed, sinks=sinks, exact=exact,
        rotary_key=rotary_key, rows=rows, samples=samples, estimator=estimator, scaling=scaling,
        softcap=softcap, layer=layer, head_offset=head_offset, kernel=kernel,
    )  # fmt: skip


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    sinks: torch.Tensor | None,
    rotary_key: torch.Tensor | None,
    rows: torch.Tensor | None,
    estimator: str,
    softcap: float | None,
    kernel: str,
    **others: Any,
) -> torch.Tensor:
    """Compute the step of `decode_valid`, whoever is compiling meanwhile."""
    scored = softcap is not None or sinks is not None
    decode = _implementation(query, key, value, rotary_key, rows, scored, estimator, kernel)
    if rotary_key is not None:
        others["rotary_key"] = rotary_key
    elif rows is not None:
        others["rows"] = rows
    return decode(
        query, key, value, sinks=sinks, estimator=estimator, softcap=softcap, **others
    )  # fmt: skip


def are_valid(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    rows: torch.Tensor | None = None,
) -> bool:
    """Whether `decode_valid` takes these as they are: tensors of one device, with the dtypes and shapes
    that it documents, a mask of 4 dimensions, no rotary key. It does not say what is wrong."""
    if not query.ndim == key.ndim == value.ndim == 4:
        return False
    batch, heads, queries, dim = query.shape
    kv_batch, kv_heads, length, key_dim = key.shape
    value_batch, value_heads, value_length, _ = value.shape
    dtype, device = query.dtype, query.device
    return bool(
        queries == 1
        and batch == kv_batch == value_batch
        and kv_heads == value_heads
        and length == value_length
        and dim == key_dim
        and dtype in _DTYPES
        and dtype == key.dtype == value.dtype
        and device == key.device == value.device
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and batch and length and dim and kv_heads
        and heads and heads % kv_heads == 0
        and (rows is None or _is_index(rows, batch, device))
        and (mask is None or _is_row(mask, batch, reference.length_of(key, rows), device))
        and (
            position is None
            or (position.dtype, position.shape, position.device) == (torch.int64, (batch,), device)
        )
        and (softcap is None or 0 < softcap < math.inf)
        and (sinks is None or _is_of_heads(sinks, heads, device))
    )  # fmt: skip


def plain_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position: torch.Tensor | None,
) -> Any:
    """The short way through the kernels, a `launch.Plain`, which takes these tensors as they are; None
    where there is none.

    What makes tensors valid, and the kernels able to run on them, is found out once for each kind of
    tensors; their length alone is looked at every time. Not for traced code, nor for tensors that need
    a gradient, which the caller has to rule out.
    """
    if position is None or not query.ndim == key.ndim == value.ndim == 4:
        return None
    kv_batch, kv_heads, length, key_dim = key.shape
    value_batch, value_heads, value_length, value_dim = value.shape
    if length != value_length or length == 0:
        return None
    of_mask = None
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[3] != length:
            return None
        of_mask = mask.shape[:3], mask.stride(3), mask.dtype, mask.device
    kind = (
        query.shape, query.stride(), query.dtype, query.device,
        kv_batch, kv_heads, key_dim, key.stride(), key.dtype, key.device,
        value_batch, value_heads, value_dim, value.stride(), value.dtype, value.device,
        of_mask, position.shape, position.dtype, position.device,
    )  # fmt: skip
    known = _plain.get(kind)
    if known is None:
        known = _plain_of_kind(query, key, value, mask, position)
        if len(_plain) >= KINDS:
            _plain.clear()
        _plain[kind] = known
    plain, longest = known
    return plain if length <= longest else None


def _plain_of_kind(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position: torch.Tensor,
) -> tuple[Any, int]:
    """The short way of steps like this one, and the most keys that it takes."""
    kernels = _kernels()
    if kernels is None or not are_valid(query, key, value, mask, position, None, None):
        return None, 0
    launch, _ = kernels
    with torch.no_grad():  # the caller looks after gradients
        if launch.why_not(query, key[:, :, :1], value[:, :, :1]) is not None:
            return None, 0
    return launch.Plain(query, key, value, mask), launch.MAX_LENGTH


def _is_index(rows: torch.Tensor, batch: int, device: torch.device) -> bool:
    index = rows.ndim == 2 and rows.shape[0] == batch and rows.shape[1] > 0
    return index and rows.dtype in (torch.int32, torch.int64) and rows.device == device


def _is_row(mask: torch.Tensor, batch: int, length: int, device: torch.device) -> bool:
    # Not `in`, for which dynamo takes two symbols of one length for different ones.
    row = mask.shape == (batch, 1, 1, length) or mask.shape == (1, 1, 1, length)
    return row and mask.dtype == torch.bool and mask.device == device


def _is_of_heads(sinks: torch.Tensor, heads: int, device: torch.device) -> bool:
    return sinks.is_floating_point() and sinks.shape == (heads,) and sinks.device == device


def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position: torch.Tensor | None,
    row_seed: torch.Tensor | None,
    sinks: torch.Tensor | None,
    exact: torch.Tensor | None,
    rotary_key: torch.Tensor | None,
    rows: torch.Tensor | None,
    *,
    seed: int,
    implementation: str,
    **choices: Any,
) -> torch.Tensor:
    """Implementation of `santa_hf::decode`, which a compiled graph calls.

    The mask is often the object that the caller holds. What `shared.once` kept with it would lie in the
    memory of a CUDA graph and outlive this call, so it is given another.
    """
    return _run(
        query, key, value, mask=None if mask is None else mask.detach(), position=position,
        seed=seed if row_seed is None else row_seed, sinks=sinks, exact=exact, rotary_key=rotary_key,
        rows=rows, kernel=implementation, **choices,
    )  # fmt: skip


torch.library.impl("santa_hf::decode", "default", _operator)


def _implementation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotary_key: torch.Tensor | None,
    rows: torch.Tensor | None,
    scored: bool,
    estimator: str,
    kernel: str,
) -> Callable[..., torch.Tensor]:
    """The function that computes one decode step; `scored` if scores have a soft cap or sinks.

    "auto" takes the Triton kernels on a CUDA device wherever they can run, at any length: it has to draw
    what the reference draws, which "prop" does, and below the crossover with dense attention (4k keys
    at batch 1 on an H100, eval/bench/results) the choice is `min_context`, not another kernel.
    """
    assert rows is None or rotary_key is None, "latents are not read through rows"
    if kernel == "reference" or (kernel == "auto" and query.device.type != "cuda"):
        return reference.decode
    kernels = _kernels()
    if kernels is None:
        reason: str | None = "Triton is not installed"
    elif rotary_key is None:
        launch, _ = kernels
        reason = launch.why_not(query, key, value, rows)
        if reason is None:
            one_pass = kernel == "flash" or estimator == "dense"
            return launch.fused if one_pass else launch.prop  # type: ignore[no-any-return]
    else:
        _, latent = kernels
        reason = latent.why_not(query, key, value, rotary_key, kernel, estimator, scored)
        if reason is None:
            return latent.decode  # type: ignore[no-any-return]
    if kernel != "auto":
        raise NotImplementedError(f"kernel={kernel!r} cannot run here: {reason}")
    return reference.decode


@cache
def _kernels() -> tuple[Any, Any] | None:
    """The modules `launch` and `latent`, imported when they are needed; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .kernels import latent, launch

    return launch, latent


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {value!r}")


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def _validate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotary_key: torch.Tensor | None,
    samples: int,
    estimator: str,
    mask: torch.Tensor | None,
    seed: int | torch.Tensor,
    layer: int,
    position: torch.Tensor | None,
    head_offset: int,
    kernel: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int | torch.Tensor]:
    """Check every argument; returns mask as (1 or B, 1, 1, N), position and seed on query's device."""
    tensors = {"query": query, "key": key, "value": value}
    if rotary_key is not None:
        tensors["rotary_key"] = rotary_key
    for name, tensor in tensors.items():
        _tensor(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES or tensor.dtype != query.dtype:
            raise TypeError(
                f"{', '.join(tensors)} must share one of {', '.join(map(str, _DTYPES))}; "
                f"{name} has {tensor.dtype}, query {query.dtype}"
            )
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have a unit last stride, got {tensor.stride()}")
    batch, heads, queries, dim = query.shape
    kv_heads, length = key.shape[1:3]
    if queries != 1:
        raise ValueError(f"query must hold one token per row, (B, H, 1, D), got {queries} tokens")
    if rotary_key is not None:
        if not 0 < rotary_key.shape[3] < dim or rotary_key.shape[:3] != key.shape[:3]:
            raise ValueError(
                f"rotary_key must be ({batch}, {kv_heads}, {length}, Dr) with 0 < Dr < {dim}, "
                f"got {tuple(rotary_key.shape)}"
            )
        dim -= rotary_key.shape[3]
    if key.shape != (batch, kv_heads, length, dim):
        raise ValueError(f"key must be ({batch}, KVH, N, {dim}), got {tuple(key.shape)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must be ({batch}, {kv_heads}, {length}, Dv), got {tuple(value.shape)}"
        )
    if 0 in (batch, heads, kv_heads, length, dim) or heads % kv_heads:
        raise ValueError(
            "query heads must be a multiple of KV heads and no dimension empty, "
            f"got B={batch}, H={heads}, KVH={kv_heads}, N={length}, D={dim}"
        )
    if torch.is_grad_enabled() and estimator != "dense":
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, which draws do not have; "
                    "use torch.no_grad() or estimator='dense'"
                )
    for name, choice, allowed in (
        ("estimator", estimator, ESTIMATORS),
        ("kernel", kernel, KERNELS),
    ):
        if choice not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {choice!r}")
    _integer("samples", samples, 1, 2**24)
    _integer("layer", layer, 0, MAX_LAYERS - 1)
    _integer("head_offset", head_offset, 0, 2**31 - 1)
    if mask is not None:
        _tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool with True for visible keys, got {mask.dtype}")
        if mask.shape != (batch, 1, 1, length) or mask.device != query.device:
            mask = _mask_row(mask, batch, length).to(query.device)
    if position is not None:
        position = _per_row("position", position, batch, query.device)
    if isinstance(seed, torch.Tensor):
        return mask, position, _per_row("seed", seed, batch, query.device)
    _integer("seed", seed, 0, 2**63 - 1)
    return mask, position, seed


def _mask_row(mask: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """A mask of any broadcastable shape as (1 or batch, 1, 1, length)."""
    try:
        mask = mask.view([1] * (4 - mask.ndim) + list(mask.shape))
        shape = torch.broadcast_shapes(mask.shape, (batch, 1, 1, length))
    except RuntimeError:
        shape = mask.shape
    if tuple(shape) != (batch, 1, 1, length):
        raise ValueError(
            f"mask must broadcast to ({batch}, 1, 1, {length}), got {tuple(mask.shape)}"
        )
    return mask.expand(-1, 1, 1, length)


def _validate_scores(
    query: torch.Tensor, scaling: float | None, softcap: float | None, sinks: torch.Tensor | None
) -> None:
    if scaling is not None and not _finite(scaling):
        raise ValueError(f"scaling must be a finite number or None, got {scaling!r}")
    if softcap is not None and not (_finite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a positive finite number or None, got {softcap!r}")
    if sinks is not None:
        _tensor("sinks", sinks)
        if sinks.shape != query.shape[1:2] or not sinks.is_floating_point():
            raise ValueError(
                f"sinks must be floating point of shape ({query.shape[1]},), "
                f"got {sinks.dtype} {tuple(sinks.shape)}"
            )
        if sinks.device != query.device:
            raise ValueError(f"sinks is on {sinks.device}, query on {query.device}")


def _validate_exact(query: torch.Tensor, exact: torch.Tensor | None) -> torch.Tensor | None:
    if exact is None:
        return None
    _tensor("exact", exact)
    if exact.dtype != torch.bool or exact.shape != query.shape[:1]:
        raise ValueError(
            f"exact must be bool of shape ({query.shape[0]},), got {exact.dtype} {tuple(exact.shape)}"
        )
    return exact.to(query.device)


def _per_row(name: str, tensor: torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    _tensor(name, tensor)
    if tensor.dtype != torch.int64 or tensor.shape != (batch,):
        raise ValueError(
            f"{name} must be int64 of shape ({batch},), got {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.to(device)
