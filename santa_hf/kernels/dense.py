"""Exact attention in one pass over K and V (flash decoding), and the merge of its splits.

The keys are split: a program walks its tiles with a running maximum and leaves an unnormalised
(output, maximum, mass), and `combine_kernel` merges the splits of a head, always in the same order.
"""

# ruff: noqa: N803, SIM102 (constants of a kernel are capitals, and a condition on one stands alone, so
# that the other side is not compiled)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..reference import length_of
from . import host
from .common import LOG2E, log2_weights, row_offsets
from .launcher import Launcher, Layout, Part

DENSE_TILE = 128
DENSE_STAGES = 2
DENSE_WARPS = 8
COMBINE_SPLITS, COMBINE_COLUMNS = 128, 32  # splits at a time at most, columns of V at least
COMBINE_SIZE, COMBINE_WARPS = 512, 1  # sums of a program


@triton.jit
def _walk(
    p_query,  # of the group's first head
    p_key,  # of the KV head
    p_value,
    p_mask,  # of the row
    p_rows,  # of the row
    o_query,  # (BLOCK_G, BLOCK_D)
    o_dv,  # (BLOCK_DV,)
    first,  # key of tile 0
    stop,  # key behind the last
    tile_start,
    tile_stop,
    scale,
    softcap,
    STRIDE_KN: tl.constexpr,
    STRIDE_VN: tl.constexpr,
    STRIDE_MN: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SKIP_HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Unnormalised output (BLOCK_G, BLOCK_DV), maximum and mass (BLOCK_G,) of some tiles of the keys.

    Rows of V that the mask hides are loaded and count zero times, which makes the output NaN where one
    holds a NaN or an infinity; with SKIP_HIDDEN they are not loaded, and nothing is loaded ahead.
    """
    o_t, o_g, o_d = tl.arange(0, TILE), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    o_key = row_offsets(o_t, STRIDE_KN)[:, None] + o_d[None, :]
    o_value = row_offsets(o_t, STRIDE_VN)[:, None] + o_dv[None, :]
    if D <= BLOCK_D:
        b_q = tl.load(p_query + o_query, mask=(o_g < G)[:, None] & (o_d < D)[None, :], other=0.0)

    b_out = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    b_top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_mass = tl.zeros([BLOCK_G], tl.float32)
    for i_tile in tl.range(tile_start, tile_stop, num_stages=1 if SKIP_HIDDEN else None):
        n = first + i_tile * TILE
        inside = o_t < stop - n
        visible = inside
        if HAS_MASK:
            o_mask = (n + o_t).to(tl.int64) * STRIDE_MN
            visible = inside & (tl.load(p_mask + o_mask, mask=inside, other=0) != 0)
        if HAS_ROWS:
            o_row = tl.load(p_rows + n + o_t, mask=inside, other=0).to(tl.int64)[:, None]
            p_k = p_key + o_row * STRIDE_KN + o_d[None, :]
            p_v = p_value + o_row * STRIDE_VN + o_dv[None, :]
        else:
            p_k = p_key + n.to(tl.int64) * STRIDE_KN + o_key
            p_v = p_value + n.to(tl.int64) * STRIDE_VN + o_value
        b_dot = tl.zeros([BLOCK_G, TILE], tl.float32)
        for d in tl.static_range(0, D, BLOCK_D):
            if D > BLOCK_D:
                in_d = d + o_d < D
                b_q = tl.load(
                    p_query + o_query + d, mask=(o_g < G)[:, None] & in_d[None, :], other=0.0
                )
            if D % BLOCK_D == 0:
                b_k = tl.load(
                    p_k + d, mask=inside[:, None], other=0.0, eviction_policy="evict_first"
                )
            else:
                in_d = d + o_d < D
                b_k = tl.load(
                    p_k + d,
                    mask=inside[:, None] & in_d[None, :],
                    other=0.0,
                    eviction_policy="evict_first",
                )
            b_dot = tl.dot(b_q, tl.trans(b_k), b_dot, input_precision="ieee")
        b_s = log2_weights(b_dot, visible[None, :], scale, softcap, HAS_SOFTCAP)  # [G, TILE]

        b_new = tl.maximum(b_top, tl.max(b_s, axis=1))
        b_level = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_rescale = tl.exp2(b_top - b_level)
        b_rows = inside[:, None]
        if SKIP_HIDDEN:
            b_rows = visible[:, None]
        if DV % BLOCK_DV != 0:
            b_rows = b_rows & (o_dv < DV)[None, :]
        b_v = tl.load(p_v, mask=b_rows, other=0.0, eviction_policy="evict_first")
        b_p = tl.exp2(b_s - b_level[:, None])
        b_out = b_out * b_rescale[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision="ieee")
        b_mass = b_mass * b_rescale + tl.sum(b_p, axis=1)
        b_top = b_new
    return b_out, b_top, b_mass


@triton.jit(
    do_not_specialize=[
        "N", "split_tiles",
        "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh", "stride_mb",
    ]
)  # fmt: skip
def dense_kernel(
    p_query,  # (B, KVH * G, 1, D)
    p_key,  # (B, KVH, N, D)
    p_value,  # (B, KVH, N, DV)
    p_mask,  # (B, N) uint8
    p_span,  # (B, 2) int32, of `span_kernel`
    p_rows,  # (B, N) int32 or int64, the row of p_key and p_value that holds a key
    p_only,  # (B,) uint8, zero for rows that are left alone
    p_partial,  # (B, KVH * G, splits, DV) float32
    p_top,  # (B, KVH * G, splits) float32
    p_mass,  # (B, KVH * G, splits) float32
    scale: tl.float32,
    softcap: tl.float32,
    N: tl.int32,
    split_tiles: tl.int32,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_mb: tl.int64,
    STRIDE_KN: tl.constexpr,
    STRIDE_VN: tl.constexpr,
    STRIDE_MN: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_ONLY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One split of the keys for a group of query heads; grid (splits * VALUE_BLOCKS, KVH, B)."""
    i_split, i_dv = tl.program_id(0) // VALUE_BLOCKS, tl.program_id(0) % VALUE_BLOCKS
    i_kv, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(0) // VALUE_BLOCKS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    o_g, o_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    o_dv = i_dv * BLOCK_DV + tl.arange(0, BLOCK_DV)
    i_head = i_b * (tl.num_programs(1) * G) + i_kv * G

    if PDL:
        tl.extra.cuda.gdc_wait()
    if HAS_ONLY:
        if tl.load(p_only + i_b) == 0:
            return
    first, stop = 0 * N, N
    if HAS_MASK:
        p_mask += i_b * stride_mb
        first = tl.load(p_span + 2 * i_b)
        stop = tl.load(p_span + 2 * i_b + 1) + 1
    tiles = (stop - first + TILE - 1) // TILE
    if HAS_MASK:  # empty slots of a cache are nobody's work
        split_tiles = tl.maximum((tiles + splits - 1) // splits, 1)
    tile_start = i_split * split_tiles
    tile_stop = min(tile_start + split_tiles, tiles)
    if HAS_ROWS:
        p_rows += i_b * N

    p_query += tl.multiple_of(i_b * stride_qb + i_kv * G * stride_qh, ALIGN_Q)
    o_query = tl.multiple_of(o_g * stride_qh, ALIGN_Q)[:, None] + o_d[None, :]
    p_key += tl.multiple_of(i_b * stride_kb + i_kv * stride_kh, ALIGN_K)
    p_value += tl.multiple_of(i_b * stride_vb + i_kv * stride_vh, ALIGN_V)
    b_out, b_top, b_mass = _walk(
        p_query, p_key, p_value, p_mask, p_rows, o_query, o_dv, first, stop, tile_start, tile_stop,
        scale, softcap, STRIDE_KN, STRIDE_VN, STRIDE_MN, G, D, DV, HAS_MASK, HAS_ROWS, HAS_SOFTCAP,
        False, TILE, BLOCK_G, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    if HAS_MASK:
        # A load that waits for the mask is not pipelined, and zeroing rows afterwards takes them through
        # registers (H100, 32k keys: 126 and 75 us against 55), so that is for a hidden NaN alone.
        if tl.max((b_out != b_out).to(tl.int32)) != 0:
            b_out, b_top, b_mass = _walk(
                p_query, p_key, p_value, p_mask, p_rows, o_query, o_dv, first, stop, tile_start,
                tile_stop, scale, softcap, STRIDE_KN, STRIDE_VN, STRIDE_MN, G, D, DV, HAS_MASK, HAS_ROWS,
                HAS_SOFTCAP, True, TILE, BLOCK_G, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    o_split = (i_head + o_g) * splits + i_split
    in_out = (o_g < G)[:, None] & (o_dv < DV)[None, :]
    tl.store(p_partial + o_split[:, None] * DV + o_dv[None, :], b_out, mask=in_out)
    if i_dv == 0:
        tl.store(p_top + o_split, b_top, mask=o_g < G)
        tl.store(p_mass + o_split, b_mass, mask=o_g < G)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    p_partial,  # (B, H, splits, DV) float32
    p_top,  # (B, H, splits) float32
    p_mass,  # (B, H, splits) float32
    p_only,  # (B,) uint8, zero for rows that are left alone
    p_sinks,  # (H,) float32
    p_out,  # (B, H, 1, DV)
    splits: tl.int32,
    DV: tl.constexpr,
    HAS_ONLY: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the splits of one head, always in the same order; grid (VALUE_BLOCKS, H, B)."""
    i_dv, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_row = i_b * tl.num_programs(1) + i_h
    o_d = i_dv * BLOCK_DV + tl.arange(0, BLOCK_DV)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if HAS_ONLY:
        if tl.load(p_only + i_b) == 0:
            return
    p_top += i_row * splits
    p_mass += i_row * splits
    p_partial += i_row * splits * DV
    # Maxima and partial outputs are asked for together: one wait for every BLOCK_S splits.
    o_s = tl.arange(0, BLOCK_S)
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.zeros([], tl.float32)
    if HAS_SINKS:
        top = tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        mass = tl.where(top == float("-inf"), 0.0, mass + 1.0)
    b_out = tl.zeros([BLOCK_DV], tl.float32)
    for s in range(0, splits, BLOCK_S):
        in_s = s + o_s < splits
        b_top = tl.load(p_top + s + o_s, mask=in_s, other=float("-inf"))
        b_mass = tl.load(p_mass + s + o_s, mask=in_s, other=0.0)
        o_part = (s + o_s)[:, None] * DV + o_d[None, :]
        b_part = tl.load(p_partial + o_part, mask=in_s[:, None] & (o_d < DV)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(b_top, axis=0))
        level = tl.where(new == float("-inf"), 0.0, new)
        b_scale = tl.exp2(b_top - level)
        rescale = tl.exp2(top - level)
        b_out = b_out * rescale + tl.sum(b_part * b_scale[:, None], axis=0)
        mass = mass * rescale + tl.sum(b_mass * b_scale, axis=0)
        top = new
    b_out = tl.where(mass == 0.0, 0.0, b_out / mass)
    tl.store(p_out + i_row * DV + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < DV)


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    mask: torch.Tensor | None,
    span: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    only: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    """Exact attention for the rows of `out` that `only`, bool (B,), names; None for all."""
    plan = dense_plan(
        query.device, query.dtype, query.shape, query.stride(), key.shape[1], key.stride(),
        value.shape[3], value.stride(), scaling, softcap, None if mask is None else mask.stride(1),
        rows is not None, only is not None, sinks is not None,
    )  # fmt: skip
    plan(
        query, key, value, mask, span, host.contiguous(rows), host.as_bytes(only),
        host.contiguous(sinks), out, length_of(key, rows),
    )  # fmt: skip


class DensePlan(NamedTuple):
    """Exact attention of steps that differ in addresses and length alone."""

    launcher: Launcher
    merge: Launcher
    device: torch.device
    shape: tuple[int, int, int, int]  # B, H, KVH, Dv
    value_blocks: int
    most: int  # splits of a long row
    scale: tuple[float, float]
    strides: tuple[int, ...]

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        span: torch.Tensor | None,
        rows: torch.Tensor | None,
        only: torch.Tensor | None,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        length: int,
    ) -> None:
        """Launch both kernels over `length` keys."""
        launcher, merge, device, shape, value_blocks, most, scale, strides = self
        batch, heads, kv_heads, value_dim = shape
        split_tiles, splits = host.splits_of(length, DENSE_TILE, most)
        partial, top, mass = partials(batch, heads, splits, value_dim).allocate(device)
        launcher(
            (splits * value_blocks, kv_heads, batch),
            query, key, value, mask, span, rows, only, partial, top, mass, *scale, length,
            split_tiles, *strides, host.mask_stride(mask, 0),
        )  # fmt: skip
        _merge(merge, partial, top, mass, only, sinks, out, splits)


@lru_cache(host.KEPT)
def dense_plan(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    kv_heads: int,
    key_strides: tuple[int, ...],
    value_dim: int,
    value_strides: tuple[int, ...],
    scaling: float,
    softcap: float | None,
    stride_mn: int | None,
    has_rows: bool,
    has_only: bool,
    has_sinks: bool,
) -> DensePlan:
    """The plan of `dense`, of shapes and strides, and of which pointers there are."""
    batch, heads, _, dim = shape
    block_g = host.block_of_group(heads // kv_heads)
    block_d, block_dv = host.one_pass_blocks(dtype, dim, value_dim, block_g)
    tile_bytes = DENSE_TILE * (dim + block_dv) * dtype.itemsize
    value_blocks = host.ceil_div(value_dim, block_dv)
    most = host.most_splits(kv_heads * value_blocks, device)
    launcher = _dense_launcher(
        device, heads // kv_heads, dim, value_dim, key_strides[2], value_strides[2],
        stride_mn or 0, stride_mn is not None, has_rows, has_only, softcap is not None,
        host.alignment_of(dtype, batch, heads, strides),
        host.alignment_of(dtype, batch, kv_heads, key_strides),
        host.alignment_of(dtype, batch, kv_heads, value_strides), block_g, block_d, block_dv,
        value_blocks, _stages(DENSE_STAGES, tile_bytes, device),
    )  # fmt: skip
    merge = _combine_launcher(device, value_dim, most, has_only, has_sinks)
    scalars = (*strides[:2], *key_strides[:2], *value_strides[:2])
    scale = host.exponent_scale(scaling, softcap)
    rows = batch, heads, kv_heads, value_dim
    return DensePlan(launcher, merge, device, rows, value_blocks, most, scale, scalars)


@cache
def _dense_launcher(
    device: torch.device,
    group: int,
    dim: int,
    value_dim: int,
    stride_kn: int,
    stride_vn: int,
    stride_mn: int,
    has_mask: bool,
    has_rows: bool,
    has_only: bool,
    has_softcap: bool,
    align_q: int,
    align_k: int,
    align_v: int,
    block_g: int,
    block_d: int,
    block_dv: int,
    value_blocks: int,
    stages: int,
) -> Launcher:
    return Launcher(
        dense_kernel,
        device,
        STRIDE_KN=stride_kn,
        STRIDE_VN=stride_vn,
        STRIDE_MN=stride_mn,
        G=group,
        D=dim,
        DV=value_dim,
        HAS_MASK=has_mask,
        HAS_ROWS=has_rows,
        HAS_ONLY=has_only,
        HAS_SOFTCAP=has_softcap,
        TILE=DENSE_TILE,
        ALIGN_Q=align_q,
        ALIGN_K=align_k,
        ALIGN_V=align_v,
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        VALUE_BLOCKS=value_blocks,
        num_warps=DENSE_WARPS,
        num_stages=stages,
        **host.dependent(device),
    )


def _stages(wanted: int, tile_bytes: int, device: torch.device) -> int:
    """Software pipeline stages whose tiles fit in shared memory."""
    return max(1, min(wanted, host.shared_memory(device) // tile_bytes))


@lru_cache(host.KEPT)
def partials(batch: int, heads: int, splits: int, value_dim: int) -> Layout:
    """Room for unnormalised outputs (B, H, splits, Dv), their maxima and their masses (B, H, splits)."""
    rows = batch, heads, splits
    return Layout(((*rows, value_dim), torch.float32), (rows, torch.float32), (rows, torch.float32))


def combine(
    partial: Part,
    top: Part,
    mass: Part,
    out: torch.Tensor,
    splits: int,
    most: int,
    sinks: torch.Tensor | None,
    only: torch.Tensor | None,
) -> None:
    """Merge splits, see `combine_kernel`; `most` is how many there would be of a long row."""
    launcher = _combine_launcher(
        out.device, out.shape[3], most, only is not None, sinks is not None
    )
    rows = host.as_bytes(only)
    _merge(launcher, partial, top, mass, rows, host.contiguous(sinks), out, splits)


def _merge(
    launcher: Launcher,
    partial: Part,
    top: Part,
    mass: Part,
    only: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    splits: int,
) -> None:
    batch, heads, _, value_dim = out.shape
    launcher(
        (host.ceil_div(value_dim, launcher.constants["BLOCK_DV"]), heads, batch),
        partial, top, mass, only, sinks, out, splits,
    )  # fmt: skip


@cache
def _combine_launcher(
    device: torch.device, value_dim: int, most: int, has_only: bool, has_sinks: bool
) -> Launcher:
    block_s = min(triton.next_power_of_2(most), COMBINE_SPLITS)
    block_dv = min(triton.next_power_of_2(value_dim), max(COMBINE_COLUMNS, COMBINE_SIZE // block_s))
    return Launcher(
        combine_kernel,
        device,
        DV=value_dim,
        HAS_ONLY=has_only,
        HAS_SINKS=has_sinks,
        BLOCK_S=block_s,
        BLOCK_DV=block_dv,
        num_warps=COMBINE_WARPS,
        **host.dependent(device),
    )
