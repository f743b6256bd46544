"""Counter-based randomness: every uniform is a pure function of where it is used.

A draw never depends on hidden state, on torch's generator, or on who else is in the batch. It is
Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
evaluated at

    key      = (seed & 0xffffffff, seed >> 32)
    counter  = (index, position, head, layer | stream << 24)

where `index` counts tiles or samples, `position` is the absolute 0-based position of the query
token, `head` is the query head counted over the whole layer, and `stream` says what the uniform is
for. Two uses with different coordinates are therefore independent, and layers never share draws.
"""

from __future__ import annotations

from enum import IntEnum

import torch

__all__ = ["MAX_LAYERS", "Stream", "philox4x32", "uniform"]

MAX_LAYERS = 1 << 24
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """What a uniform decides; part of the counter, so that no two uses collide."""

    GRID = 0  # systematic: the offset of the grid over the whole row, index 0
    TILE = 1  # systematic: the offset inside a tile, index = tile
    SAMPLE = 2  # stratified, multinomial: one uniform per draw, index = sample
    FIXED_TILE = 3  # fixed budget per tile, systematic: index = tile
    FIXED_SAMPLE = 4  # fixed budget per tile, others: index = tile * draws per tile + draw


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox 4x32-10 on int64 tensors that hold 32-bit words (Salmon et al. 2011, section 3.3).

    Args:
        counter: four int64 tensors of broadcastable shapes, values in [0, 2**32).
        key: two int64 tensors, broadcastable with the counter, values in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    k0, k1 = torch.broadcast_tensors(*key)
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    shape = torch.broadcast_shapes(c0.shape, k0.shape)
    c0, c1, c2, c3 = (word.expand(shape) for word in (c0, c1, c2, c3))
    # Both multiplications of a round are done at once, on a leading axis of two.
    even, odd = torch.stack((c0, c2)), torch.stack((c3, c1))
    multiplier = even.new_tensor(_MULTIPLIERS).view(2, *[1] * c0.ndim)
    schedule = even.new_tensor([[i * w & _WORD for w in _WEYL[::-1]] for i in range(_ROUNDS)])
    keys = torch.stack((k1, k0)).view(2, *[1] * (c0.ndim - k0.ndim), *k0.shape)
    keys = (keys + schedule.view(_ROUNDS, *multiplier.shape)) & _WORD
    for round_key in keys.unbind(0):
        product = even * multiplier  # wraps modulo 2**64, which keeps every bit we read
        even = (product >> 32).bitwise_and_(_WORD).bitwise_xor_(odd).bitwise_xor_(round_key)
        even, odd = even.flip(0), product.bitwise_and_(_WORD)
    (c0, c2), (c3, c1) = even.unbind(0), odd.unbind(0)
    return c0, c1, c2, c3


def uniform(
    seed: int | torch.Tensor,
    layer: int,
    head: torch.Tensor,
    position: torch.Tensor,
    index: torch.Tensor,
    stream: Stream,
) -> torch.Tensor:
    """Uniforms in [0, 1) with 53 random bits, a pure function of the arguments.

    Args:
        seed: int in [0, 2**63), or an int64 tensor broadcastable with the rest.
        layer: index of the layer, in [0, MAX_LAYERS).
        head: int64, the query head counted over the whole layer.
        position: int64, 0-based position of the query token; its low 32 bits are used.
        index: int64, the tile or the sample, see `Stream`.
        stream: what the uniforms are for.

    Returns:
        float64 of the broadcast shape of `seed`, `head`, `position` and `index`.

    Raises:
        ValueError: `layer` is out of range.
    """
    if not 0 <= layer < MAX_LAYERS:
        raise ValueError(f"layer must be in [0, {MAX_LAYERS}), got {layer}")
    seed = torch.as_tensor(seed, dtype=torch.int64, device=index.device)
    last = torch.tensor(layer | (int(stream) << 24), dtype=torch.int64, device=index.device)
    high, low, _, _ = philox4x32(
        (index & _WORD, position & _WORD, head, last), (seed & _WORD, (seed >> 32) & _WORD)
    )
    # 32 + 21 bits: exact in float64, and the largest value is 1 - 2**-53.
    return ((high << 21) | (low >> 11)).to(torch.float64) * 2.0**-53
