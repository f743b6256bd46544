"""Device code that the kernels share: the counter RNG and the walk over a row's visible keys."""

# ruff: noqa: N803 (constants of a kernel are capitals)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

LOG2E = 1.4426950408889634


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


@triton.jit
def first_visible(p_mask, stride_mn, N, BLOCK: tl.constexpr):
    """Index of the first True of a mask row, N if there is none; stops at the first block with one."""
    first = N
    start = 0 * N
    while (first == N) & (start < N):
        o_n = start + tl.arange(0, BLOCK)
        seen = tl.load(p_mask + o_n.to(tl.int64) * stride_mn, mask=o_n < N, other=0)
        first = tl.min(tl.where(seen != 0, o_n, N), axis=0)
        start += BLOCK
    return first


@triton.jit
def last_visible(p_mask, stride_mn, N, BLOCK: tl.constexpr):
    """Index of the last True of a mask row, -1 if there is none; scans from the end."""
    last = 0 * N - 1
    stop = N
    while (last < 0) & (stop > 0):
        o_n = stop - BLOCK + tl.arange(0, BLOCK)
        seen = tl.load(p_mask + o_n.to(tl.int64) * stride_mn, mask=o_n >= 0, other=0)
        last = tl.max(tl.where(seen != 0, o_n, -1), axis=0)
        stop -= BLOCK
    return last


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
