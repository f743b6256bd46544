"""Host side of the kernels: what can run, tile choices, workspaces and launches.

Workspaces come from PyTorch's caching allocator at every call, so that layers and steps reuse the same
blocks, CUDA graphs keep them in their own pool, and streams and devices never share one. In bytes, with
T = ceil(N / 128) tiles and C chunks of 32 draws (of 64 with more than 128 samples):

    prop          B H (264 T + 4 Dv C + 4)    264 T = about 2 bytes a key and query head
    dense, flash  B H (4 Dv + 8) splits       splits <= 2 * multiprocessors
"""

import os
from functools import cache

import torch
import triton

from ..reference import FIXED_TILE, TILE
from ..rng import Stream
from .common import LOG2E, span_kernel
from .fused import combine_kernel, fused_kernel
from .sample import sample_kernel
from .scores import scores_kernel

__all__ = ["fused", "prop", "scores", "why_not"]

# The integer prefix of pass 2 holds N * 2**40 in an int64.
MAX_LENGTH = 2**23 - 1
MAX_DIM = 1024
MAX_GROUP = 128
MAX_GROUP_FLASH = 64  # more heads times a tile of 256 keys do not fit
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Choices measured on an H100, see eval/bench/results/kernels.md. None of them changes a draw.
MIN_GROUP = 4  # rows that a group of query heads is padded to
SCORE_WARPS = 8
PART = 16  # keys of a tile that a draw passes at a time
BLOCK_T = 256  # tiles whose masses a program of pass 2 holds at a time: 32k keys
SPLIT_WAVES = 1  # programs a multiprocessor that the splits of one row aim at
FLASH_WARPS = 4
FLASH_STAGES = 1
DENSE_TILE = 128
DENSE_STAGES = 2
DENSE_WARPS = 8


def why_not(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: str = "prop"
) -> str | None:
    """Why the Triton kernels cannot run on these tensors, in the words of an error; None if they can."""
    if query.device.type != "cuda" and not _INTERPRETED:
        return f"Triton kernels need a CUDA device, and query is on {query.device}"
    if query.device.type != "cuda" and query.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16"
    if query.dtype == torch.float64:
        return "Triton kernels compute in float32, and query is float64"
    if max(query.shape[-1], value.shape[-1]) > MAX_DIM:
        return f"Triton kernels take head dimensions up to {MAX_DIM}"
    group = MAX_GROUP_FLASH if kernel == "flash" else MAX_GROUP
    if query.shape[1] > group * key.shape[1]:
        return f"this Triton kernel takes up to {group} query heads per KV head"
    if key.shape[2] > MAX_LENGTH:
        return f"Triton kernels take up to {MAX_LENGTH} keys"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return "Triton kernels have no backward pass"
    return None


def scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None,
    span: torch.Tensor | None,
    exact: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pass 1, see `scores_kernel`; `span` is that of the mask, rows that are `exact` are skipped.

    Returns:
        stash float16 (B, KVH, T, G, TILE), top float32 (B, H, T), total int32 (B, H, T), and done int32
        (B, H) of zeros. A tile without a visible key has top -inf and total 0.
    """
    batch, heads, _, dim = query.shape
    kv_heads, length = key.shape[1:3]
    n_tiles = triton.cdiv(length, TILE)
    rows, device = (batch, heads, n_tiles), query.device
    group = (batch, kv_heads, n_tiles, heads // kv_heads, TILE)
    stash = torch.empty(group, dtype=torch.float16, device=device)
    top = torch.empty(rows, dtype=torch.float32, device=device)
    total = torch.empty(rows, dtype=torch.int32, device=device)
    done = torch.empty(batch, heads, dtype=torch.int32, device=device)
    scale, cap = _exponent_scale(scaling, softcap)
    pdl = _dependent_launch(device)
    with _device(query):
        scores_kernel[(n_tiles, kv_heads, batch)](
            query, key, mask, span, _bytes(exact), stash, top, total, done, scale, cap, length,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), _mask_stride(mask, 0),
            STRIDE_KN=key.stride(2),
            STRIDE_MN=_mask_stride(mask, 1),
            G=heads // kv_heads,
            D=dim,
            HAS_MASK=mask is not None,
            HAS_EXACT=exact is not None,
            HAS_SOFTCAP=softcap is not None,
            TILE=TILE,
            ALIGN_Q=_alignment(query),
            ALIGN=_alignment(key),
            BLOCK_G=_block_of_group(heads // kv_heads),
            BLOCK_D=_block_of(dim),
            num_warps=SCORE_WARPS,
            num_stages=1,
            PDL=pdl,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return stash, top, total, done


def prop(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    samples: int,
    estimator: str,
    scaling: float,
    mask: torch.Tensor | None,
    seed: int | torch.Tensor,
    layer: int,
    position: torch.Tensor | None,
    head_offset: int = 0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sampled decode step in two passes; arguments and result as in `santa_decode`.

    `index`, int64 (B, H, samples), receives the keys drawn, -1 where a draw fell on the sink.
    """
    batch, heads = query.shape[:2]
    kv_heads, length, value_dim = value.shape[1:]
    mask, span = _visible(mask, batch, position is None)
    stash, top, total, done = scores(
        query, key, scaling=scaling, mask=mask, span=span, exact=exact, softcap=softcap
    )
    out = query.new_empty(batch, heads, 1, value_dim)
    block_s, warps = _block_of_samples(samples)
    chunks = triton.cdiv(samples, block_s)
    partial = out
    if chunks > 1:
        partial = out.new_empty(batch * heads * chunks * value_dim, dtype=torch.float32)
    row_seed, seed = (_per_row(seed, batch), 0) if isinstance(seed, torch.Tensor) else (None, seed)
    pdl = _dependent_launch(query.device)
    with _device(query):
        sample_kernel[(chunks, heads, batch)](
            value, span, _bytes(exact), _contiguous(sinks), row_seed, _per_row(position, batch),
            stash, top, total, done, partial, index, out,
            seed, length - 1, layer, head_offset, samples, length, top.shape[2],
            value.stride(0), value.stride(1),
            STRIDE_VN=value.stride(2),
            G=heads // kv_heads,
            DV=value_dim,
            HAS_SPAN=span is not None,
            HAS_EXACT=exact is not None,
            HAS_SINKS=sinks is not None,
            HAS_SEED=row_seed is not None,
            HAS_POSITION=position is not None,
            HAS_INDEX=index is not None,
            ESTIMATOR=estimator,
            GRID=int(Stream.GRID),
            TILE_OFFSET=int(Stream.TILE),
            SAMPLE=int(Stream.SAMPLE),
            TILE=TILE,
            PART=PART,
            ALIGN=_alignment(value),
            BLOCK_S=block_s,
            BLOCK_T=BLOCK_T,
            LOG2_BLOCK_T=BLOCK_T.bit_length() - 1,
            BLOCK_DV=_block_of(value_dim),
            num_warps=warps,
            PDL=pdl,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    if exact is not None:
        _one_pass(
            query, key, value, out, mask, span, samples=1, estimator="dense", scaling=scaling,
            seed=0, layer=0, position=None, head_offset=0, softcap=softcap, sinks=sinks, only=exact,
        )  # fmt: skip
    return out


def fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    samples: int,
    estimator: str,
    scaling: float,
    mask: torch.Tensor | None,
    seed: int | torch.Tensor,
    layer: int,
    position: torch.Tensor | None,
    head_offset: int = 0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
) -> torch.Tensor:
    """One decode step in one pass, exact or with a fixed budget per tile; as in `santa_decode`."""
    batch, heads = query.shape[:2]
    out = query.new_empty(batch, heads, 1, value.shape[-1])
    mask, span = _visible(mask, batch, estimator != "dense")
    passes: list[tuple[str, torch.Tensor | None]] = [(estimator, None)]
    if exact is not None and estimator != "dense":
        passes = [(estimator, ~exact), ("dense", exact)]
    for each, only in passes:
        _one_pass(
            query, key, value, out, mask, span, samples=samples, estimator=each, scaling=scaling,
            seed=seed, layer=layer, position=position, head_offset=head_offset, softcap=softcap,
            sinks=sinks, only=only,
        )  # fmt: skip
    return out


def _one_pass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    mask: torch.Tensor | None,
    span: torch.Tensor | None,
    *,
    samples: int,
    estimator: str,
    scaling: float,
    seed: int | torch.Tensor,
    layer: int,
    position: torch.Tensor | None,
    head_offset: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
    only: torch.Tensor | None,
) -> None:
    """Write the rows of `out` that `only`, bool (B,), names; None for all. See `fused_kernel`."""
    batch, heads, _, dim = query.shape
    kv_heads, length, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    tile = DENSE_TILE if estimator == "dense" else FIXED_TILE
    row_seed, seed = (_per_row(seed, batch), 0) if isinstance(seed, torch.Tensor) else (None, seed)
    pdl = _dependent_launch(query.device)
    block_g = _block_of_group(heads // kv_heads)
    block_d, block_dv, options = _fused_blocks(query, value_dim, estimator, block_g)
    value_blocks = triton.cdiv(value_dim, block_dv)
    split_tiles = _split_tiles(length, tile, kv_heads * value_blocks, query.device)
    splits = triton.cdiv(triton.cdiv(length, tile), split_tiles)
    rows = batch * heads * splits
    partial = torch.empty(rows * value_dim, dtype=torch.float32, device=query.device)
    top = torch.empty(rows, dtype=torch.float32, device=query.device)
    mass = torch.empty(rows, dtype=torch.float32, device=query.device)
    scale, cap = _exponent_scale(scaling, softcap)
    with _device(query):
        fused_kernel[(splits * value_blocks, kv_heads, batch)](
            query, key, value, mask, span, _bytes(only), row_seed, _per_row(position, batch),
            partial, top, mass, scale, cap,
            seed, layer, head_offset, samples, length,
            split_tiles, query.stride(0), query.stride(1), key.stride(0), key.stride(1),
            value.stride(0), value.stride(1), _mask_stride(mask, 0),
            STRIDE_KN=key.stride(2),
            STRIDE_VN=value.stride(2),
            STRIDE_MN=_mask_stride(mask, 1),
            G=heads // kv_heads,
            D=dim,
            DV=value_dim,
            HAS_MASK=mask is not None,
            HAS_ONLY=only is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_SEED=row_seed is not None,
            HAS_POSITION=position is not None,
            ESTIMATOR=estimator,
            FIXED_TILE=int(Stream.FIXED_TILE),
            FIXED_SAMPLE=int(Stream.FIXED_SAMPLE),
            TILE=tile,
            ALIGN_Q=_alignment(query),
            ALIGN_K=_alignment(key),
            ALIGN_V=_alignment(value),
            BLOCK_G=block_g,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            VALUE_BLOCKS=value_blocks,
            PDL=pdl,
            **options,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
        combine_kernel[(value_blocks, heads, batch)](
            partial, top, mass, _bytes(only), _contiguous(sinks), out, splits,
            DV=value_dim,
            HAS_ONLY=only is not None,
            HAS_SINKS=sinks is not None,
            BLOCK_DV=block_dv,
            PDL=pdl,
            num_warps=2,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip


def _stages(wanted: int, tile_bytes: int, device: torch.device) -> int:
    """Software pipeline stages whose tiles fit in shared memory."""
    return max(1, min(wanted, _shared_memory(device) // tile_bytes))


def _fused_blocks(
    query: torch.Tensor, value_dim: int, estimator: str, block_g: int
) -> tuple[int, int, dict[str, int]]:
    """Columns of K and V handled at a time, and launch options, such that tiles fit in memory."""
    wide = query.dtype == torch.float32
    block_d = min(_block_of(query.shape[-1]), 32 if wide else 128)
    block_dv = min(triton.next_power_of_2(value_dim), 64 if wide else 256, 4096 // block_g)
    block_dv = max(block_dv, 16)
    if estimator != "dense":
        warps = FLASH_WARPS if block_g <= 16 else 8
        return block_d, block_dv, {"num_warps": warps, "num_stages": FLASH_STAGES}
    tile_bytes = DENSE_TILE * (query.shape[-1] + block_dv) * query.element_size()
    stages = _stages(DENSE_STAGES, tile_bytes, query.device)
    return block_d, block_dv, {"num_warps": DENSE_WARPS, "num_stages": stages}


def _split_tiles(length: int, tile: int, programs: int, device: torch.device) -> int:
    """Tiles of a split: a power of two that depends on the bucket of N, the layer's shape and the
    GPU, never on the batch, so that a row is computed alike alone and in a batch."""
    tiles = triton.next_power_of_2(triton.cdiv(length, tile))
    wanted = triton.next_power_of_2(triton.cdiv(SPLIT_WAVES * _processors(device), programs))
    return max(1, tiles // wanted)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that the tiles of a program may take, with room left for its reductions."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    # 99 KiB is what the smallest GPUs of the generations with asynchronous copies have.
    available = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return int(available) - 16 * 1024


@cache
def _dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the one it depends on has ended (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _device(tensor: torch.Tensor) -> "torch.cuda.device":
    """The CUDA device of a tensor as a context; without CUDA (the interpreter) it does nothing."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def _block_of_group(group: int) -> int:
    """Query heads of a KV head in one product."""
    return max(MIN_GROUP, triton.next_power_of_2(group))


def _block_of_samples(samples: int) -> tuple[int, int]:
    """Draws and warps of a program of pass 2: by the budget alone, so that a row is summed alike in
    any batch. Few draws want many short programs, many draws want throughput."""
    return (32, 4) if samples <= 128 else (64, 2)


def _block_of(dim: int) -> int:
    """Columns of K or V handled at a time: all of them up to 128, else an even division."""
    if dim <= 128:
        return max(16, triton.next_power_of_2(dim))
    return 128 if dim % 128 == 0 or dim % 64 else 64


def _alignment(tensor: torch.Tensor) -> int:
    """Elements, at most 16 bytes of them, that the start of every head of K or V is a multiple of."""
    align = 16 // tensor.element_size()
    offsets = [tensor.stride(i) for i in (0, 1) if tensor.shape[i] > 1]
    while align > 1 and any(offset % align for offset in offsets):
        align //= 2
    return align


def _exponent_scale(scaling: float, softcap: float | None) -> tuple[float, float]:
    """Scale and cap of base-2 scores, see `log2_weights`."""
    if softcap is None:
        return scaling * LOG2E, 0.0
    return scaling / softcap, softcap * LOG2E


def _visible(
    mask: torch.Tensor | None, batch: int, has_last: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask as bytes (B, N), 0 its stride where it is expanded, and its span, see `span_kernel`."""
    if mask is None:
        return None, None
    rows = mask.view(torch.uint8).expand(batch, 1, 1, -1)[:, 0, 0]
    span = torch.empty(batch, 2, dtype=torch.int32, device=mask.device)
    with _device(mask):
        span_kernel[(batch,)](
            rows, span, rows.shape[1], rows.stride(0),
            STRIDE_MN=rows.stride(1),
            HAS_LAST=has_last,
            BLOCK=4096,
            PDL=_dependent_launch(mask.device),
            num_warps=16,
        )  # fmt: skip
    return rows, span


def _mask_stride(rows: torch.Tensor | None, axis: int) -> int:
    return 0 if rows is None else rows.stride(axis)


def _bytes(rows: torch.Tensor | None) -> torch.Tensor | None:
    return None if rows is None else rows.contiguous().view(torch.uint8)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _per_row(values: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """int64 (B,) without gaps, from (B,) or one value for all rows."""
    return None if values is None else values.expand(batch).contiguous()
