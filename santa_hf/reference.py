"""Every estimator in plain PyTorch: the oracle the kernels are checked against, and the CPU path.

Decode attention is `o = sum_i p_i v_i` with `p = softmax(q K^T * scaling)` over the visible keys.
SANTA (arXiv 2605.01910) draws indices from `p` and averages those rows of V, so that `E[o_hat] = o`
while only about `samples` value rows are read. Two facts define the draws:

* The visible keys of a row are cut into tiles of `TILE` keys, counted from its first visible key, so
  that left padding and unfilled cache slots change nothing.
* A draw picks a tile by the cumulative mass of the tiles (float64), then a row by the cumulative
  weight inside the tile. How the points are spread over that mass is the estimator:

  =============  =======================================================================
  `multinomial`  S independent points
  `stratified`   one point in each of S equal strata
  `systematic`   one grid (k + u) / S fixes the number of draws n_t of each tile; inside a
                 tile the points are (j + u_t) / n_t, with an offset u_t of its own
  =============  =======================================================================

  With the fixed budget per tile (`allocation="tile"`) every tile of `FIXED_TILE` keys gets
  ceil(samples / tiles) draws, and tiles are merged by their mass.

Scores are computed in float32 (float64 for float64 inputs); memory beyond the inputs is O(H N).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from .rng import Stream, uniform

__all__ = ["FIXED_TILE", "TILE", "Draws", "decode", "dense", "draw", "in_order", "length_of"]

TILE = 128
FIXED_TILE = 256

# 16-bit rows are widened a block at a time: 2048 of them stay in cache, and the upcast costs no
# traffic (bf16, H=32, KVH=8, D=128, N=32k, 2 cores: 6 ms in such blocks, 50 ms in blocks of 8192).
_BLOCK = 2048
# A gathered value row costs about as much as streaming this many (same shape, fp32: 1.5 ms for 4096
# rows against 5 ms for all 262144).
_GATHER_COST = 8
_BELOW_ONE = 1.0 - 2.0**-53


def length_of(states: torch.Tensor, rows: torch.Tensor | None) -> int:
    """Keys of a sequence: as many as `rows` (B, N) names, else all of `states` (B, KVH, N, D)."""
    return int(states.shape[2] if rows is None else rows.shape[1])


def in_order(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Copies of the keys or values that `rows` (B, N) names in `states`: (B, KVH, N, D)."""
    batch = torch.arange(len(rows), device=rows.device)[:, None]
    return states.transpose(1, 2)[batch, rows].transpose(1, 2)


@dataclass(frozen=True)
class Draws:
    """The value rows an estimator reads, and their weights.

    Attributes:
        index: int64 (B, KVH, G, S), key indices in [0, N).
        weight: float64, broadcastable to `index`; zero where a place holds no draw.
        mass: float64 (B, KVH, G, 1), the unnormalised softmax mass: 0 if no key is visible, NaN if
            a visible score is NaN or +inf.
    """

    index: torch.Tensor
    weight: torch.Tensor
    mass: torch.Tensor

    def counts(self, length: int) -> torch.Tensor:
        """Draws of each key: int64 (B, KVH, G, length)."""
        drawn = (self.weight != 0).expand_as(self.index).long()
        return drawn.new_zeros(*self.index.shape[:3], length).scatter_add_(3, self.index, drawn)

    def rows_read(self, length: int) -> torch.Tensor:
        """Distinct value rows read, summed over batch and KV heads: int64 scalar.

        The query heads of a group share a row, so it counts once per KV head.
        """
        drawn = (self.weight != 0).expand_as(self.index).flatten(2)
        read = self.index.new_zeros(*self.index.shape[:2], length)
        return read.scatter_reduce_(2, self.index.flatten(2), drawn.long(), "amax").sum()


@dataclass(frozen=True)
class _TiledSoftmax:
    """Unnormalised softmax in tiles: `cdf` (B, KVH, G, T, tile) runs inside a tile relative to the
    tile's own maximum, `mass` float64 (B, KVH, G, T) is relative to the row's maximum, `span` (B,) is
    the number of keys from the first to the last visible one, `first` (B,) the first, and `sink`
    (B, KVH, G, 1) the mass of the attention sink, if there is one."""

    cdf: torch.Tensor
    mass: torch.Tensor
    first: torch.Tensor
    span: torch.Tensor
    sink: torch.Tensor | None

    @property
    def total(self) -> torch.Tensor:
        """Mass of the whole row, float64 (B, KVH, G, 1)."""
        total = self.mass.sum(-1, keepdim=True)
        return total if self.sink is None else total + self.sink


def _scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """query (B, KVH, G, D), key (B, KVH, N, D) -> scaled scores (B, KVH, G, N), float32 or float64."""
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    length = key.shape[2]
    # Keys as the left operand: twice as fast as q @ k^T for a handful of query rows on a CPU. Rows of
    # the batch go one at a time, since folding batch and heads would copy a transposed cache.
    columns = (query.to(dtype) * scaling).transpose(-1, -2)
    scores = columns.new_empty(*query.shape[:3], length)
    if key.dtype == dtype:
        for row, column, score in zip(key, columns, scores, strict=True):
            score.copy_((row @ column).transpose(-1, -2))
        return scores
    block = min(_BLOCK, length)
    wide = columns.new_empty(key.shape[1], block, key.shape[3])
    for row, column, score in zip(key, columns, scores, strict=True):
        for start in range(0, length, block):
            keys = row[:, start : start + block]
            keys = wide[:, : keys.shape[1]].copy_(keys)
            score[:, :, start : start + block] = (keys @ column).transpose(-1, -2)
    return scores


def _all_scores(
    query: torch.Tensor, key: torch.Tensor, rotary_key: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """`_scores` of keys in one part, or of `key` and `rotary_key`, which share out query's columns."""
    if rotary_key is None:
        return _scores(query, key, scaling)
    own, rotary = query.split([key.shape[-1], rotary_key.shape[-1]], -1)
    return _scores(own, key, scaling).add_(_scores(rotary, rotary_key, scaling))


def _visible_span(
    mask: torch.Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """First visible key and number of keys up to the last visible one: two int64 (B,)."""
    if mask is None:
        first = torch.zeros(batch, dtype=torch.int64, device=device)
        return first, torch.full_like(first, length)
    row = mask[:, 0, 0].expand(batch, length)
    first = row.byte().argmax(-1)
    span = length - row.flip(-1).byte().argmax(-1) - first
    return first, torch.where(row.any(-1), span, 0)


def _tiled_softmax(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    tile: int,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    stash: bool = False,
    rotary_key: torch.Tensor | None = None,
) -> _TiledSoftmax:
    batch, _, length, _ = key.shape
    first, span = _visible_span(mask, batch, length, key.device)
    if mask is None:
        scores = _soft_capped(_all_scores(query, key, rotary_key, scaling), softcap)
    else:
        # Score only what some row can see: unfilled slots of a static cache cost nothing.
        low, high = int(first.min()), max(int((first + span).max()), int(first.min()) + 1)
        if rotary_key is not None:
            rotary_key = rotary_key[:, :, low:high]
        scores = _all_scores(query, key[:, :, low:high], rotary_key, scaling)
        scores = _soft_capped(scores, softcap)
        scores = scores.masked_fill_(~mask[..., low:high], -torch.inf)
        shift = first - low
        if bool(shift.any()):  # rows start at different keys: bring each first key to the front
            source = shift[:, None] + torch.arange(high - low, device=key.device)
            past_end = (source >= high - low)[:, None, None]
            source = source.clamp(max=high - low - 1)[:, None, None].expand_as(scores)
            scores = scores.gather(3, source).masked_fill_(past_end, -torch.inf)
    scores = pad(scores, (0, -scores.shape[-1] % tile), value=-torch.inf).unflatten(-1, (-1, tile))
    top = scores.amax(-1)
    scores = scores.sub_(top.masked_fill(top == -torch.inf, 0.0)[..., None]).exp_()
    if stash:
        scores = (scores.half().double() * 2**23).round_().mul_(2.0**-23)
    cdf = scores.cumsum_(-1)
    top = top.double()
    peak = top.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.double().view(1, *query.shape[1:3], 1)
        peak = torch.maximum(peak, sinks)
    level = peak.masked_fill(peak == -torch.inf, 0.0)
    mass = (top - level).exp() * cdf[..., -1]
    sink = None if sinks is None else (sinks - level).exp()
    return _TiledSoftmax(cdf, mass, first, span, sink)


def _soft_capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """cap * tanh(scores / cap), in place (Gemma 2, arXiv 2408.00118, section 2)."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _invert_tile(cdf: torch.Tensor, tile: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Rows at which the CDF of a tile passes a fraction of the tile's weight.

    cdf (B, KVH, G, T, tile); tile int64 and fraction float64 (B, KVH, G, S). Returns int64
    (B, KVH, G, S): the number of entries not above the point, by binary search. The point is kept
    strictly below the whole weight, so only a row that has weight is found.
    """
    width = cdf.shape[-1]
    flat = cdf.flatten(-2)
    base = tile * width
    whole = flat.gather(-1, base + width - 1).double()
    point = torch.minimum(fraction * whole, whole * (1.0 - 2.0**-52))
    row = torch.zeros_like(tile)
    step = width // 2
    while step:
        row += step * (flat.gather(-1, base + row + (step - 1)) <= point)
        step //= 2
    return row


def _draw_global(
    softmax: _TiledSoftmax,
    estimator: str,
    samples: int,
    coordinates: tuple[int | torch.Tensor, int, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws over the whole row: tile and fraction (B, KVH, G, S), weight ()."""
    mass = softmax.mass
    if softmax.sink is not None:
        mass = torch.cat((mass, softmax.sink), -1)
    prefix = mass.cumsum(-1)
    total = prefix[..., -1:]
    # Divided by its own last entry, or the number of draws would not be S.
    prefix = torch.where(total > 0, prefix / total, 1.0)
    k = torch.arange(samples, device=prefix.device)
    if estimator == "systematic":
        offset = uniform(*coordinates, k[:1], Stream.GRID)
        end = (prefix * samples - offset).ceil().long().clamp_(0, samples)
        end.masked_fill_(prefix == 1, samples)  # S - u may round to S - 1 where the mass is used up
        k = k.expand(*end.shape[:3], samples)
        tile = torch.searchsorted(end, k.contiguous(), right=True)
        start = pad(end, (1, 0)).gather(-1, tile)
        within = uniform(*coordinates, tile, Stream.TILE)
        fraction = (k - start + within) / (end.gather(-1, tile) - start)
    else:
        point = uniform(*coordinates, k, Stream.SAMPLE)
        if estimator == "stratified":
            point = (k + point) / samples
        point = point.expand(*prefix.shape[:3], samples).clamp(max=_BELOW_ONE)
        tile = torch.searchsorted(prefix, point.contiguous(), right=True)
        start = pad(prefix, (1, 0)).gather(-1, tile)
        fraction = (point - start) / (prefix.gather(-1, tile) - start)
    weight = prefix.new_tensor(1.0 / samples)
    if softmax.sink is not None:
        tiles = softmax.mass.shape[-1]
        weight = torch.where(tile < tiles, weight, 0.0)
        tile = tile.clamp_(max=tiles - 1)
    return tile, fraction, weight


def _draw_per_tile(
    softmax: _TiledSoftmax,
    estimator: str,
    samples: int,
    coordinates: tuple[int | torch.Tensor, int, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A fixed number of draws in every tile: tile, fraction, weight (B, KVH, G, T * draws)."""
    mass = softmax.mass
    tiles = (softmax.span + FIXED_TILE - 1).div(FIXED_TILE, rounding_mode="floor").clamp(min=1)
    draws = (samples + tiles - 1).div(tiles, rounding_mode="floor").view(-1, 1, 1, 1)
    t = torch.arange(mass.shape[-1], device=mass.device).repeat_interleave(int(draws.max()))
    j = torch.arange(int(draws.max()), device=mass.device).repeat(mass.shape[-1])
    if estimator == "systematic":
        fraction = (j + uniform(*coordinates, t, Stream.FIXED_TILE)) / draws
    else:
        fraction = uniform(*coordinates, t * draws + j, Stream.FIXED_SAMPLE)
        if estimator == "stratified":
            fraction = (j + fraction) / draws
    tile = t.expand(*mass.shape[:3], -1)
    weight = (mass / softmax.total / draws)[..., t]
    return tile, fraction.expand_as(weight), torch.where(j < draws, weight, 0.0)


def draw(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    samples: int,
    estimator: str,
    scaling: float,
    mask: torch.Tensor | None,
    seed: int | torch.Tensor,
    layer: int,
    position: torch.Tensor | None,
    head_offset: int = 0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    allocation: Literal["global", "tile"] = "global",
    stash: bool = False,
    rotary_key: torch.Tensor | None = None,
) -> Draws:
    """Draw value rows from the softmax of one decode step; arguments as in `santa_decode`.

    `allocation="global"` spreads the draws over the whole row, "tile" gives every tile of
    `FIXED_TILE` keys the same number (the paper's fused kernel, section on S2ANTA-flash). With
    `stash`, weights are rounded before anything is summed or drawn as the kernels round them, which
    leave them in memory between two passes: to float16, then to a multiple of 2**-23.
    """
    batch, heads, _, _ = query.shape
    kv_heads, length = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, -1)
    tile_size, draw_points = (
        (TILE, _draw_global) if allocation == "global" else (FIXED_TILE, _draw_per_tile)
    )
    softmax = _tiled_softmax(
        grouped, key, mask, scaling, tile_size, softcap, sinks, stash, rotary_key
    )
    if position is None:
        position = softmax.first + softmax.span - 1
    head = torch.arange(head_offset, head_offset + heads, device=key.device)
    if isinstance(seed, torch.Tensor):
        seed = seed.view(-1, 1, 1, 1)
    coordinates = (seed, layer, head.view(1, kv_heads, -1, 1), position.view(-1, 1, 1, 1))
    tile, fraction, weight = draw_points(softmax, estimator, samples, coordinates)
    index = _invert_tile(softmax.cdf, tile, fraction)
    index += tile * tile_size + softmax.first.view(-1, 1, 1, 1)
    return Draws(index.clamp_(max=length - 1), weight, softmax.total)


def _gathered(value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of value (B, KVH, N, Dv) at index (B, KVH, G, S): (B, KVH, G, S, Dv).

    As one index_select over the rows that start at any multiple of the strides' common divisor:
    indexing three dimensions at once takes ten times as long.
    """
    batch, head, row, _ = value.stride()
    unit = math.gcd(batch, head, row) or 1
    b = torch.arange(value.shape[0], device=value.device).view(-1, 1, 1, 1) * (batch // unit)
    h = torch.arange(value.shape[1], device=value.device).view(-1, 1, 1) * (head // unit)
    start = (b + h + index * (row // unit)).flatten()
    last = int(sum((value.shape[i] - 1) * value.stride(i) for i in range(3))) // unit
    rows = value.as_strided((last + 1, value.shape[-1]), (unit, 1))
    return rows.index_select(0, start).view(*index.shape, -1)


def _weighted_sum(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weight (B, KVH, G, N) and value (B, KVH, N, Dv), widened in blocks: (B, KVH, G, Dv)."""
    out = weight.new_zeros(*weight.shape[:3], value.shape[-1])
    for start in range(0, value.shape[2], _BLOCK):
        block = slice(start, start + _BLOCK)
        for total, w, v in zip(out, weight, value, strict=True):
            total += w[..., block] @ v[:, block].to(weight.dtype)
    return out


def average(value: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Weighted sum of the drawn rows of `value` (B, KVH, N, Dv): (B, H, 1, Dv), float32 or float64.

    Zero where no key is visible and NaN where a visible score is NaN, as SDPA does.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    batch, kv_heads, group, samples = draws.index.shape
    length = value.shape[2]
    weight = draws.weight.to(dtype).expand_as(draws.index)
    if group * samples * _GATHER_COST <= length:
        out = weight.unsqueeze(-2) @ _gathered(value, draws.index).to(dtype)
    else:
        rows = weight.new_zeros(batch, kv_heads, group, length)
        rows.scatter_add_(3, draws.index, weight)
        out = _weighted_sum(rows, value).unsqueeze(-2)
    mass = draws.mass[..., None]
    out = torch.where(mass > 0, out, mass.to(dtype))
    return out.view(batch, kv_heads * group, 1, -1)


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    rotary_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact decode attention on grouped queries, without repeating heads: (B, H, 1, Dv)."""
    batch, heads, _, _ = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], -1)
    if softcap is not None or sinks is not None or rotary_key is not None:
        scores = _soft_capped(_all_scores(grouped, key, rotary_key, scaling), softcap)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf)
        if sinks is not None:
            sinks = sinks.to(scores.dtype).view(1, *grouped.shape[1:3], 1).expand(batch, -1, -1, 1)
            scores = torch.cat((scores, sinks), -1)
        peak = scores.amax(-1, keepdim=True)
        weight = scores.sub_(peak.masked_fill(peak == -torch.inf, 0.0)).exp_()
        mass = weight.sum(-1, keepdim=True)
        out = _weighted_sum(weight[..., : key.shape[2]], value) / mass
        out = out.masked_fill(mass == 0, 0.0).to(query.dtype)
        return out.reshape(batch, heads, 1, value.shape[-1])
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, 1, value.shape[-1])


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    samples: int,
    estimator: str,
    scaling: float,
    mask: torch.Tensor | None,
    seed: int | torch.Tensor,
    layer: int,
    position: torch.Tensor | None,
    head_offset: int = 0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    exact: torch.Tensor | None = None,
    allocation: Literal["global", "tile"] = "global",
    rotary_key: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """One decode step of any estimator; arguments and result as in `decode_valid`."""
    if rows is not None:
        key, value = in_order(key, rows), in_order(value, rows)
    exactly = partial(
        dense,
        query,
        key,
        value,
        scaling=scaling,
        mask=mask,
        softcap=softcap,
        sinks=sinks,
        rotary_key=rotary_key,
    )
    if estimator == "dense" or (exact is not None and bool(exact.all())):
        return exactly()
    draws = draw(
        query,
        key,
        samples=samples,
        estimator=estimator,
        scaling=scaling,
        mask=mask,
        seed=seed,
        layer=layer,
        position=position,
        head_offset=head_offset,
        softcap=softcap,
        sinks=sinks,
        allocation=allocation,
        rotary_key=rotary_key,
    )
    out = average(value, draws).to(query.dtype)
    if exact is not None and bool(exact.any()):
        out = torch.where(exact.view(-1, 1, 1, 1), exactly(), out)
    return out
