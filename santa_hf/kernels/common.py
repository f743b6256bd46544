"""Device code that the kernels share: the counter RNG, weights, and the visible span of a row."""

# ruff: noqa: N803 (constants of a kernel are capitals)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_offsets(o_row, STRIDE: tl.constexpr):
    """Offsets of the rows of a tile, in int64 where int32 does not hold them."""
    if o_row.shape[0] * STRIDE >= 2147483648:
        o_row = o_row.to(tl.int64)
    return o_row * STRIDE


@triton.jit
def uniform(seed, layer, head, position, index, STREAM: tl.constexpr):
    """`santa_hf.rng.uniform` bit for bit: float64 in [0, 1) with 53 random bits."""
    counter = index.to(tl.uint32)
    position = position.to(tl.uint32)
    head = head.to(tl.uint32)
    last = layer.to(tl.uint32) | (STREAM << 24)
    high, low, _, _ = tl.philox(seed, counter, position, head, last.to(tl.uint32))
    bits = (high.to(tl.int64) << 21) | (low >> 11).to(tl.int64)
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def points_below(x, offset):
    """How many of the points offset, 1 + offset, 2 + offset, ... lie below x.

    The fraction of x is exact, so the count is too; ceil(x - offset) would round first.
    """
    whole = tl.floor(x)
    return whole.to(tl.int64) + (x - whole > offset).to(tl.int64)


@triton.jit
def weight_units(b_weight):
    """A weight in [0, 1] as an int32 in units of 2**-23, rounded to nearest.

    Adding 2**23 leaves the integer in the mantissa: a conversion instruction is 8 times slower.
    """
    return (b_weight * 8388608.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000


@triton.jit(do_not_specialize=["N", "stride_mb"])
def span_kernel(
    p_mask,  # (B, N) uint8
    p_span,  # (B, 2) int32
    N: tl.int32,
    stride_mb: tl.int64,
    STRIDE_MN: tl.constexpr,
    HAS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """First and, if asked for, last visible key of each row, (N, -1) if none is; grid (B,).

    A kernel of its own: with a long left padding, programs that all looked for the first key
    themselves took longer than the scores (H100, 32k keys, half of them hidden: 45 us against 31).
    """
    i_b = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    p_mask += i_b * stride_mb
    first = N
    start = 0 * N
    while (first == N) & (start < N):
        o_n = start + tl.arange(0, BLOCK)
        seen = tl.load(p_mask + o_n.to(tl.int64) * STRIDE_MN, mask=o_n < N, other=0)
        first = tl.min(tl.where(seen != 0, o_n, N), axis=0)
        start += BLOCK
    tl.store(p_span + 2 * i_b, first)
    if HAS_LAST:
        last = 0 * N - 1
        stop = N
        while (last < 0) & (stop > 0):
            o_n = stop - BLOCK + tl.arange(0, BLOCK)
            seen = tl.load(p_mask + o_n.to(tl.int64) * STRIDE_MN, mask=o_n >= 0, other=0)
            last = tl.max(tl.where(seen != 0, o_n, -1), axis=0)
            stop -= BLOCK
        tl.store(p_span + 2 * i_b + 1, last)


@triton.jit
def log2_weights(b_dot, visible, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores as base-2 exponents: -inf where hidden, +inf where NaN (a maximum would drop a NaN).

    b_dot, visible: q k^T and a mask that broadcasts to it; scale: softmax scale * log2(e), with a
    soft cap the softmax scale / softcap, and softcap: the cap * log2(e).
    """
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)); the cap turns its absolute error of 2**-24 into the
        # rounding error that any score of the cap's size has.
        b_s = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(b_dot * (scale * 2.8853900817779268))))
    else:
        b_s = b_dot * scale
    b_s = tl.where(b_s == b_s, b_s, float("inf"))
    return tl.where(visible, b_s, float("-inf"))
