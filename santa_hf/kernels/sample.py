"""Pass 2: draw from the rounded weights of pass 1 and average the drawn rows of V, in O(samples).

A program owns BLOCK_S draws of one head. It turns the tiles' (top, total) into an integer prefix of
their masses in units of 2**-40 of the row's largest weight: exact sums in int64, so the prefix is
monotone, independent of order, and a tile without mass is never drawn. Each draw finds its tile by
binary search in that prefix, and its row by an exact integer prefix inside the one tile.
"""

# ruff: noqa: N803, SIM108 (constants of a kernel are capitals; Triton has no conditional expression
# over two shapes)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from .common import first_visible, points_below, uniform


@triton.jit
def _passes(
    prefix, total, point, k, grid_offset, samples,
    SYSTEMATIC: tl.constexpr,
):  # fmt: skip
    """Whether the mass up to a tile's end passes the point of draw k."""
    reach = prefix.to(tl.float64) / total
    if SYSTEMATIC:
        return points_below(reach * samples, grid_offset) > k
    return reach > point


@triton.jit(
    do_not_specialize=[
        "seed", "position", "layer", "head_offset", "samples", "N", "n_tiles", "search_steps",
        "stride_vb", "stride_vh", "stride_mb", "stride_mn",
    ]
)  # fmt: skip
def sample_kernel(
    p_value,  # (B, KVH, N, DV)
    p_mask,  # (B, N) uint8
    p_sinks,  # (KVH * G,) float32
    p_seed,  # (B,) int64
    p_position,  # (B,) int64
    p_stash,  # (B, KVH * G, n_tiles, TILE) fp16
    p_top,  # (B, KVH * G, n_tiles) float32
    p_total,  # (B, KVH * G, n_tiles) int32, the bits of a uint32
    p_done,  # (B, KVH * G) int32, zero
    p_prefix,  # (B, KVH * G, chunks, n_tiles) int64, scratch
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
    search_steps: tl.int32,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_mb: tl.int64,
    stride_mn: tl.int64,
    STRIDE_VN: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SEED: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    GRID: tl.constexpr,  # the streams of the counter RNG
    TILE_OFFSET: tl.constexpr,
    SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PDL: tl.constexpr,
):
    """Draws of one chunk and head, and the sum of their value rows; grid (chunks, H, B)."""
    i_chunk, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks, heads = tl.num_programs(0), tl.num_programs(1)
    i_row = i_b * heads + i_h
    if HAS_SEED:
        seed = tl.load(p_seed + i_b)
    if HAS_POSITION:
        position = tl.load(p_position + i_b)
    head = head_offset + i_h
    first = 0 * N
    if HAS_MASK:
        first = first_visible(p_mask + i_b * stride_mb, stride_mn, N, 8192)
    SYSTEMATIC: tl.constexpr = ESTIMATOR == "systematic"
    k = i_chunk * BLOCK_S + tl.arange(0, BLOCK_S)
    grid_offset = uniform(seed, layer, head, position, 0 * layer, GRID)
    point = tl.zeros([BLOCK_S], tl.float64)
    if not SYSTEMATIC:
        point = uniform(seed, layer, head, position, k, SAMPLE)
        if ESTIMATOR == "stratified":
            point = (k + point) / samples
            point = tl.minimum(
                point, 0.9999999999999999
            )  # 1 - 2**-53: the sum above may round to 1
    if PDL:
        tl.extra.cuda.gdc_wait()

    # The row's largest exponent, then the masses of its tiles as an integer prefix.
    p_top += i_row * n_tiles
    p_total += i_row * n_tiles
    p_stash += i_row * n_tiles * TILE
    p_prefix += (i_row * chunks + i_chunk) * n_tiles
    o_t = tl.arange(0, BLOCK_T)
    b_peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for t in range(0, n_tiles, BLOCK_T):
        b_peak = tl.maximum(
            b_peak, tl.load(p_top + t + o_t, mask=t + o_t < n_tiles, other=float("-inf"))
        )
    peak = tl.max(b_peak, axis=0)
    if HAS_SINKS:
        sink = tl.load(p_sinks + i_h) * 1.4426950408889634
        sink = tl.where(sink == sink, sink, float("inf"))
        peak = tl.maximum(peak, sink)
    level = tl.where((peak == float("-inf")) | (peak == float("inf")), 0.0, peak).to(tl.float64)
    mass = tl.zeros([], tl.int64)
    for t in range(0, n_tiles, BLOCK_T):
        in_t = t + o_t < n_tiles
        b_top = tl.load(p_top + t + o_t, mask=in_t, other=float("-inf"))
        b_total = tl.load(p_total + t + o_t, mask=in_t, other=0).to(tl.uint32, bitcast=True)
        # 2**40 / 2**24 units of a weight; a row of NaN is sorted out at the end.
        b_scale = tl.where(b_top < float("inf"), tl.exp2(b_top.to(tl.float64) - level), 0.0)
        b_mass = (b_scale * 65536.0 * b_total.to(tl.float64)).to(tl.int64)
        tl.store(p_prefix + t + o_t, mass + tl.cumsum(b_mass, axis=0), mask=in_t)
        mass += tl.sum(b_mass, axis=0)
    if HAS_SINKS:
        # The sink is one more key behind the last tile, with a value of zero.
        mass += (tl.exp2(sink.to(tl.float64) - level) * 1099511627776.0).to(tl.int64)
    total = tl.maximum(mass, 1).to(tl.float64)
    tl.debug_barrier()

    # Smallest tile whose end passes the point; n_tiles for the sink, or where nothing has mass.
    low = tl.zeros([BLOCK_S], tl.int32)
    high = low + n_tiles
    for _ in range(search_steps):
        middle = (low + high) // 2
        b_prefix = tl.load(p_prefix + middle, mask=low < high, other=0)
        passes = _passes(b_prefix, total, point, k, grid_offset, samples, SYSTEMATIC)
        passes = passes | (low >= high)
        high = tl.where(passes, middle, high)
        low = tl.where(passes, low, middle + 1)
    i_tile = low
    keyed = (k < samples) & (i_tile < n_tiles)
    b_end = tl.load(p_prefix + i_tile, mask=keyed, other=1).to(tl.float64) / total
    b_start = tl.load(p_prefix + i_tile - 1, mask=keyed & (i_tile > 0), other=0)
    b_start = b_start.to(tl.float64) / total
    if SYSTEMATIC:
        b_before = points_below(b_start * samples, grid_offset)
        b_draws = points_below(b_end * samples, grid_offset) - b_before
        within = uniform(seed, layer, head, position, i_tile, TILE_OFFSET)
        fraction = ((k - b_before).to(tl.float64) + within) / tl.maximum(b_draws, 1)
    else:
        fraction = (point - b_start) / (b_end - b_start)

    # The row inside the tile: a prefix of integers, exact in any order.
    o_r = tl.arange(0, TILE)
    b_weight = tl.load(
        p_stash + i_tile.to(tl.int64)[:, None] * TILE + o_r[None, :], mask=keyed[:, None], other=0.0
    )
    b_prefix = tl.cumsum((b_weight.to(tl.float32) * 16777216.0).to(tl.uint32), axis=1)
    b_whole = tl.load(p_total + i_tile, mask=keyed, other=1).to(tl.uint32, bitcast=True)
    b_whole = b_whole.to(tl.float64)
    b_point = tl.minimum(tl.floor(fraction * b_whole), b_whole - 1.0).to(tl.uint32)
    b_row = tl.sum((b_prefix <= b_point[:, None]).to(tl.int32), axis=1)
    b_key = tl.minimum(first + i_tile * TILE + b_row, N - 1).to(tl.int64)
    if HAS_INDEX:
        tl.store(p_index + i_row * samples + k, tl.where(keyed, b_key, -1), mask=k < samples)

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
            for d in tl.static_range(0, DV, BLOCK_DV):
                in_d = d + o_d < DV
                b_out = tl.zeros([BLOCK_DV], tl.float32)
                for c in range(chunks):
                    b_out += tl.load(
                        p_partial + c * DV + d + o_d, mask=in_d, other=0.0, cache_modifier=".cg"
                    )
                b_out = tl.where(spoiled, float("nan"), b_out / samples)
                tl.store(p_out + i_row * DV + d + o_d, b_out.to(p_out.dtype.element_ty), mask=in_d)
