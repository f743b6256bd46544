"""One pass over K with a fixed budget of draws in every tile (S2ANTA-flash).

The keys are split as in `dense_kernel`: a program walks its tiles with a running maximum, draws n rows
of every tile from the tile's own softmax, and leaves an unnormalised (output, maximum, mass):

    o = sum_t mass_t / n * (sum of the rows drawn in t)  /  sum_t mass_t

Weights of a tile are rounded to multiples of 2**-23 of its largest, and mass_t is the sum of the
*rounded* weights, an exact uint32: the draws are unbiased for the rounded softmax, systematic ones to
within 2**-30 of a tile's mass. They are counted per row, and only rows with a count are loaded, for a
product with the counts.
"""

# ruff: noqa: N803, SIM102, SIM108 (constants of a kernel are capitals, and a condition on one stands
# alone, so that the other side is not compiled; Triton has no conditional expression over two shapes)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import cache

import torch
import triton
import triton.language as tl

from ..reference import FIXED_TILE
from ..rng import Stream
from . import host
from .common import log2_weights, row_offsets, uniform, weight_units
from .dense import combine, partials
from .launcher import Launcher

WARPS = 4
GROUP = 16  # query heads of a program at most


@triton.jit
def _log2(x):
    """floor(log2(x)) of an integer 1 <= x < 2**32, from the exponent of a float64."""
    return (x.to(tl.float64).to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1023


@triton.jit
def _steps(draws, b_whole, b_offset):
    """What `_draws_below` needs to know of a tile: its mass is draws << fine steps, at least 2**30."""
    fine = 30 - _log2(draws)
    steps = draws.to(tl.int64) << (32 + fine)
    b_shift = 31 - _log2(tl.maximum(b_whole, 1))
    b_wide = (tl.maximum(b_whole, 1) << b_shift.to(tl.uint32)).to(tl.int64)
    b_rate = (steps.to(tl.float64) / b_wide.to(tl.float64)).to(tl.int64)
    b_rate += (b_rate * b_wide < steps).to(tl.int64)  # rounded up: all draws lie below the mass
    one = (0 * draws + 1) << fine
    b_add = one - 1 - (b_offset * one.to(tl.float64)).to(tl.int32)
    return b_rate.to(tl.uint32), b_shift.to(tl.uint32), b_add.to(tl.uint32), fine.to(tl.uint32)


@triton.jit
def _draws_below(b_units, b_rate, b_shift, b_add, fine):
    """How many of the points (offset + j) / draws of a tile's mass lie below b_units of its weight.

    In 32-bit integers, 4 instructions a key: units are turned into steps, which moves a boundary
    between keys by less than one step, so by less than 2**-30 of the tile's mass.
    """
    return ((tl.umulhi(b_units << b_shift, b_rate) + b_add) >> fine).to(tl.int32)


@triton.jit
def _sum_of_rows(b_count, b_v, draws):
    """Counts times rows. bf16 holds integers exactly to 256: larger counts go in digit by digit."""
    b_sum = tl.dot((b_count & 255).to(b_v.dtype), b_v, input_precision="ieee")
    for digit in tl.static_range(
        1, 4
    ):  # a loop would keep that over the tiles from being pipelined
        if (draws >> (8 * digit)) > 0:
            b_digit = ((b_count >> (8 * digit)) & 255).to(b_v.dtype)
            b_sum += (256.0**digit) * tl.dot(b_digit, b_v, input_precision="ieee")
    return b_sum


@triton.jit(
    do_not_specialize=[
        "seed", "layer", "head_offset", "samples", "N", "split_tiles",
        "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_vb", "stride_vh", "stride_mb",
    ]
)  # fmt: skip
def flash_kernel(
    p_query,  # (B, KVH * G, 1, D)
    p_key,  # (B, KVH, N, D)
    p_value,  # (B, KVH, N, DV)
    p_mask,  # (B, N) uint8
    p_span,  # (B, 2) int32, of `span_kernel`
    p_only,  # (B,) uint8, zero for rows that are left alone
    p_seed,  # (B,) int64
    p_position,  # (B,) int64
    p_partial,  # (B, KVH * G, splits, DV) float32
    p_top,  # (B, KVH * G, splits) float32
    p_mass,  # (B, KVH * G, splits) float32
    scale: tl.float32,
    softcap: tl.float32,
    seed: tl.int64,
    layer: tl.int64,
    head_offset: tl.int64,
    samples: tl.int32,
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
    HAS_ONLY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SEED: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    FIXED_TILE: tl.constexpr,  # the streams of the counter RNG
    FIXED_SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One split of the keys for some heads of a group; grid (splits * VALUE_BLOCKS * GROUP_BLOCKS,
    KVH, B)."""
    i_split = tl.program_id(0) // (VALUE_BLOCKS * GROUP_BLOCKS)
    i_dv = tl.program_id(0) // GROUP_BLOCKS % VALUE_BLOCKS
    i_kv, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(0) // (VALUE_BLOCKS * GROUP_BLOCKS)
    o_t, o_d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    o_g = tl.program_id(0) % GROUP_BLOCKS * BLOCK_G + tl.arange(0, BLOCK_G)
    o_dv = i_dv * BLOCK_DV + tl.arange(0, BLOCK_DV)
    in_g = o_g < G
    i_head = i_b * (tl.num_programs(1) * G) + i_kv * G
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    if HAS_ONLY:
        if tl.load(p_only + i_b) == 0:
            return
    first = 0 * N
    last = N - 1
    if HAS_MASK:
        p_mask += i_b * stride_mb
        first = tl.load(p_span + 2 * i_b)
        last = tl.load(p_span + 2 * i_b + 1)
    if HAS_SEED:
        seed = tl.load(p_seed + i_b)
    position = last.to(tl.int64)
    if HAS_POSITION:
        position = tl.load(p_position + i_b)
    # ceil(samples / tiles), with the tiles from the first to the last visible key.
    tiles = tl.maximum((last - first) // TILE + 1, 1)
    draws = (samples + tiles - 1) // tiles
    head = head_offset + i_kv * G + o_g

    p_query += tl.multiple_of(i_b * stride_qb + i_kv * G * stride_qh, ALIGN_Q)
    o_query = tl.multiple_of(o_g * stride_qh, ALIGN_Q)[:, None] + o_d[None, :]
    p_key += tl.multiple_of(i_b * stride_kb + i_kv * stride_kh, ALIGN_K)
    p_value += tl.multiple_of(i_b * stride_vb + i_kv * stride_vh, ALIGN_V)
    o_key = row_offsets(o_t, STRIDE_KN)[:, None] + o_d[None, :]
    o_value = row_offsets(o_t, STRIDE_VN)[:, None] + o_dv[None, :]

    if D <= BLOCK_D:
        b_q = tl.load(p_query + o_query, mask=in_g[:, None] & (o_d < D)[None, :], other=0.0)

    b_out = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    b_top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_mass = tl.zeros([BLOCK_G], tl.float32)
    if HAS_MASK:  # empty slots of a cache are nobody's work
        split_tiles = (tiles + splits - 1) // splits
    tile_start = i_split * split_tiles
    tile_stop = min(tile_start + split_tiles, tiles)
    for i_tile in tl.range(tile_start, tile_stop):
        start = first + i_tile * TILE
        visible = o_t < N - start
        if HAS_MASK:
            o_mask = (start + o_t).to(tl.int64) * STRIDE_MN
            visible = visible & (tl.load(p_mask + o_mask, mask=visible, other=0) != 0)
        p_tile = p_key + start.to(tl.int64) * STRIDE_KN
        b_dot = tl.zeros([BLOCK_G, TILE], tl.float32)
        for d in tl.static_range(0, D, BLOCK_D):
            in_d = d + o_d < D
            if D > BLOCK_D:
                b_q = tl.load(p_query + o_query + d, mask=in_g[:, None] & in_d[None, :], other=0.0)
            if D % BLOCK_D == 0:
                b_seen = visible[:, None]
            else:
                b_seen = visible[:, None] & in_d[None, :]
            b_k = tl.load(p_tile + o_key + d, mask=b_seen, other=0.0, eviction_policy="evict_first")
            b_dot = tl.dot(b_q, tl.trans(b_k), b_dot, input_precision="ieee")
        b_s = log2_weights(b_dot, visible[None, :], scale, softcap, HAS_SOFTCAP)

        b_tile_top = tl.max(b_s, axis=1)
        b_tile_level = tl.where(b_tile_top == float("-inf"), 0.0, b_tile_top)
        b_weight = weight_units(tl.exp2(b_s - b_tile_level[:, None])).to(tl.uint32)  # [G, TILE]
        b_prefix = tl.cumsum(b_weight, axis=1)
        b_whole = tl.sum(b_weight, axis=1)
        b_before = b_prefix - b_weight
        if ESTIMATOR == "systematic":
            b_offset = uniform(seed, layer, head, position, 0 * o_g + i_tile, FIXED_TILE)
            b_rate, b_shift, b_add, fine = _steps(draws, b_whole, b_offset)
            b_rate, b_shift, b_add = b_rate[:, None], b_shift[:, None], b_add[:, None]
            b_count = _draws_below(b_prefix, b_rate, b_shift, b_add, fine)
            b_count -= _draws_below(b_before, b_rate, b_shift, b_add, fine)
        else:
            b_count = tl.zeros([BLOCK_G, TILE], tl.int32)
            for j in range(draws):
                i_draw = tl.zeros([BLOCK_G], tl.int64) + i_tile * draws.to(tl.int64) + j
                b_point = uniform(seed, layer, head, position, i_draw, FIXED_SAMPLE)
                if ESTIMATOR == "stratified":
                    b_point = (j + b_point) / draws
                b_point = tl.minimum((b_point * b_whole).to(tl.uint32), b_whole - 1)[:, None]
                b_count += ((b_before <= b_point) & (b_point < b_prefix)).to(tl.int32)
        b_count = tl.where(in_g[:, None] & visible[None, :], b_count, 0)
        b_read = visible & (tl.max(b_count, axis=0) > 0)
        if DV % BLOCK_DV == 0:
            b_rows = b_read[:, None]
        else:
            b_rows = b_read[:, None] & (o_dv < DV)[None, :]
        p_rows = p_value + start.to(tl.int64) * STRIDE_VN
        b_v = tl.load(p_rows + o_value, mask=b_rows, other=0.0, eviction_policy="evict_first")
        b_drawn = _sum_of_rows(b_count, b_v, draws)

        b_new = tl.maximum(b_top, b_tile_top)
        b_level = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_rescale = tl.exp2(b_top - b_level)
        b_gain = tl.exp2(b_tile_top - b_level) * (b_whole.to(tl.float32) * 1.1920928955078125e-07)
        b_out = b_out * b_rescale[:, None] + b_drawn * (b_gain / draws)[:, None]
        b_mass = b_mass * b_rescale + b_gain
        b_top = b_new

    o_split = (i_head + o_g) * splits + i_split
    in_out = in_g[:, None] & (o_dv < DV)[None, :]
    tl.store(p_partial + o_split[:, None] * DV + o_dv[None, :], b_out, mask=in_out)
    if i_dv == 0:
        tl.store(p_top + o_split, b_top, mask=in_g)
        tl.store(p_mass + o_split, b_mass, mask=in_g)


def flash(
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
    """A fixed budget per tile for the rows of `out` that `only`, bool (B,), names; None for all."""
    batch, heads, _, dim = query.shape
    kv_heads, length, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    group, device = heads // kv_heads, query.device
    stride_kb, stride_kh, stride_kn, _ = key.stride()
    stride_vb, stride_vh, stride_vn, _ = value.stride()
    row_seed, seed = (
        (host.per_row(seed, batch), 0) if isinstance(seed, torch.Tensor) else (None, seed)
    )
    block_g = min(host.block_of_group(group), GROUP)
    block_d, block_dv = host.one_pass_blocks(query.dtype, dim, value_dim, block_g)
    value_blocks, group_blocks = host.ceil_div(value_dim, block_dv), host.ceil_div(group, block_g)
    most = host.most_splits(kv_heads * value_blocks * group_blocks, device)
    split_tiles, splits = host.splits_of(length, FIXED_TILE, most)
    partial, top, mass = partials(batch, heads, splits, value_dim).allocate(device)
    launcher = _flash_launcher(
        device, estimator, group, dim, value_dim, stride_kn, stride_vn, host.mask_stride(mask, 1),
        mask is not None, only is not None, softcap is not None, row_seed is not None,
        position is not None, host.alignment(query), host.alignment(key), host.alignment(value),
        block_g, block_d, block_dv, value_blocks, group_blocks,
    )  # fmt: skip
    launcher(
        (splits * value_blocks * group_blocks, kv_heads, batch),
        query, key, value, mask, span, host.as_bytes(only), row_seed, host.per_row(position, batch),
        partial, top, mass, *host.exponent_scale(scaling, softcap), seed, layer, head_offset, samples,
        length, split_tiles, query.stride(0), query.stride(1), stride_kb, stride_kh, stride_vb,
        stride_vh, host.mask_stride(mask, 0),
    )  # fmt: skip
    combine(partial, top, mass, out, splits, most, sinks, only)


@cache
def _flash_launcher(
    device: torch.device,
    estimator: str,
    group: int,
    dim: int,
    value_dim: int,
    stride_kn: int,
    stride_vn: int,
    stride_mn: int,
    has_mask: bool,
    has_only: bool,
    has_softcap: bool,
    has_seed: bool,
    has_position: bool,
    align_q: int,
    align_k: int,
    align_v: int,
    block_g: int,
    block_d: int,
    block_dv: int,
    value_blocks: int,
    group_blocks: int,
) -> Launcher:
    return Launcher(
        flash_kernel,
        device,
        STRIDE_KN=stride_kn,
        STRIDE_VN=stride_vn,
        STRIDE_MN=stride_mn,
        G=group,
        D=dim,
        DV=value_dim,
        HAS_MASK=has_mask,
        HAS_ONLY=has_only,
        HAS_SOFTCAP=has_softcap,
        HAS_SEED=has_seed,
        HAS_POSITION=has_position,
        ESTIMATOR=estimator,
        FIXED_TILE=int(Stream.FIXED_TILE),
        FIXED_SAMPLE=int(Stream.FIXED_SAMPLE),
        TILE=FIXED_TILE,
        ALIGN_Q=align_q,
        ALIGN_K=align_k,
        ALIGN_V=align_v,
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        VALUE_BLOCKS=value_blocks,
        GROUP_BLOCKS=group_blocks,
        num_warps=WARPS,
        num_stages=1,
        **host.dependent(device),
    )
