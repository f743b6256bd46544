"""Pass 2: draw from the rounded weights of pass 1 and average the drawn rows of V, in O(samples).

A program owns BLOCK_S draws of one head. It turns the tiles' (top, total) into an integer prefix of
their masses in units of 2**-40 of the row's largest weight: exact sums in int64, so the prefix is
monotone, independent of order, and a tile without mass is never drawn. Each draw finds its tile by
comparing its point with that prefix, and its row by an exact integer prefix inside the one tile.
"""

# ruff: noqa: N803, SIM102, SIM108 (constants of a kernel are capitals, and a condition on one stands
# alone, so that the other side is not compiled; Triton has no conditional expression over two shapes)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..reference import TILE, length_of
from ..rng import Stream
from . import host
from .common import LOG2E, points_below, uniform, weight_units
from .launcher import Launcher, Layout
from .scores import PART, Weights

FEW_TILES, MANY_TILES = 64, 256  # tiles walked over at a time, by the length of the row
MERGE_CHUNKS = 16  # partial sums of a head that are added at a time
# Draws up to which a program takes 16; with more it takes 32, or 64 where there are sums of parts.
FEW_DRAWS = 128


@triton.jit
def _tiles(p_top, p_total, o_t, n_tiles):
    """(top, total) of tiles; a tile outside the row is one without mass."""
    b_top = tl.load(p_top + o_t, mask=o_t < n_tiles, other=float("-inf"))
    b_total = tl.load(p_total + o_t, mask=o_t < n_tiles, other=0)
    return b_top, b_total


@triton.jit
def _masses(b_top, b_total, level):
    """Masses of tiles in units of 2**-40 of the row's largest weight, int64."""
    # 2**17 = 2**40 / 2**23. A row with a NaN (an infinite top) is sorted out at the end.
    b_scale = tl.where(b_top < float("inf"), tl.exp2(b_top - level), 0.0)
    return (b_scale.to(tl.float64) * 131072.0 * b_total.to(tl.float64)).to(tl.int64)


@triton.jit
def _place(
    b_mass, carry, total, rate, grid_offset, b_point, samples, i_tile, b_start, b_stop,
    SYSTEMATIC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LOG2_BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Walk over BLOCK_T more tiles: (tiles passed, start and end of the tile, mass passed) of draws.

    A draw passes the tiles that end at or before its point. Systematic draws are consecutive integers
    from b_point on, and starts and ends are counted in draws; other points are in units of mass.
    """
    b_end = carry + tl.cumsum(b_mass, axis=0)
    carry += tl.sum(b_mass, axis=0)
    if SYSTEMATIC:
        b_reach = points_below(b_end.to(tl.float64) * rate, grid_offset).to(tl.int32)
        # All draws are used up where the mass is, whatever the product rounds to.
        b_end = tl.where(b_end == total, samples, b_reach)
        b_bin = tl.maximum(b_end - tl.min(b_point, axis=0), 0)
        b_passed = tl.histogram(tl.minimum(b_bin, BLOCK_S), 2 * BLOCK_S)
        b_passed = tl.gather(tl.cumsum(b_passed, axis=0), tl.arange(0, BLOCK_S), axis=0)
    else:
        b_passed = tl.zeros([BLOCK_S], tl.int32)
        for step in tl.static_range(LOG2_BLOCK_T, -1, -1):
            b_try = tl.minimum(b_passed + (1 << step), BLOCK_T)
            b_reach = tl.gather(b_end, b_try - 1, axis=0)
            b_passed = tl.where(b_reach <= b_point, b_try, b_passed)
    b_last = tl.gather(b_end, tl.maximum(b_passed - 1, 0), axis=0)
    b_next = tl.gather(b_end, tl.minimum(b_passed, BLOCK_T - 1), axis=0)
    b_start = tl.where(b_passed > 0, b_last, b_start)
    b_stop = tl.where(b_passed < BLOCK_T, tl.minimum(b_stop, b_next), b_stop)
    return i_tile + b_passed, b_start, b_stop, carry


@triton.jit
def _search(
    p_top, p_total, p_sinks, i_h, n_tiles, samples, seed, layer, head, position, k,
    HAS_SINKS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    GRID: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LOG2_BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The tile of every draw, its start and end as in `_place`, the point, and the row's mass and peak.

    Tiles are walked BLOCK_T at a time, the first of them kept in registers.
    """
    SYSTEMATIC: tl.constexpr = ESTIMATOR == "systematic"
    o_t = tl.arange(0, BLOCK_T)
    # Asked for first, since all else waits for them.
    b_top, b_total = _tiles(p_top, p_total, o_t, n_tiles)
    grid_offset = uniform(seed, layer, head, position, 0 * layer, GRID)
    point = tl.zeros([BLOCK_S], tl.float64)
    if not SYSTEMATIC:
        point = uniform(seed, layer, head, position, k, SAMPLE)
        if ESTIMATOR == "stratified":
            point = (k + point) / samples
            # Below one, 1 - 2**-53, where the sum above rounds to it.
            point = tl.minimum(point, 0.9999999999999999)

    # The row's largest exponent, then the masses of its tiles as an integer prefix.
    b_peak = b_top
    for t in range(BLOCK_T, n_tiles, BLOCK_T):
        b_more, _ = _tiles(p_top, p_total, t + o_t, n_tiles)
        b_peak = tl.maximum(b_peak, b_more)
    peak = tl.max(b_peak, axis=0)
    if HAS_SINKS:
        sink = tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        sink = tl.where(sink == sink, sink, float("inf"))
        peak = tl.maximum(peak, sink)
    level = tl.where(peak == float("-inf"), 0.0, peak)
    b_first = _masses(b_top, b_total, level)
    b_mass = b_first
    for t in range(BLOCK_T, n_tiles, BLOCK_T):
        b_top, b_total = _tiles(p_top, p_total, t + o_t, n_tiles)
        b_mass += _masses(b_top, b_total, level)
    total = tl.sum(b_mass, axis=0)
    if HAS_SINKS:
        # The sink is one more key behind the last tile, with a value of zero.
        sink = tl.where(sink < float("inf"), tl.exp2(sink - level), 0.0)
        total += (sink.to(tl.float64) * 1099511627776.0).to(tl.int64)
    whole = tl.maximum(total, 1).to(tl.float64)
    rate = samples / whole

    i_tile = tl.zeros([BLOCK_S], tl.int32)
    carry = tl.zeros([], tl.int64)
    if SYSTEMATIC:
        b_point = k
        b_start = tl.zeros([BLOCK_S], tl.int32)
        b_stop = tl.full([BLOCK_S], 2147483647, tl.int32)
    else:
        b_point = tl.minimum(tl.floor(point * whole).to(tl.int64), total - 1)
        b_start = tl.zeros([BLOCK_S], tl.int64)
        b_stop = tl.full([BLOCK_S], 9223372036854775807, tl.int64)
    i_tile, b_start, b_stop, carry = _place(
        b_first, carry, total, rate, grid_offset, b_point, samples, i_tile, b_start, b_stop,
        SYSTEMATIC, BLOCK_S, BLOCK_T, LOG2_BLOCK_T,
    )  # fmt: skip
    for t in range(BLOCK_T, n_tiles, BLOCK_T):
        b_top, b_total = _tiles(p_top, p_total, t + o_t, n_tiles)
        i_tile, b_start, b_stop, carry = _place(
            _masses(b_top, b_total, level), carry, total, rate, grid_offset, b_point, samples,
            i_tile, b_start, b_stop, SYSTEMATIC, BLOCK_S, BLOCK_T, LOG2_BLOCK_T,
        )  # fmt: skip
    return i_tile, b_start, b_stop, point, total, peak


@triton.jit(
    do_not_specialize=[
        "seed", "position", "layer", "head_offset", "samples", "N", "n_tiles",
        "stride_vb", "stride_vh",
    ]
)  # fmt: skip
def sample_kernel(
    p_value,  # (B, KVH, N, DV)
    p_span,  # (B, 2) int32, of `span_kernel`
    p_rows,  # (B, N) int32 or int64, the row of p_value that holds a key's value
    p_exact,  # (B,) uint8, rows that are not drawn from
    p_sinks,  # (KVH * G,) float32
    p_seed,  # (B,) int64
    p_position,  # (B,) int64
    p_stash,  # (B, KVH, n_tiles, G, TILE) fp16
    p_parts,  # (B, KVH, n_tiles, G, TILE // PART) int32, sums of PART weights
    p_top,  # (B, KVH * G, n_tiles) float32
    p_total,  # (B, KVH * G, n_tiles) int32
    p_done,  # (B, KVH * G) int32, zero
    p_partial,  # (B, KVH * G, chunks, DV) float32, scratch
    p_index,  # (B, KVH * G, samples) int64, the drawn keys; -1 for a sink
    p_out,  # (B, KVH * G, 1, DV)
    seed: tl.int64,
    position: tl.int64,
    layer: tl.int64,
    head_offset: tl.int64,
    samples: tl.int32,
    N: tl.int32,
    n_tiles: tl.int32,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    STRIDE_VN: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    HAS_SPAN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_EXACT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SEED: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    GRID: tl.constexpr,  # the streams of the counter RNG
    TILE_OFFSET: tl.constexpr,
    SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,  # keys that a prefix inside a tile first passes at a time
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LOG2_BLOCK_T: tl.constexpr,
    FEW_TILES: tl.constexpr,
    LOG2_FEW_TILES: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_C: tl.constexpr,  # chunks that the merge reads at a time
    PDL: tl.constexpr,
):
    """Draws of one chunk and head, and the sum of their value rows; grid (chunks, H, B)."""
    i_chunk, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks, heads = tl.num_programs(0), tl.num_programs(1)
    i_row = i_b * heads + i_h
    p_top += i_row * n_tiles
    p_total += i_row * n_tiles
    p_stash += ((i_row - i_h % G) * n_tiles + i_h % G) * TILE
    if PDL:
        tl.extra.cuda.gdc_wait()
    if HAS_EXACT:
        if tl.load(p_exact + i_b) != 0:
            return
    if HAS_SEED:
        seed = tl.load(p_seed + i_b)
    first = 0 * N
    if HAS_SPAN:
        first = tl.load(p_span + 2 * i_b)
    if HAS_POSITION:
        position = tl.load(p_position + i_b)
    elif HAS_SPAN:
        position = tl.load(p_span + 2 * i_b + 1).to(tl.int64)
    head = head_offset + i_h
    SYSTEMATIC: tl.constexpr = ESTIMATOR == "systematic"
    k = i_chunk * BLOCK_S + tl.arange(0, BLOCK_S)
    # A short row is walked in a short block (H100, 8k keys: 13.7 us against 14.9), and both walks are
    # compiled, so that a growing cache never compiles again.
    if n_tiles <= FEW_TILES:
        i_tile, b_start, b_stop, point, total, peak = _search(
            p_top, p_total, p_sinks, i_h, n_tiles, samples, seed, layer, head, position, k,
            HAS_SINKS, ESTIMATOR, GRID, SAMPLE, BLOCK_S, FEW_TILES, LOG2_FEW_TILES,
        )  # fmt: skip
    else:
        i_tile, b_start, b_stop, point, total, peak = _search(
            p_top, p_total, p_sinks, i_h, n_tiles, samples, seed, layer, head, position, k,
            HAS_SINKS, ESTIMATOR, GRID, SAMPLE, BLOCK_S, BLOCK_T, LOG2_BLOCK_T,
        )  # fmt: skip
    whole = tl.maximum(total, 1).to(tl.float64)
    # Nothing is read for the sink (all tiles passed) or where nothing has mass.
    keyed = (k < tl.where(total > 0, samples, 0)) & (i_tile < n_tiles)
    # The row inside the tile: an exact integer prefix over parts of it, then inside one part, so that a
    # draw's prefix takes 8 + 16 sums instead of 128. Without the sums that pass 1 may leave, they are
    # formed here, and the weights of the one part are read again, from L1.
    p_tile = p_stash + i_tile.to(tl.int64) * (G * TILE)
    o_r, o_p, o_part = tl.arange(0, TILE), tl.arange(0, PART), tl.arange(0, TILE // PART)
    if HAS_PARTS:
        p_parts += ((i_row - i_h % G) * n_tiles + i_h % G) * (TILE // PART)
        p_part = p_parts + i_tile.to(tl.int64) * (G * (TILE // PART))
        b_units = tl.load(p_part[:, None] + o_part[None, :], mask=keyed[:, None], other=0)
        b_whole = tl.maximum(tl.sum(b_units, axis=1), 1)
    else:
        b_whole = tl.load(p_total + i_tile, mask=keyed, other=1)
        b_weight = tl.load(p_tile[:, None] + o_r[None, :], mask=keyed[:, None], other=0.0)
    if SYSTEMATIC:
        within = uniform(seed, layer, head, position, i_tile, TILE_OFFSET)
        fraction = ((k - b_start).to(tl.float64) + within) / tl.maximum(b_stop - b_start, 1)
    else:
        width = tl.maximum(b_stop - b_start, 1).to(tl.float64)
        fraction = (point * whole - b_start.to(tl.float64)) / width
    b_unit = tl.minimum((fraction * b_whole).to(tl.int32), b_whole - 1)
    if not HAS_PARTS:
        b_units = weight_units(b_weight.to(tl.float32)).reshape(BLOCK_S, TILE // PART, PART)
        b_units = tl.sum(b_units, axis=2)
    b_end = tl.cumsum(b_units, axis=1)
    b_passed = b_end <= b_unit[:, None]
    b_row = tl.sum(b_passed.to(tl.int32), axis=1) * PART
    b_unit -= tl.max(tl.where(b_passed, b_end, 0), axis=1)
    b_weight = tl.load(
        p_tile[:, None] + b_row[:, None] + o_p[None, :], mask=keyed[:, None], other=0.0
    )
    b_end = tl.cumsum(weight_units(b_weight.to(tl.float32)), axis=1)
    b_row += tl.sum((b_end <= b_unit[:, None]).to(tl.int32), axis=1)
    b_key = tl.minimum(first + i_tile * TILE + b_row, N - 1).to(tl.int64)
    if HAS_INDEX:
        tl.store(p_index + i_row * samples + k, tl.where(keyed, b_key, -1), mask=k < samples)
    if HAS_ROWS:
        b_key = tl.load(p_rows + i_b * N + b_key, mask=keyed, other=0).to(tl.int64)

    spoiled = peak == float("inf")
    p_value += tl.multiple_of(i_b * stride_vb + (i_h // G) * stride_vh, ALIGN)
    o_d = tl.arange(0, BLOCK_DV)
    for d in tl.static_range(0, DV, BLOCK_DV):
        in_d = d + o_d < DV
        if DV % BLOCK_DV == 0:
            b_read = keyed[:, None]
        else:
            b_read = keyed[:, None] & in_d[None, :]
        b_value = tl.load(
            p_value + b_key[:, None] * STRIDE_VN + (d + o_d)[None, :], mask=b_read, other=0.0
        )
        b_out = tl.sum(b_value.to(tl.float32), axis=0)
        if chunks == 1:
            b_out = tl.where(spoiled, float("nan"), b_out / samples)
            tl.store(p_out + i_row * DV + d + o_d, b_out.to(p_out.dtype.element_ty), mask=in_d)
        else:
            tl.store(p_partial + (i_row * chunks + i_chunk) * DV + d + o_d, b_out, mask=in_d)
    if chunks > 1:
        # The last program of the head adds the chunks up, always in the same order.
        tl.debug_barrier()
        if tl.atomic_add(p_done + i_row, 1, sem="acq_rel") == chunks - 1:
            p_partial += i_row * chunks * DV
            o_c = tl.arange(0, BLOCK_C)
            for d in tl.static_range(0, DV, BLOCK_DV):
                in_d = d + o_d < DV
                b_out = tl.zeros([BLOCK_DV], tl.float32)
                for c in range(0, chunks, BLOCK_C):
                    b_part = tl.load(
                        p_partial + (c + o_c)[:, None] * DV + (d + o_d)[None, :],
                        mask=(c + o_c < chunks)[:, None] & in_d[None, :],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    b_out += tl.sum(b_part, axis=0)
                b_out = tl.where(spoiled, float("nan"), b_out / samples)
                tl.store(p_out + i_row * DV + d + o_d, b_out.to(p_out.dtype.element_ty), mask=in_d)


def sample(
    value: torch.Tensor,
    span: torch.Tensor | None,
    weights: Weights,
    out: torch.Tensor,
    *,
    samples: int,
    estimator: str,
    seed: int | torch.Tensor,
    layer: int,
    position: torch.Tensor | None,
    head_offset: int,
    sinks: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> None:
    """Pass 2, see `sample_kernel`: draws from the `weights` that `scores` left, into `out`."""
    batch, heads, _, value_dim = out.shape
    row_seed, seed = (
        (host.per_row(seed, batch), 0) if isinstance(seed, torch.Tensor) else (None, seed)
    )
    plan = sample_plan(
        out.device, value.dtype, batch, heads, value.shape[1], value_dim, value.stride(), samples,
        estimator, span is not None, rows is not None, exact is not None, sinks is not None,
        row_seed is not None, position is not None, index is not None, weights.parts is not None,
    )  # fmt: skip
    plan(
        value, span, host.contiguous(rows), host.as_bytes(exact), host.contiguous(sinks), row_seed,
        host.per_row(position, batch), weights, index, out, seed, layer, head_offset,
        length_of(value, rows),
    )  # fmt: skip


class SamplePlan(NamedTuple):
    """Pass 2 of steps that differ in addresses and length, in layer and seed alone."""

    launcher: Launcher
    device: torch.device
    grid: tuple[int, int, int]
    partial: Layout | None  # room for the sums of several chunks of draws
    samples: int
    strides: tuple[int, ...]

    def __call__(
        self,
        value: torch.Tensor,
        span: torch.Tensor | None,
        rows: torch.Tensor | None,
        exact: torch.Tensor | None,
        sinks: torch.Tensor | None,
        row_seed: torch.Tensor | None,
        position: torch.Tensor | None,
        weights: Weights,
        index: torch.Tensor | None,
        out: torch.Tensor,
        seed: int,
        layer: int,
        head_offset: int,
        length: int,
    ) -> None:
        """Launch pass 2 over `length` keys."""
        launcher, device, grid, layout, samples, strides = self
        stash, top, total, done, parts = weights
        partial = out if layout is None else layout.allocate(device)[0]
        launcher(
            grid,
            value, span, rows, exact, sinks, row_seed, position, stash, parts, top, total, done,
            partial, index, out, seed, length - 1, layer, head_offset, samples, length, top.shape[2],
            *strides,
        )  # fmt: skip


@lru_cache(host.KEPT)
def sample_plan(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv_heads: int,
    value_dim: int,
    strides: tuple[int, ...],
    samples: int,
    estimator: str,
    *has: bool,
) -> SamplePlan:
    """The plan of `sample`, of shapes and strides, and of whether it `has` a span, rows, exact rows,
    sinks, seeds, positions, an index and sums of parts."""
    launcher = _sample_launcher(
        device, samples <= FEW_DRAWS, estimator, heads // kv_heads, value_dim, strides[2],
        *has, host.alignment_of(dtype, batch, kv_heads, strides),
    )  # fmt: skip
    chunks = host.ceil_div(samples, launcher.constants["BLOCK_S"])
    partial = Layout(((batch, heads, chunks, value_dim), torch.float32)) if chunks > 1 else None
    return SamplePlan(launcher, device, (chunks, heads, batch), partial, samples, strides[:2])


@cache
def _sample_launcher(
    device: torch.device,
    few: bool,
    estimator: str,
    group: int,
    value_dim: int,
    stride_vn: int,
    has_span: bool,
    has_rows: bool,
    has_exact: bool,
    has_sinks: bool,
    has_seed: bool,
    has_position: bool,
    has_index: bool,
    has_parts: bool,
    align: int,
) -> Launcher:
    return Launcher(
        sample_kernel,
        device,
        STRIDE_VN=stride_vn,
        G=group,
        DV=value_dim,
        HAS_SPAN=has_span,
        HAS_ROWS=has_rows,
        HAS_EXACT=has_exact,
        HAS_SINKS=has_sinks,
        HAS_SEED=has_seed,
        HAS_POSITION=has_position,
        HAS_INDEX=has_index,
        HAS_PARTS=has_parts,
        ESTIMATOR=estimator,
        GRID=int(Stream.GRID),
        TILE_OFFSET=int(Stream.TILE),
        SAMPLE=int(Stream.SAMPLE),
        TILE=TILE,
        PART=PART,
        ALIGN=align,
        BLOCK_DV=host.block_of(value_dim),
        **_sample_blocks(few, has_parts),
        **host.dependent(device),
    )


@cache
def _sample_blocks(few: bool, parts: bool) -> dict[str, int]:
    """Draws of a program of pass 2, chunks merged and tiles walked at a time: by the budget alone, so
    that a row is summed alike in any batch.

    One warp needs no barrier between its steps, which wait for each other.
    """
    return {
        "BLOCK_S": 16 if few else 64 if parts else 32,
        "BLOCK_C": MERGE_CHUNKS // 2 if few else MERGE_CHUNKS,
        "BLOCK_T": MANY_TILES,
        "LOG2_BLOCK_T": MANY_TILES.bit_length() - 1,
        "FEW_TILES": FEW_TILES,
        "LOG2_FEW_TILES": FEW_TILES.bit_length() - 1,
        "num_warps": 1,
    }
