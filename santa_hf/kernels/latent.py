"""Decode attention over latents, for multi-head latent attention (MLA, arXiv 2405.04434, section 2.1).

All query heads share one latent per token, c (N, R), and one rotary key (N, E). With the up-projections
absorbed into the query and the output, a latent is its own value:

    s = (q c^T + q_rot k_rot^T) * scale,    o = softmax(s) c

`latent_kernel` is exact attention, split along the keys: each latent is read once for a block of up to
64 heads, and serves both products. `latent_scores_kernel` is pass 1 of the sampled step: it leaves what
`scores_kernel` leaves, and pass 2 draws rows of c as it draws rows of V.
"""

# ruff: noqa: N803, SIM102, SIM108 (constants of a kernel are capitals, and a condition on one stands
# alone, so that the other side is not compiled; Triton has no conditional expression over two shapes)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import cache

import torch
import triton
import triton.language as tl

from ..reference import TILE
from . import host, launch
from .common import LOG2E, log2_weights, row_offsets, weight_units
from .dense import combine, partials
from .launcher import Launcher
from .sample import sample
from .scores import Weights, weights_layout

__all__ = ["decode", "dense", "prop", "scores", "why_not"]

MAX_HEADS = 128
MAX_RANK = 512
MAX_ROTARY = 128

# Measured on an H100, see eval/bench/results/mla.md. None of them changes a draw.
HEAD_BLOCK = 64  # heads of a program: 128 of them times a rank of 512 fill the whole register file
TILE_KEYS, WARPS, BUFFERS = 64, 8, 2  # BUFFERS: tiles in shared memory at a time
SCORE_COLUMNS, SCORE_WARPS, SCORE_STAGES = 64, 8, 3


@triton.jit(
    do_not_specialize=[
        "N", "stride_qb", "stride_qh", "stride_cb", "stride_eb", "stride_mb",
    ]
)  # fmt: skip
def latent_kernel(
    p_query,  # (B, H, 1, R + E)
    p_latent,  # (B, 1, N, R)
    p_rotary,  # (B, 1, N, E)
    p_mask,  # (B, N) uint8
    p_span,  # (B, 2) int32, of `span_kernel`
    p_only,  # (B,) uint8, zero for rows that are left alone
    p_partial,  # (B, H, splits, R) float32
    p_top,  # (B, H, splits) float32
    p_mass,  # (B, H, splits) float32
    scale: tl.float32,
    N: tl.int32,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_cb: tl.int64,
    stride_eb: tl.int64,
    stride_mb: tl.int64,
    STRIDE_CN: tl.constexpr,
    STRIDE_EN: tl.constexpr,
    STRIDE_MN: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ONLY: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One split of the keys for a block of heads; grid (splits * blocks of heads, B).

    The splits share out the keys from the row's first visible one to its last. Blocks of
    heads are neighbours in the grid, so that they find a latent in L2 together. STAGES is for Hopper and
    64 heads, whose products read shared memory, else None.
    """
    HEAD_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    i_split, i_block = tl.program_id(0) // HEAD_BLOCKS, tl.program_id(0) % HEAD_BLOCKS
    splits, i_b = tl.num_programs(0) // HEAD_BLOCKS, tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if HAS_ONLY:
        if tl.load(p_only + i_b) == 0:
            return
    o_h, o_n = i_block * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    o_r, o_e = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    in_h, in_r, in_e = o_h < H, o_r < R, o_e < E

    start, stop = 0 * N, N
    if HAS_MASK:
        p_mask += i_b * stride_mb
        start = tl.load(p_span + 2 * i_b)
        stop = tl.load(p_span + 2 * i_b + 1) + 1
    tiles = (stop - start + BLOCK_N - 1) // BLOCK_N
    split_keys = (tiles + splits - 1) // splits * BLOCK_N
    start += i_split * split_keys
    stop = min(stop, start + split_keys)

    p_query += tl.multiple_of(i_b * stride_qb, ALIGN_Q)
    o_query = tl.multiple_of(o_h * stride_qh, ALIGN_Q)[:, None]
    b_q = tl.load(p_query + o_query + o_r[None, :], mask=in_h[:, None] & in_r[None, :], other=0.0)
    b_q_rot = tl.load(
        p_query + o_query + R + o_e[None, :], mask=in_h[:, None] & in_e[None, :], other=0.0
    )
    p_latent += tl.multiple_of(i_b * stride_cb, ALIGN_C)
    p_rotary += tl.multiple_of(i_b * stride_eb, ALIGN_E)
    o_latent = row_offsets(o_n, STRIDE_CN)[:, None] + o_r[None, :]
    o_rotary = row_offsets(o_n, STRIDE_EN)[:, None] + o_e[None, :]

    b_out = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    b_top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    b_mass = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)  # summed at the end: warps share a row's keys
    for i_tile in tl.range(0, (stop - start + BLOCK_N - 1) // BLOCK_N, num_stages=STAGES):
        n = start + i_tile * BLOCK_N
        in_n = o_n < stop - n
        visible = in_n
        if HAS_MASK:
            o_mask = (n + o_n).to(tl.int64) * STRIDE_MN
            visible = in_n & (tl.load(p_mask + o_mask, mask=in_n, other=0) != 0)
        # Rows hidden between visible ones are read all the same: loads that wait for the mask would not
        # be prefetched. As in SDPA, a NaN there is multiplied by zero.
        if R == BLOCK_R:
            b_rows = in_n[:, None]
        else:
            b_rows = in_n[:, None] & in_r[None, :]
        p_tile = p_latent + n.to(tl.int64) * STRIDE_CN
        b_c = tl.load(p_tile + o_latent, mask=b_rows, other=0.0)
        if E == BLOCK_E:
            b_rows = in_n[:, None]
        else:
            b_rows = in_n[:, None] & in_e[None, :]
        p_tile = p_rotary + n.to(tl.int64) * STRIDE_EN
        b_k_rot = tl.load(p_tile + o_rotary, mask=b_rows, other=0.0)
        if n < stop:
            # Always so, which the compiler does not know. It gives a product that feeds another whole
            # rows of heads in every warp, and warps beyond the rows would repeat each other's work;
            # behind a branch it divides the scores among all warps. The two parts are scaled apart,
            # or they would be chained into one.
            b_dot = tl.dot(b_q_rot, tl.trans(b_k_rot)) * scale
            b_dot += tl.dot(b_q, tl.trans(b_c)) * scale
            b_s = log2_weights(b_dot, visible[None, :], 1.0, 0.0, False)  # [BLOCK_H, BLOCK_N]
            b_new = tl.maximum(b_top, tl.max(b_s, axis=1))
            b_level = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_rescale = tl.exp2(b_top - b_level)
            b_p = tl.exp2(b_s - b_level[:, None])
            b_mass = b_mass * b_rescale[:, None] + b_p
            b_top = b_new
            b_weight = b_p.to(b_c.dtype)
        else:
            # Never run. A constant here would be laid out in shared memory, of which there is none left.
            b_rescale = b_top
            b_weight = tl.dot(b_q_rot, tl.trans(b_k_rot)).to(b_c.dtype)
        if STAGES is None:
            b_out = tl.dot(b_weight, b_c, b_out * b_rescale[:, None])
        else:
            # With no product outside of a branch, the pipeliner loads the next tile before this one's
            # arithmetic. After it, as it does otherwise, two buffers would hide nothing, and there is
            # no room for a third (H100, 128 heads, 8 x 32k keys: 185 us against 244).
            if n < N:
                b_out = tl.dot(b_weight, b_c, b_out * b_rescale[:, None])

    o_split = (i_b * H + o_h) * splits + i_split
    tl.store(
        p_partial + o_split[:, None] * R + o_r[None, :], b_out, mask=in_h[:, None] & in_r[None, :]
    )
    tl.store(p_top + o_split, b_top, mask=in_h)
    tl.store(p_mass + o_split, tl.sum(b_mass, axis=1), mask=in_h)


@triton.jit(
    do_not_specialize=["N", "stride_qb", "stride_qh", "stride_cb", "stride_eb", "stride_mb"]
)
def latent_scores_kernel(
    p_query,  # (B, H, 1, R + E)
    p_latent,  # (B, 1, N, R)
    p_rotary,  # (B, 1, N, E)
    p_mask,  # (B, N) uint8
    p_span,  # (B, 2) int32, of `span_kernel`
    p_exact,  # (B,) uint8, rows that are not drawn from
    p_stash,  # (B, 1, n_tiles, H, TILE) fp16
    p_top,  # (B, H, n_tiles) float32
    p_total,  # (B, H, n_tiles) int32
    p_done,  # (B, H) int32, zeroed here for pass 2
    scale: tl.float32,
    N: tl.int32,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_cb: tl.int64,
    stride_eb: tl.int64,
    stride_mb: tl.int64,
    STRIDE_CN: tl.constexpr,
    STRIDE_EN: tl.constexpr,
    STRIDE_MN: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_EXACT: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rounded weights of one tile for all heads, as `scores_kernel` leaves them; grid (n_tiles, B)."""
    i_tile, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_tiles = tl.num_programs(0)
    o_t, o_h, o_d = tl.arange(0, TILE), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    in_h = o_h < H
    o_tile = (i_b * H + o_h) * n_tiles + i_tile
    if PDL:
        tl.extra.cuda.gdc_wait()
    if HAS_EXACT:
        if tl.load(p_exact + i_b) != 0:
            return
    if i_tile == 0:
        tl.store(p_done + i_b * H + o_h, tl.zeros([BLOCK_H], tl.int32), mask=in_h)

    start = i_tile * TILE
    visible = o_t < N - start
    if HAS_MASK:
        p_mask += i_b * stride_mb
        start += tl.load(p_span + 2 * i_b)
        visible = o_t < N - start
        o_mask = (start + o_t).to(tl.int64) * STRIDE_MN
        visible = visible & (tl.load(p_mask + o_mask, mask=visible, other=0) != 0)
        if tl.max(visible.to(tl.int32), axis=0) == 0:
            tl.store(p_top + o_tile, tl.full([BLOCK_H], float("-inf"), tl.float32), mask=in_h)
            tl.store(p_total + o_tile, tl.zeros([BLOCK_H], tl.int32), mask=in_h)
            return

    p_query += tl.multiple_of(i_b * stride_qb, ALIGN_Q)
    o_query = tl.multiple_of(o_h * stride_qh, ALIGN_Q)[:, None] + o_d[None, :]
    p_latent += tl.multiple_of(i_b * stride_cb, ALIGN_C) + start.to(tl.int64) * STRIDE_CN
    p_rotary += tl.multiple_of(i_b * stride_eb, ALIGN_E) + start.to(tl.int64) * STRIDE_EN
    o_latent = row_offsets(o_t, STRIDE_CN)[:, None] + o_d[None, :]
    o_rotary = row_offsets(o_t, STRIDE_EN)[:, None] + o_d[None, :]
    b_dot = tl.zeros([TILE, BLOCK_H], tl.float32)
    for d in tl.range(0, R, BLOCK_D):
        in_d = (d + o_d < R)[None, :]
        b_q = tl.load(p_query + o_query + d, mask=in_h[:, None] & in_d, other=0.0)
        b_c = tl.load(p_latent + o_latent + d, mask=visible[:, None] & in_d, other=0.0)
        b_dot = tl.dot(b_c, tl.trans(b_q), b_dot)
    for d in tl.static_range(0, E, BLOCK_D):
        in_d = (d + o_d < E)[None, :]
        b_q = tl.load(p_query + R + o_query + d, mask=in_h[:, None] & in_d, other=0.0)
        b_k = tl.load(p_rotary + o_rotary + d, mask=visible[:, None] & in_d, other=0.0)
        b_dot = tl.dot(b_k, tl.trans(b_q), b_dot)

    b_s = log2_weights(tl.trans(b_dot), visible[None, :], scale, 0.0, False)  # [BLOCK_H, TILE]
    b_top = tl.max(b_s, axis=1)
    b_weight = tl.exp2(b_s - tl.where(b_top == float("-inf"), 0.0, b_top)[:, None])
    b_weight = b_weight.to(tl.float16)
    b_total = tl.sum(weight_units(b_weight.to(tl.float32)), axis=1)
    b_total = tl.where(b_top == float("inf"), 1, b_total)
    o_stash = ((i_b * n_tiles + i_tile) * H + o_h)[:, None] * TILE + o_t[None, :]
    tl.store(p_stash + o_stash, b_weight, mask=in_h[:, None], eviction_policy="evict_last")
    tl.store(p_top + o_tile, b_top, mask=in_h)
    tl.store(p_total + o_tile, b_total, mask=in_h)


def why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rotary_key: torch.Tensor,
    kernel: str = "prop",
    estimator: str = "systematic",
    scored: bool = False,
) -> str | None:
    """Why these kernels cannot run on a step, in the words of an error; None if they can.

    `scored` says that scores are soft-capped or joined by sinks, which no latent attention has.
    """
    if kernel == "flash" and estimator != "dense":
        return "there is no one-pass sampling kernel over latents"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"Triton kernels over latents take 16-bit floats, and query is {query.dtype}"
    if scored:
        return "Triton kernels over latents have neither soft caps nor sinks"
    if value.data_ptr() != key.data_ptr() or value.stride() != key.stride():
        return "with a rotary key, Triton kernels take only latents: keys that are their own values"
    if key.shape[1] != 1 or query.shape[1] > MAX_HEADS:
        return f"Triton kernels over latents take one KV head and up to {MAX_HEADS} query heads"
    if key.shape[3] > MAX_RANK or rotary_key.shape[3] > MAX_ROTARY:
        return f"Triton kernels over latents take up to {MAX_RANK} + {MAX_ROTARY} columns"
    return launch.why_not(query, key, value)


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    rotary_key: torch.Tensor,
    samples: int,
    estimator: str,
    scaling: float,
    mask: torch.Tensor | None,
    seed: int | torch.Tensor,
    layer: int,
    position: torch.Tensor | None,
    head_offset: int,
    softcap: None,
    sinks: None,
    exact: torch.Tensor | None,
) -> torch.Tensor:
    """One decode step over latents, exact or sampled; arguments and result as in `santa_decode`."""
    if estimator == "dense":
        return dense(query, key, value, rotary_key=rotary_key, scaling=scaling, mask=mask)
    return prop(
        query, key, value, rotary_key=rotary_key, samples=samples, estimator=estimator,
        scaling=scaling, mask=mask, seed=seed, layer=layer, position=position,
        head_offset=head_offset, exact=exact,
    )  # fmt: skip


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    rotary_key: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Exact attention over latents: `key` is also the value, and the rest as in `santa_decode`."""
    out = query.new_empty(*query.shape[:3], key.shape[3])
    mask, span = host.visible(mask, query.shape[0], True)
    _dense(query, key, rotary_key, out, mask, span, scaling=scaling, only=None)
    return out


def prop(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    rotary_key: torch.Tensor,
    samples: int,
    estimator: str,
    scaling: float,
    mask: torch.Tensor | None,
    seed: int | torch.Tensor,
    layer: int,
    position: torch.Tensor | None,
    head_offset: int = 0,
    exact: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sampled step over latents in two passes; arguments as in `launch.prop`."""
    mask, span = host.visible(mask, query.shape[0], True)
    weights = scores(
        query, key, rotary_key=rotary_key, scaling=scaling, mask=mask, span=span, exact=exact
    )
    out = query.new_empty(*query.shape[:3], key.shape[3])
    sample(
        value, span, weights, out, samples=samples, estimator=estimator, seed=seed, layer=layer,
        position=position, head_offset=head_offset, exact=exact, index=index,
    )  # fmt: skip
    if exact is not None:
        _dense(query, key, rotary_key, out, mask, span, scaling=scaling, only=exact)
    return out


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    rotary_key: torch.Tensor,
    out: torch.Tensor,
    mask: torch.Tensor | None,
    span: torch.Tensor | None,
    *,
    scaling: float,
    only: torch.Tensor | None,
) -> None:
    """Exact attention for the rows of `out` that `only`, bool (B,), names; None for all.

    Splits are shared out by batch and heads together, such that programs fill the GPU once: a program
    leaves 128 KiB of partial output, as much as 110 latents have. Splits by the row alone, which would
    give a row the same bits in any batch, take 1.5 times as long in a batch (H100, 128 heads, 8 x 32k:
    289 us against 186), so here alone an output may differ in rounding from that of another batch.
    """
    batch, heads, *_ = query.shape
    _, _, length, rank = key.shape
    device, rotary = query.device, rotary_key.shape[3]
    block_h = HEAD_BLOCK if heads > 16 and _multiplies_64_rows(device) else 16
    room = host.shared_memory(device) + 16 * 1024
    block_n, block_r, block_e = _blocks(rank, rotary, query.element_size(), block_h, room)
    blocks = host.ceil_div(heads, block_h)
    most = max(1, host.processors(device) // (blocks * batch))
    splits = min(most, host.ceil_div(length, block_n))
    partial, top, mass = partials(batch, heads, splits, rank).allocate(device)
    launcher = _dense_launcher(
        device, heads, rank, rotary, key.stride(2), rotary_key.stride(2), host.mask_stride(mask, 1),
        mask is not None, only is not None, host.alignment(query), host.alignment(key),
        host.alignment(rotary_key), block_h, block_n, block_r, block_e,
    )  # fmt: skip
    launcher(
        (splits * blocks, batch),
        query, key, rotary_key, mask, span, host.as_bytes(only), partial, top, mass,
        scaling * LOG2E.value, length, query.stride(0), query.stride(1), key.stride(0),
        rotary_key.stride(0), host.mask_stride(mask, 0),
    )  # fmt: skip
    combine(partial, top, mass, out, splits, most, None, only)


@cache
def _blocks(
    rank: int, rotary: int, item_bytes: int, block_h: int, room: int
) -> tuple[int, int, int]:
    """Keys of a tile, and columns of latents and rotary keys, such that BUFFERS of them and the heads'
    queries and weights fit in `room` bytes."""
    block_r, block_e = (max(16, triton.next_power_of_2(x)) for x in (rank, rotary))
    row_bytes = (block_r + block_e) * item_bytes
    block_n = TILE_KEYS
    room -= block_h * (row_bytes + block_n * item_bytes)
    while block_n > 16 and BUFFERS * block_n * row_bytes > room:
        block_n //= 2
    return block_n, block_r, block_e


@cache
def _dense_launcher(
    device: torch.device,
    heads: int,
    rank: int,
    rotary: int,
    stride_cn: int,
    stride_en: int,
    stride_mn: int,
    has_mask: bool,
    has_only: bool,
    align_q: int,
    align_c: int,
    align_e: int,
    block_h: int,
    block_n: int,
    block_r: int,
    block_e: int,
) -> Launcher:
    return Launcher(
        latent_kernel,
        device,
        STRIDE_CN=stride_cn,
        STRIDE_EN=stride_en,
        STRIDE_MN=stride_mn,
        H=heads,
        R=rank,
        E=rotary,
        HAS_MASK=has_mask,
        HAS_ONLY=has_only,
        ALIGN_Q=align_q,
        ALIGN_C=align_c,
        ALIGN_E=align_e,
        BLOCK_H=block_h,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        BLOCK_E=block_e,
        STAGES=BUFFERS if block_h == HEAD_BLOCK else None,
        num_warps=WARPS,
        num_stages=BUFFERS + 1,
        **host.dependent(device),
    )


@cache
def _multiplies_64_rows(device: torch.device) -> bool:
    """Whether a product of 64 rows takes its operands from shared memory, as on Hopper. The interpreter
    runs what Hopper does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    rotary_key: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    span: torch.Tensor | None,
    exact: torch.Tensor | None = None,
) -> Weights:
    """Pass 1 over latents; arguments and results as in `scores.scores`."""
    batch, heads, *_ = query.shape
    _, _, length, rank = key.shape
    n_tiles, device = host.ceil_div(length, TILE), query.device
    weights = Weights(*weights_layout(batch, 1, n_tiles, heads, False).allocate(device))
    launcher = _scores_launcher(
        device, heads, rank, rotary_key.shape[3], key.stride(2), rotary_key.stride(2),
        host.mask_stride(mask, 1), mask is not None, exact is not None, host.alignment(query),
        host.alignment(key), host.alignment(rotary_key),
    )  # fmt: skip
    launcher(
        (n_tiles, batch),
        query, key, rotary_key, mask, span, host.as_bytes(exact), weights.stash,
        weights.top, weights.total, weights.done,
        scaling * LOG2E.value, length, query.stride(0), query.stride(1), key.stride(0),
        rotary_key.stride(0), host.mask_stride(mask, 0),
    )  # fmt: skip
    return weights


@cache
def _scores_launcher(
    device: torch.device,
    heads: int,
    rank: int,
    rotary: int,
    stride_cn: int,
    stride_en: int,
    stride_mn: int,
    has_mask: bool,
    has_exact: bool,
    align_q: int,
    align_c: int,
    align_e: int,
) -> Launcher:
    return Launcher(
        latent_scores_kernel,
        device,
        STRIDE_CN=stride_cn,
        STRIDE_EN=stride_en,
        STRIDE_MN=stride_mn,
        H=heads,
        R=rank,
        E=rotary,
        HAS_MASK=has_mask,
        HAS_EXACT=has_exact,
        TILE=TILE,
        ALIGN_Q=align_q,
        ALIGN_C=align_c,
        ALIGN_E=align_e,
        BLOCK_H=max(16, triton.next_power_of_2(heads)),
        BLOCK_D=SCORE_COLUMNS,
        num_warps=SCORE_WARPS,
        num_stages=SCORE_STAGES,
        **host.dependent(device),
    )
