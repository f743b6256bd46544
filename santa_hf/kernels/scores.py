"""Pass 1: stream K once and leave, for every query head, rounded softmax weights and tile sums.

For each tile of TILE keys, counted from the row's first visible key, with s in base-2 exponents:

    top    = max s                        float32, +inf if a visible score is NaN or +inf
    weight = fp16(2 ** (s - top))         in [0, 1]
    total  = sum of round(2**23 * weight) at most 2**30: exact in int32, whatever the order

The draws of pass 2 are exactly unbiased for the rounded weights. Nothing here depends on how tiles are
dealt to programs, so a row's result is bitwise the same alone and in any batch.
"""

# ruff: noqa: N803 (constants of a kernel are capitals)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from .common import first_visible, log2_weights, weight_units


@triton.jit(
    do_not_specialize=[
        "N", "n_tiles", "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_mb", "stride_mn",
    ]
)  # fmt: skip
def scores_kernel(
    p_query,  # (B, KVH * G, 1, D)
    p_key,  # (B, KVH, N, D)
    p_mask,  # (B, N) uint8
    p_stash,  # (B, KVH * G, n_tiles, TILE) fp16
    p_top,  # (B, KVH * G, n_tiles) float32
    p_total,  # (B, KVH * G, n_tiles) int32
    p_done,  # (B, KVH * G) int32, zeroed here for pass 2
    scale: tl.float32,
    softcap: tl.float32,
    N: tl.int32,
    n_tiles: tl.int32,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_mb: tl.int64,
    stride_mn: tl.int64,
    STRIDE_KN: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,  # tiles of a program
    ALIGN_Q: tl.constexpr,
    ALIGN: tl.constexpr,  # elements that every offset of K is a multiple of
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rounded weights of TILES tiles for a group of query heads; grid (programs, KVH, B)."""
    i_program, i_kv, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()
    o_t, o_g, o_d = tl.arange(0, TILE), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    i_head = i_b * (tl.num_programs(1) * G) + i_kv * G  # of the group's first head
    if i_program == 0:
        tl.store(p_done + i_head + o_g, tl.zeros([BLOCK_G], tl.int32), mask=o_g < G)

    first = 0 * N
    if HAS_MASK:
        p_mask += i_b * stride_mb
        first = first_visible(p_mask, stride_mn, N, 8192)
    tile_start = i_program * TILES
    tile_stop = min(tile_start + TILES, n_tiles)

    p_query += tl.multiple_of(i_b * stride_qb + i_kv * G * stride_qh, ALIGN_Q)
    o_query = tl.multiple_of(o_g * stride_qh, ALIGN_Q)[:, None] + o_d[None, :]
    p_key += tl.multiple_of(i_b * stride_kb + i_kv * stride_kh, ALIGN)
    o_key = o_t[:, None] * STRIDE_KN + o_d[None, :]
    if D <= BLOCK_D:
        b_q = tl.load(p_query + o_query, mask=(o_g < G)[:, None] & (o_d < D)[None, :], other=0.0)

    for i_tile in tl.range(tile_start, tile_stop):
        start = first + i_tile * TILE
        visible = o_t < N - start
        if HAS_MASK:
            o_mask = (start + o_t).to(tl.int64) * stride_mn
            visible = visible & (tl.load(p_mask + o_mask, mask=visible, other=0) != 0)
        p_tile = p_key + start.to(tl.int64) * STRIDE_KN
        if KEYS_FIRST:
            b_dot = tl.zeros([TILE, BLOCK_G], tl.float32)
        else:
            b_dot = tl.zeros([BLOCK_G, TILE], tl.float32)
        for d in tl.static_range(0, D, BLOCK_D):
            if D > BLOCK_D:
                in_d = d + o_d < D
                b_q = tl.load(
                    p_query + o_query + d, mask=(o_g < G)[:, None] & in_d[None, :], other=0.0
                )
            if D % BLOCK_D == 0:
                b_k = tl.load(p_tile + o_key + d, mask=visible[:, None], other=0.0)
            else:
                in_d = d + o_d < D
                b_k = tl.load(p_tile + o_key + d, mask=visible[:, None] & in_d[None, :], other=0.0)
            if KEYS_FIRST:
                b_dot = tl.dot(b_k, tl.trans(b_q), b_dot, input_precision="ieee")
            else:
                b_dot = tl.dot(b_q, tl.trans(b_k), b_dot, input_precision="ieee")
        if KEYS_FIRST:
            b_dot = tl.trans(b_dot)
        b_s = log2_weights(b_dot, visible[None, :], scale, softcap, HAS_SOFTCAP)  # [G, TILE]
        b_top = tl.max(b_s, axis=1)
        b_weight = tl.exp2(b_s - tl.where(b_top == float("-inf"), 0.0, b_top)[:, None])
        b_weight = b_weight.to(tl.float16)
        b_total = tl.sum(weight_units(b_weight.to(tl.float32)), axis=1)
        b_total = tl.where(b_top == float("inf"), 1, b_total)

        o_tile = (i_head + o_g) * n_tiles + i_tile
        o_stash = o_tile[:, None] * TILE + o_t[None, :]
        tl.store(p_stash + o_stash, b_weight, mask=(o_g < G)[:, None])
        tl.store(p_top + o_tile, b_top, mask=o_g < G)
        tl.store(p_total + o_tile, b_total, mask=o_g < G)
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
