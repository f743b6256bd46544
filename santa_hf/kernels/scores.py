"""Pass 1: stream K once and leave, for every query head, rounded softmax weights and tile sums.

For each tile of TILE keys, counted from the row's first visible key, with s in base-2 exponents:

    top    = max s                        float32, +inf if a visible score is NaN or +inf
    weight = fp16(2 ** (s - top))         in [0, 1]
    total  = sum of round(2**23 * weight) at most 2**30: exact in int32, whatever the order

For pass 2 with many draws it also leaves the sums of every PART weights, in the same units.

The draws of pass 2 are exactly unbiased for the rounded weights. A program owns one tile, so a row's
result is bitwise the same alone and in any batch.
"""

# ruff: noqa: N803, SIM102 (constants of a kernel are capitals; a condition on one stands alone, so
# that the other side is not compiled)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..reference import TILE, length_of
from . import host
from .common import log2_weights, row_offsets, weight_units
from .launcher import Launcher, Layout, Part

WARPS = 8
PART = 16  # keys of a tile that a draw passes at a time


@triton.jit(
    do_not_specialize=[
        "N", "stride_qb", "stride_qh", "stride_kb", "stride_kh", "stride_mb",
    ]
)  # fmt: skip
def scores_kernel(
    p_query,  # (B, KVH * G, 1, D)
    p_key,  # (B, KVH, N, D)
    p_mask,  # (B, N) uint8
    p_span,  # (B, 2) int32, of `span_kernel`
    p_rows,  # (B, N) int32 or int64, the row of p_key that holds a key
    p_exact,  # (B,) uint8, rows that are not drawn from
    p_stash,  # (B, KVH, n_tiles, G, TILE) fp16
    p_parts,  # (B, KVH, n_tiles, G, TILE // PART) int32, sums of PART weights
    p_top,  # (B, KVH * G, n_tiles) float32
    p_total,  # (B, KVH * G, n_tiles) int32
    p_done,  # (B, KVH * G) int32, zeroed here for pass 2
    scale: tl.float32,
    softcap: tl.float32,
    N: tl.int32,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_mb: tl.int64,
    STRIDE_KN: tl.constexpr,
    STRIDE_MN: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_EXACT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN: tl.constexpr,  # elements that every offset of K is a multiple of
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rounded weights of one tile for a group of query heads; grid (n_tiles, KVH, B)."""
    i_tile, i_kv, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_tiles = tl.num_programs(0)
    o_t, o_g, o_d = tl.arange(0, TILE), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    i_head = i_b * (tl.num_programs(1) * G) + i_kv * G  # of the group's first head
    in_g = o_g < G
    o_tile = (i_head + o_g) * n_tiles + i_tile
    if PDL:
        tl.extra.cuda.gdc_wait()
    if HAS_EXACT:
        if tl.load(p_exact + i_b) != 0:
            return
    if i_tile == 0:
        tl.store(p_done + i_head + o_g, tl.zeros([BLOCK_G], tl.int32), mask=in_g)

    start = i_tile * TILE
    if HAS_MASK:
        start += tl.load(p_span + 2 * i_b)
    visible = o_t < N - start
    p_key += tl.multiple_of(i_b * stride_kb + i_kv * stride_kh, ALIGN)
    if HAS_ROWS:  # asked for before the mask, so that the two are waited for at once
        o_row = tl.load(p_rows + i_b * N + start + o_t, mask=visible, other=0).to(tl.int64)
        o_row *= STRIDE_KN
    else:
        o_row = row_offsets(o_t, STRIDE_KN)
        p_key += start.to(tl.int64) * STRIDE_KN
    if HAS_MASK:
        p_mask += i_b * stride_mb
        o_mask = (start + o_t).to(tl.int64) * STRIDE_MN
        visible = visible & (tl.load(p_mask + o_mask, mask=visible, other=0) != 0)
        if tl.max(visible.to(tl.int32), axis=0) == 0:
            tl.store(p_top + o_tile, tl.full([BLOCK_G], float("-inf"), tl.float32), mask=in_g)
            tl.store(p_total + o_tile, tl.zeros([BLOCK_G], tl.int32), mask=in_g)
            return

    p_query += tl.multiple_of(i_b * stride_qb + i_kv * G * stride_qh, ALIGN_Q)
    o_query = tl.multiple_of(o_g * stride_qh, ALIGN_Q)[:, None] + o_d[None, :]
    o_key = o_row[:, None] + o_d[None, :]
    # Keys are the left operand: a group of 4 heads then pads to the 8 columns of a tensor core
    # instruction, not to its 16 rows.
    b_dot = tl.zeros([TILE, BLOCK_G], tl.float32)
    for d in tl.static_range(0, D, BLOCK_D):
        in_d = d + o_d < D
        b_q = tl.load(p_query + o_query + d, mask=in_g[:, None] & in_d[None, :], other=0.0)
        # K is read once: it must not push the stash, which pass 2 reads, out of the L2 cache.
        if D % BLOCK_D == 0:
            b_k = tl.load(
                p_key + o_key + d, mask=visible[:, None], other=0.0, eviction_policy="evict_first"
            )
        else:
            b_k = tl.load(
                p_key + o_key + d,
                mask=visible[:, None] & in_d[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
        b_dot = tl.dot(b_k, tl.trans(b_q), b_dot, input_precision="ieee")
    b_s = log2_weights(tl.trans(b_dot), visible[None, :], scale, softcap, HAS_SOFTCAP)  # [G, TILE]
    b_top = tl.max(b_s, axis=1)
    b_weight = tl.exp2(b_s - tl.where(b_top == float("-inf"), 0.0, b_top)[:, None])
    b_weight = b_weight.to(tl.float16)
    b_unit = weight_units(b_weight.to(tl.float32))
    if HAS_PARTS:
        b_part = tl.sum(b_unit.reshape(BLOCK_G, TILE // PART, PART), axis=2)
        o_part = (i_head * n_tiles + i_tile * G + o_g)[:, None] * (TILE // PART)
        o_part += tl.arange(0, TILE // PART)[None, :]
        tl.store(p_parts + o_part, b_part, mask=in_g[:, None], eviction_policy="evict_last")
        b_total = tl.sum(b_part, axis=1)
    else:
        b_total = tl.sum(b_unit, axis=1)
    b_total = tl.where(b_top == float("inf"), 1, b_total)
    # The group's rows of a tile lie together, in one run of memory.
    o_stash = (i_head * n_tiles + i_tile * G + o_g)[:, None] * TILE + o_t[None, :]
    tl.store(p_stash + o_stash, b_weight, mask=in_g[:, None], eviction_policy="evict_last")
    tl.store(p_top + o_tile, b_top, mask=in_g)
    tl.store(p_total + o_tile, b_total, mask=in_g)


class Weights(NamedTuple):
    """What pass 1 leaves of every tile, see `scores_kernel`; nothing of rows that are exact.

    Attributes:
        stash: weights, float16 (B, KVH, T, G, TILE); not written where no key is visible.
        top: largest exponent, float32 (B, H, T); -inf where no key is visible.
        total: sum of the weights in units of 2**-23, int32 (B, H, T); 0 where no key is visible, 1
            where top is +inf.
        done: zeros for pass 2 to count in, int32 (B, H).
        parts: sums of PART weights in the same units, int32 (B, KVH, T, G, TILE // PART), if asked for;
            not written where no key is visible.
    """

    stash: Part
    top: Part
    total: Part
    done: Part
    parts: Part | None = None

    def tensors(self) -> list[torch.Tensor | None]:
        """Views of the parts, to look at."""
        return [None if part is None else part.tensor() for part in self]


def scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None,
    span: torch.Tensor | None,
    exact: torch.Tensor | None = None,
    softcap: float | None = None,
    rows: torch.Tensor | None = None,
    parts: bool = False,
) -> Weights:
    """Pass 1, see `scores_kernel`; `span` is that of the mask, rows that are `exact` are skipped."""
    plan = scores_plan(
        query.device, query.dtype, query.shape, query.stride(), key.shape[1], key.stride(), scaling,
        softcap, None if mask is None else mask.stride(1), rows is not None, exact is not None, parts,
    )  # fmt: skip
    length = length_of(key, rows)
    return plan(query, key, mask, span, host.contiguous(rows), host.as_bytes(exact), length)


class ScoresPlan(NamedTuple):
    """Pass 1 of steps that differ in addresses and length alone."""

    launcher: Launcher
    device: torch.device
    batch: int
    kv_heads: int
    group: int
    parts: bool
    scale: tuple[float, float]
    strides: tuple[int, ...]

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        span: torch.Tensor | None,
        rows: torch.Tensor | None,
        exact: torch.Tensor | None,
        length: int,
    ) -> Weights:
        """Launch pass 1 over `length` keys."""
        launcher, device, batch, kv_heads, group, parts, scale, strides = self
        n_tiles = host.ceil_div(length, TILE)
        weights = Weights(*weights_layout(batch, kv_heads, n_tiles, group, parts).allocate(device))
        launcher(
            (n_tiles, kv_heads, batch),
            query, key, mask, span, rows, exact, weights.stash, weights.parts, weights.top,
            weights.total, weights.done, *scale, length, *strides, host.mask_stride(mask, 0),
        )  # fmt: skip
        return weights


@lru_cache(host.KEPT)
def scores_plan(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    kv_heads: int,
    key_strides: tuple[int, ...],
    scaling: float,
    softcap: float | None,
    stride_mn: int | None,
    has_rows: bool,
    has_exact: bool,
    parts: bool,
) -> ScoresPlan:
    """The plan of `scores`, of shapes and strides, and of which pointers there are."""
    batch, heads, _, dim = shape
    group = heads // kv_heads
    launcher = _scores_launcher(
        device, group, dim, key_strides[2], stride_mn or 0, stride_mn is not None, has_rows, has_exact,
        softcap is not None, parts, host.alignment_of(dtype, batch, heads, strides),
        host.alignment_of(dtype, batch, kv_heads, key_strides),
    )  # fmt: skip
    scalars = (*strides[:2], *key_strides[:2])
    scale = host.exponent_scale(scaling, softcap)
    return ScoresPlan(launcher, device, batch, kv_heads, group, parts, scale, scalars)


@cache
def _scores_launcher(
    device: torch.device,
    group: int,
    dim: int,
    stride_kn: int,
    stride_mn: int,
    has_mask: bool,
    has_rows: bool,
    has_exact: bool,
    has_softcap: bool,
    has_parts: bool,
    align_q: int,
    align_k: int,
) -> Launcher:
    return Launcher(
        scores_kernel,
        device,
        STRIDE_KN=stride_kn,
        STRIDE_MN=stride_mn,
        G=group,
        D=dim,
        HAS_MASK=has_mask,
        HAS_ROWS=has_rows,
        HAS_EXACT=has_exact,
        HAS_SOFTCAP=has_softcap,
        HAS_PARTS=has_parts,
        TILE=TILE,
        PART=PART,
        ALIGN_Q=align_q,
        ALIGN=align_k,
        BLOCK_G=host.block_of_group(group),
        BLOCK_D=host.block_of(dim),
        num_warps=WARPS,
        num_stages=1,
        **host.dependent(device),
    )


@lru_cache(host.KEPT)
def weights_layout(batch: int, kv_heads: int, n_tiles: int, group: int, parts: bool) -> Layout:
    """Room for `Weights`."""
    tiles, heads = (batch, kv_heads, n_tiles, group), (batch, kv_heads * group)
    room = [
        ((*tiles, TILE), torch.float16),
        ((*heads, n_tiles), torch.float32),
        ((*heads, n_tiles), torch.int32),
        (heads, torch.int32),
    ]
    if parts:
        room.append(((*tiles, TILE // PART), torch.int32))
    return Layout(*room)
