"""What the host sides of the kernels share: sizes of blocks, what a GPU has, masks as bytes.

Choices here and beside the kernels were measured on an H100, see eval/bench/results/kernels.md. None of
them changes a draw. Launchers keep them: a change at run time comes too late for shapes that have run.
"""

from functools import cache

import torch
import triton

from ..shared import once
from .common import LOG2E, span_kernel
from .launcher import Launcher

MIN_GROUP = 4  # rows that a group of query heads is padded to
SPLIT_WAVES = 1  # programs a multiprocessor that the splits of one row aim at
# Entries of each cache of what follows from shapes and strides. A model needs a few; a cache that is
# copied at every step, whose strides grow with it, adds one or two a step.
KEPT = 1024


def visible(
    mask: torch.Tensor | None, batch: int, has_last: bool
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """The mask as bytes, see `mask_rows`, and its span, see `span_kernel`."""
    if mask is None:
        return None, None
    return once(mask, ("span", batch, has_last), lambda: _visible(mask, batch, has_last))


def _visible(mask: torch.Tensor, batch: int, has_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows = mask_rows(mask, batch)
    span = torch.empty((batch, 2), dtype=torch.int32, device=mask.device)
    launcher = _span_launcher(mask.device, rows.stride(1), has_last)
    launcher((batch,), rows, span, rows.shape[1], rows.stride(0))
    return rows, span


def mask_rows(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """A mask bool (B or 1, 1, 1, N) as bytes (B, N), of stride 0 where it has one row."""
    # Of mask.data: a mask that keeps its rows, and they it, would never be freed.
    row_stride = 0 if mask.shape[0] == 1 else mask.stride(0)
    rows = mask.data.view(torch.uint8)
    return rows.as_strided((batch, mask.shape[3]), (row_stride, mask.stride(3)))


@cache
def _span_launcher(device: torch.device, stride_mn: int, has_last: bool) -> Launcher:
    return Launcher(
        span_kernel,
        device,
        STRIDE_MN=stride_mn,
        HAS_LAST=has_last,
        BLOCK=4096,
        PDL=dependent(device)["PDL"],
        num_warps=16,
    )


def mask_stride(rows: torch.Tensor | None, axis: int) -> int:
    """Stride of a mask as bytes (B, N), 0 of none."""
    return 0 if rows is None else rows.stride(axis)


def as_bytes(rows: torch.Tensor | None) -> torch.Tensor | None:
    """bool (B,) as Triton takes it."""
    return None if rows is None else rows.contiguous().view(torch.uint8)


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor without gaps, if there is one."""
    return None if tensor is None else tensor.contiguous()


def per_row(values: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """int64 (B,) without gaps, from (B,) or one value for all rows."""
    if values is None:
        return None
    return (values if values.shape == (batch,) else values.expand(batch)).contiguous()


def alignment(tensor: torch.Tensor) -> int:
    """Elements, at most 16 bytes of them, that the start of every head of a query, of K or of V is a
    multiple of."""
    batch, heads, *_ = tensor.shape
    return alignment_of(tensor.dtype, batch, heads, tensor.stride())


def alignment_of(dtype: torch.dtype, batch: int, heads: int, strides: tuple[int, ...]) -> int:
    """`alignment` of a tensor (batch, heads, ...)."""
    offset = 16 // dtype.itemsize
    if batch > 1:
        offset |= strides[0]
    if heads > 1:
        offset |= strides[1]
    return offset & -offset  # the lowest bit set in any of them


def exponent_scale(scaling: float, softcap: float | None) -> tuple[float, float]:
    """Scale and cap of base-2 scores, see `log2_weights`."""
    if softcap is None:
        return scaling * LOG2E.value, 0.0
    return scaling / softcap, softcap * LOG2E.value


@cache
def block_of(dim: int) -> int:
    """Columns of K or V handled at a time: all of them up to 128, else an even division."""
    if dim <= 128:
        return max(16, triton.next_power_of_2(dim))
    return 128 if dim % 128 == 0 or dim % 64 else 64


@cache
def block_of_group(group: int) -> int:
    """Query heads of a KV head in one product."""
    return max(MIN_GROUP, triton.next_power_of_2(group))


@cache
def one_pass_blocks(dtype: torch.dtype, dim: int, value_dim: int, block_g: int) -> tuple[int, int]:
    """Columns of K and V handled at a time, such that tiles fit in memory."""
    wide = dtype == torch.float32
    block_d = min(block_of(dim), 32 if wide else 128)
    block_dv = min(triton.next_power_of_2(value_dim), 64 if wide else 256, 4096 // block_g)
    return block_d, max(block_dv, 16)


@cache
def most_splits(programs: int, device: torch.device) -> int:
    """Splits of a long row, with `programs` for each: by the layer's shape and the GPU, never by the
    batch, so that a row is computed alike alone and in a batch."""
    return triton.next_power_of_2(ceil_div(SPLIT_WAVES * processors(device), programs))


def splits_of(length: int, tile: int, most: int) -> tuple[int, int]:
    """Tiles of a split, and splits, at most `most`, of a row of `length` keys."""
    tiles = ceil_div(length, tile)
    split_tiles = ceil_div(tiles, most)
    return split_tiles, ceil_div(tiles, split_tiles)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that the tiles of a program may take, with room left for its reductions."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    # 99 KiB is what the smallest GPUs of the generations with asynchronous copies have.
    available = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return int(available) - 16 * 1024


@cache
def dependent(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that may be launched before the one it depends on has ended (Hopper and
    later): it waits on the device before it reads anything."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def ceil_div(a: int, b: int) -> int:
    """Triton's own, made for compiled code, costs the host more than a microsecond."""
    return -(-a // b)
