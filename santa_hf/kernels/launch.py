"""Host side of the kernels: what can run, tile choices, workspaces and launches.

Workspaces come from PyTorch's caching allocator at every call, so that layers and steps reuse the same
blocks, CUDA graphs keep them in their own pool, and streams and devices never share one. In bytes, with
T = ceil(N / 128) tiles and C chunks of 16, 32 or 64 draws (from 1, 129 and 513 samples on), and up to
127 more for each part, of which there are six at most:

    prop          B H (264 T + 4 Dv C + 4)    264 T = about 2 bytes a key and query head
                                              (296 T from 513 samples on, but for latents,
                                              which have chunks of 32 at most)
    dense, flash  B H (4 Dv + 8) splits       splits <= 2 * multiprocessors
"""

import os
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton

from ..reference import FIXED_TILE, TILE, in_order, length_of
from ..rng import Stream
from ..shared import once
from .common import LOG2E, span_kernel
from .dense import combine_kernel, dense_kernel
from .flash import flash_kernel
from .launcher import Launcher, Layout, Part
from .sample import sample_kernel
from .scores import scores_kernel

__all__ = ["Plain", "fused", "prop", "sample", "scores", "why_not"]

# The integer prefix of pass 2 holds (N + 1) * 2**40, a sink included, in an int64.
MAX_LENGTH = 2**23 - 2
MAX_DIM = 1024
MAX_GROUP = 128
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Choices measured on an H100, see eval/bench/results/kernels.md. None of them changes a draw. Launchers
# keep them: a change at run time comes too late for shapes that have run.
MIN_GROUP = 4  # rows that a group of query heads is padded to
SCORE_WARPS = 8
PART = 16  # keys of a tile that a draw passes at a time
FEW_TILES, MANY_TILES = 64, 256  # tiles that pass 2 walks over at a time, by the length of the row
MERGE_CHUNKS = 16  # partial sums of a head that are added at a time
# Draws up to which a program of pass 2 takes 16, and 32. With more it takes 64, and sums of parts from
# pass 1, whose bytes fewer draws do not repay (H100, 4x32k, 256 draws: 97.5 us against 100.7).
FEW_DRAWS, MANY_DRAWS = 128, 512
SPLIT_WAVES = 1  # programs a multiprocessor that the splits of one row aim at
FLASH_WARPS = 4
FLASH_GROUP = 16  # query heads of a program at most
DENSE_TILE = 128
DENSE_STAGES = 2
DENSE_WARPS = 8
COMBINE_SPLITS, COMBINE_COLUMNS = 128, 32  # splits at a time at most, columns of V at least
COMBINE_SIZE, COMBINE_WARPS = 512, 1  # sums of a program

# Entries of each cache of what follows from shapes and strides. A model needs a few; a cache that is
# copied at every step, whose strides grow with it, adds one or two a step.
KEPT = 1024


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


def why_not(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor | None = None
) -> str | None:
    """Why the Triton kernels cannot run on these tensors, in the words of an error; None if they can."""
    if query.device.type != "cuda" and not _INTERPRETED:
        return f"Triton kernels need a CUDA device, and query is on {query.device}"
    if query.device.type != "cuda" and query.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16"
    if query.is_cuda and not _supported(query.device):
        return "Triton kernels need an NVIDIA GPU of compute capability 8.0 or newer"
    if query.dtype == torch.float64:
        return "Triton kernels compute in float32, and query is float64"
    if max(query.shape[-1], value.shape[-1]) > MAX_DIM:
        return f"Triton kernels take head dimensions up to {MAX_DIM}"
    if query.shape[1] > MAX_GROUP * key.shape[1]:
        return f"Triton kernels take up to {MAX_GROUP} query heads per KV head"
    if length_of(key, rows) > MAX_LENGTH:
        return f"Triton kernels take up to {MAX_LENGTH} keys"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return "Triton kernels have no backward pass"
    return None


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
    plan = _scores_plan(
        query.device, query.dtype, query.shape, query.stride(), key.shape[1], key.stride(), scaling,
        softcap, None if mask is None else mask.stride(1), rows is not None, exact is not None, parts,
    )  # fmt: skip
    length = length_of(key, rows)
    return plan(query, key, mask, span, _contiguous(rows), as_bytes(exact), length)


@lru_cache(KEPT)
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


class _Scores(NamedTuple):
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
        launcher, device, batch, kv_heads, group, parts, scale, strides = self
        n_tiles = ceil_div(length, TILE)
        weights = Weights(*weights_layout(batch, kv_heads, n_tiles, group, parts).allocate(device))
        launcher(
            (n_tiles, kv_heads, batch),
            query, key, mask, span, rows, exact, weights.stash, weights.parts, weights.top,
            weights.total, weights.done, *scale, length, *strides, mask_stride(mask, 0),
        )  # fmt: skip
        return weights


@lru_cache(KEPT)
def _scores_plan(
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
) -> _Scores:
    batch, heads, _, dim = shape
    group = heads // kv_heads
    launcher = _scores_launcher(
        device, group, dim, key_strides[2], stride_mn or 0, stride_mn is not None, has_rows, has_exact,
        softcap is not None, parts, _alignment(dtype, batch, heads, strides),
        _alignment(dtype, batch, kv_heads, key_strides),
    )  # fmt: skip
    scalars = (*strides[:2], *key_strides[:2])
    scale = _exponent_scale(scaling, softcap)
    return _Scores(launcher, device, batch, kv_heads, group, parts, scale, scalars)


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
        BLOCK_G=_block_of_group(group),
        BLOCK_D=_block_of(dim),
        num_warps=SCORE_WARPS,
        num_stages=1,
        **dependent(device),
    )


def prop(
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
    rows: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sampled decode step in two passes; arguments and result as in `decode_valid`.

    `index`, int64 (B, H, samples), receives the keys drawn, -1 where a draw fell on the sink.
    """
    mask, span = visible(mask, query.shape[0], position is None or exact is not None)
    weights = scores(
        query, key, scaling=scaling, mask=mask, span=span, exact=exact, softcap=softcap, rows=rows,
        parts=samples > MANY_DRAWS,
    )  # fmt: skip
    out = query.new_empty(*query.shape[:3], value.shape[3])
    sample(
        value, span, weights, out, samples=samples, estimator=estimator, seed=seed, layer=layer,
        position=position, head_offset=head_offset, sinks=sinks, exact=exact, rows=rows, index=index,
    )  # fmt: skip
    if exact is not None:
        _dense(
            query, key, value, out, mask, span, scaling=scaling, softcap=softcap, sinks=sinks,
            only=exact, rows=rows,
        )  # fmt: skip
    return out


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
    row_seed, seed = (_per_row(seed, batch), 0) if isinstance(seed, torch.Tensor) else (None, seed)
    plan = _sample_plan(
        out.device, value.dtype, batch, heads, value.shape[1], value_dim, value.stride(), samples,
        estimator, span is not None, rows is not None, exact is not None, sinks is not None,
        row_seed is not None, position is not None, index is not None, weights.parts is not None,
    )  # fmt: skip
    plan(
        value, span, _contiguous(rows), as_bytes(exact), _contiguous(sinks), row_seed,
        _per_row(position, batch), weights, index, out, seed, layer, head_offset,
        length_of(value, rows),
    )  # fmt: skip


class _Sample(NamedTuple):
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
        launcher, device, grid, layout, samples, strides = self
        stash, top, total, done, parts = weights
        partial = out if layout is None else layout.allocate(device)[0]
        launcher(
            grid,
            value, span, rows, exact, sinks, row_seed, position, stash, parts, top, total, done,
            partial, index, out, seed, length - 1, layer, head_offset, samples, length, top.shape[2],
            *strides,
        )  # fmt: skip


@lru_cache(KEPT)
def _sample_plan(
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
) -> _Sample:
    launcher = _sample_launcher(
        device, samples <= FEW_DRAWS, estimator, heads // kv_heads, value_dim, strides[2],
        *has, _alignment(dtype, batch, kv_heads, strides),
    )  # fmt: skip
    chunks = ceil_div(samples, launcher.constants["BLOCK_S"])
    partial = Layout(((batch, heads, chunks, value_dim), torch.float32)) if chunks > 1 else None
    return _Sample(launcher, device, (chunks, heads, batch), partial, samples, strides[:2])


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
        BLOCK_DV=_block_of(value_dim),
        **_sample_blocks(few, has_parts),
        **dependent(device),
    )


def fused(
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
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """One decode step in one pass, exact or with a fixed budget per tile; as in `decode_valid`.

    Fixed budgets are drawn from copies of the keys and values that `rows` names.
    """
    batch, heads = query.shape[:2]
    out = query.new_empty(batch, heads, 1, value.shape[-1])
    mask, span = visible(mask, batch, True)
    if estimator == "dense":
        exact = None
    else:
        if rows is not None:
            key, value, rows = in_order(key, rows), in_order(value, rows), None
        _flash(
            query, key, value, out, mask, span, samples=samples, estimator=estimator,
            scaling=scaling, seed=seed, layer=layer, position=position, head_offset=head_offset,
            softcap=softcap, sinks=sinks, only=None if exact is None else ~exact,
        )  # fmt: skip
    if estimator == "dense" or exact is not None:
        _dense(
            query, key, value, out, mask, span, scaling=scaling, softcap=softcap, sinks=sinks,
            only=exact, rows=rows,
        )  # fmt: skip
    return out


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    mask: torch.Tensor | None,
    span: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    only: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    """Exact attention for the rows of `out` that `only`, bool (B,), names; None for all."""
    plan = _dense_plan(
        query.device, query.dtype, query.shape, query.stride(), key.shape[1], key.stride(),
        value.shape[3], value.stride(), scaling, softcap, None if mask is None else mask.stride(1),
        rows is not None, only is not None, sinks is not None,
    )  # fmt: skip
    plan(
        query, key, value, mask, span, _contiguous(rows), as_bytes(only), _contiguous(sinks), out,
        length_of(key, rows),
    )  # fmt: skip


class _Dense(NamedTuple):
    """Exact attention of steps that differ in addresses and length alone."""

    launcher: Launcher
    merge: Launcher
    device: torch.device
    shape: tuple[int, int, int, int]  # B, H, KVH, Dv
    value_blocks: int
    most: int  # splits of a long row
    scale: tuple[float, float]
    strides: tuple[int, ...]

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        span: torch.Tensor | None,
        rows: torch.Tensor | None,
        only: torch.Tensor | None,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        length: int,
    ) -> None:
        launcher, merge, device, shape, value_blocks, most, scale, strides = self
        batch, heads, kv_heads, value_dim = shape
        split_tiles, splits = _splits(length, DENSE_TILE, most)
        partial, top, mass = partials(batch, heads, splits, value_dim).allocate(device)
        launcher(
            (splits * value_blocks, kv_heads, batch),
            query, key, value, mask, span, rows, only, partial, top, mass, *scale, length,
            split_tiles, *strides, mask_stride(mask, 0),
        )  # fmt: skip
        columns = merge.constants["BLOCK_DV"]
        merge(
            (ceil_div(value_dim, columns), heads, batch),
            partial, top, mass, only, sinks, out, splits,
        )  # fmt: skip


@lru_cache(KEPT)
def _dense_plan(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    kv_heads: int,
    key_strides: tuple[int, ...],
    value_dim: int,
    value_strides: tuple[int, ...],
    scaling: float,
    softcap: float | None,
    stride_mn: int | None,
    has_rows: bool,
    has_only: bool,
    has_sinks: bool,
) -> _Dense:
    batch, heads, _, dim = shape
    block_g = _block_of_group(heads // kv_heads)
    block_d, block_dv = _one_pass_blocks(dtype, dim, value_dim, block_g)
    tile_bytes = DENSE_TILE * (dim + block_dv) * dtype.itemsize
    value_blocks = ceil_div(value_dim, block_dv)
    most = _most_splits(kv_heads * value_blocks, device)
    launcher = _dense_launcher(
        device, heads // kv_heads, dim, value_dim, key_strides[2], value_strides[2],
        stride_mn or 0, stride_mn is not None, has_rows, has_only, softcap is not None,
        _alignment(dtype, batch, heads, strides), _alignment(dtype, batch, kv_heads, key_strides),
        _alignment(dtype, batch, kv_heads, value_strides), block_g, block_d, block_dv, value_blocks,
        _stages(DENSE_STAGES, tile_bytes, device),
    )  # fmt: skip
    merge = _combine_launcher(device, value_dim, most, has_only, has_sinks)
    scalars = (*strides[:2], *key_strides[:2], *value_strides[:2])
    scale = _exponent_scale(scaling, softcap)
    rows = batch, heads, kv_heads, value_dim
    return _Dense(launcher, merge, device, rows, value_blocks, most, scale, scalars)


@cache
def _dense_launcher(
    device: torch.device,
    group: int,
    dim: int,
    value_dim: int,
    stride_kn: int,
    stride_vn: int,
    stride_mn: int,
    has_mask: bool,
    has_rows: bool,
    has_only: bool,
    has_softcap: bool,
    align_q: int,
    align_k: int,
    align_v: int,
    block_g: int,
    block_d: int,
    block_dv: int,
    value_blocks: int,
    stages: int,
) -> Launcher:
    return Launcher(
        dense_kernel,
        device,
        STRIDE_KN=stride_kn,
        STRIDE_VN=stride_vn,
        STRIDE_MN=stride_mn,
        G=group,
        D=dim,
        DV=value_dim,
        HAS_MASK=has_mask,
        HAS_ROWS=has_rows,
        HAS_ONLY=has_only,
        HAS_SOFTCAP=has_softcap,
        TILE=DENSE_TILE,
        ALIGN_Q=align_q,
        ALIGN_K=align_k,
        ALIGN_V=align_v,
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        VALUE_BLOCKS=value_blocks,
        num_warps=DENSE_WARPS,
        num_stages=stages,
        **dependent(device),
    )


class Plain:
    """Steps that differ in addresses and length, layer and seed alone: `prop` and `fused` without what
    they look up each time, which takes the host as long as the rest.

    Rows, exact rows, soft caps, sinks and seeds of each row go the long way.

    Args:
        query: (B, H, 1, D). key: (B, KVH, N, D). value: (B, KVH, N, Dv). mask: bool (B or 1, 1, 1, N)
            or None: those of one step, which `are_valid` and `why_not` let pass.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> None:
        self.batch, heads, _, _ = query.shape
        self.shape = (self.batch, heads, 1, value.shape[3])
        self._query = (query.device, query.dtype, query.shape, query.stride())
        self._key = (key.shape[1], key.stride())
        self._value = (value.shape[3], value.stride())
        self._mask = None if mask is None else mask.stride(3)
        self._drawn: dict[tuple[int, str, float], tuple[_Scores, _Sample]] = {}
        self._exact: dict[float, _Dense] = {}

    def prop(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        position: torch.Tensor,
        samples: int,
        estimator: str,
        scaling: float,
        seed: int,
        layer: int,
        head_offset: int,
    ) -> torch.Tensor:
        """As `prop`, of tensors like those that this was made of."""
        plans = self._drawn.get((samples, estimator, scaling))
        if plans is None:
            plans = self._plans(samples, estimator, scaling)
        length = key.shape[2]
        bytes_, span = visible(mask, self.batch, False)
        weights = plans[0](query, key, bytes_, span, None, None, length)
        out = query.new_empty(self.shape)
        plans[1](
            value, span, None, None, None, None, _per_row(position, self.batch), weights, None, out,
            seed, layer, head_offset, length,
        )  # fmt: skip
        return out

    def _plans(self, samples: int, estimator: str, scaling: float) -> tuple[_Scores, _Sample]:
        device, dtype, (batch, heads, *_), _ = self._query
        kv_heads, _ = self._key
        parts = samples > MANY_DRAWS
        first = _scores_plan(
            *self._query, *self._key, scaling, None, self._mask, False, False, parts
        )
        second = _sample_plan(
            device, dtype, batch, heads, kv_heads, *self._value, samples, estimator,
            self._mask is not None, False, False, False, False, True, False, parts,
        )  # fmt: skip
        self._drawn[samples, estimator, scaling] = first, second
        return first, second

    def dense(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """As `fused` with estimator "dense", of tensors like those that this was made of."""
        plan = self._exact.get(scaling)
        if plan is None:
            plan = self._exact[scaling] = _dense_plan(
                *self._query,
                *self._key,
                *self._value,
                scaling,
                None,
                self._mask,
                False,
                False,
                False,
            )
        bytes_, span = visible(mask, self.batch, True)
        out = query.new_empty(self.shape)
        plan(query, key, value, bytes_, span, None, None, None, out, key.shape[2])
        return out


def _flash(
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
    row_seed, seed = (_per_row(seed, batch), 0) if isinstance(seed, torch.Tensor) else (None, seed)
    block_g = min(_block_of_group(group), FLASH_GROUP)
    block_d, block_dv = _one_pass_blocks(query.dtype, dim, value_dim, block_g)
    value_blocks, group_blocks = ceil_div(value_dim, block_dv), ceil_div(group, block_g)
    most = _most_splits(kv_heads * value_blocks * group_blocks, device)
    split_tiles, splits = _splits(length, FIXED_TILE, most)
    partial, top, mass = partials(batch, heads, splits, value_dim).allocate(device)
    launcher = _flash_launcher(
        device, estimator, group, dim, value_dim, stride_kn, stride_vn, mask_stride(mask, 1),
        mask is not None, only is not None, softcap is not None, row_seed is not None,
        position is not None, alignment(query), alignment(key), alignment(value), block_g, block_d,
        block_dv, value_blocks, group_blocks,
    )  # fmt: skip
    launcher(
        (splits * value_blocks * group_blocks, kv_heads, batch),
        query, key, value, mask, span, as_bytes(only), row_seed, _per_row(position, batch),
        partial, top, mass, *_exponent_scale(scaling, softcap), seed, layer, head_offset, samples,
        length, split_tiles, query.stride(0), query.stride(1), stride_kb, stride_kh, stride_vb,
        stride_vh, mask_stride(mask, 0),
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
        num_warps=FLASH_WARPS,
        num_stages=1,
        **dependent(device),
    )


@lru_cache(KEPT)
def partials(batch: int, heads: int, splits: int, value_dim: int) -> Layout:
    """Room for unnormalised outputs (B, H, splits, Dv), their maxima and their masses (B, H, splits)."""
    rows = batch, heads, splits
    return Layout(((*rows, value_dim), torch.float32), (rows, torch.float32), (rows, torch.float32))


def combine(
    partial: Part,
    top: Part,
    mass: Part,
    out: torch.Tensor,
    splits: int,
    most: int,
    sinks: torch.Tensor | None,
    only: torch.Tensor | None,
) -> None:
    """Merge splits, see `combine_kernel`; `most` is how many there would be of a long row."""
    batch, heads, _, value_dim = out.shape
    launcher = _combine_launcher(out.device, value_dim, most, only is not None, sinks is not None)
    launcher(
        (ceil_div(value_dim, launcher.constants["BLOCK_DV"]), heads, batch),
        partial, top, mass, as_bytes(only), _contiguous(sinks), out, splits,
    )  # fmt: skip


@cache
def _combine_launcher(
    device: torch.device, value_dim: int, most: int, has_only: bool, has_sinks: bool
) -> Launcher:
    block_s = min(triton.next_power_of_2(most), COMBINE_SPLITS)
    block_dv = min(triton.next_power_of_2(value_dim), max(COMBINE_COLUMNS, COMBINE_SIZE // block_s))
    return Launcher(
        combine_kernel,
        device,
        DV=value_dim,
        HAS_ONLY=has_only,
        HAS_SINKS=has_sinks,
        BLOCK_S=block_s,
        BLOCK_DV=block_dv,
        num_warps=COMBINE_WARPS,
        **dependent(device),
    )


def _stages(wanted: int, tile_bytes: int, device: torch.device) -> int:
    """Software pipeline stages whose tiles fit in shared memory."""
    return max(1, min(wanted, shared_memory(device) // tile_bytes))


@cache
def _one_pass_blocks(dtype: torch.dtype, dim: int, value_dim: int, block_g: int) -> tuple[int, int]:
    """Columns of K and V handled at a time, such that tiles fit in memory."""
    wide = dtype == torch.float32
    block_d = min(_block_of(dim), 32 if wide else 128)
    block_dv = min(triton.next_power_of_2(value_dim), 64 if wide else 256, 4096 // block_g)
    return block_d, max(block_dv, 16)


@cache
def _most_splits(programs: int, device: torch.device) -> int:
    """Splits of a long row, with `programs` for each: by the layer's shape and the GPU, never by the
    batch, so that a row is computed alike alone and in a batch."""
    return triton.next_power_of_2(ceil_div(SPLIT_WAVES * processors(device), programs))


def _splits(length: int, tile: int, most: int) -> tuple[int, int]:
    """Tiles of a split, and splits, at most `most`, of a row of `length` keys."""
    tiles = ceil_div(length, tile)
    split_tiles = ceil_div(tiles, most)
    return split_tiles, ceil_div(tiles, split_tiles)


@cache
def _supported(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that the tiles of a program may take, with room left for its reductions."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    # 99 KiB is what the smallest GPUs of the generations with asynchronous copies have.
    available = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return int(available) - 16 * 1024


@cache
def dependent(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that may be launched before the one it depends on has ended (Hopper and
    later): it waits on the device before it reads anything."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def ceil_div(a: int, b: int) -> int:
    """Triton's own, made for compiled code, costs the host more than a microsecond."""
    return -(-a // b)


@cache
def _block_of_group(group: int) -> int:
    """Query heads of a KV head in one product."""
    return max(MIN_GROUP, triton.next_power_of_2(group))


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


@cache
def _block_of(dim: int) -> int:
    """Columns of K or V handled at a time: all of them up to 128, else an even division."""
    if dim <= 128:
        return max(16, triton.next_power_of_2(dim))
    return 128 if dim % 128 == 0 or dim % 64 else 64


def alignment(tensor: torch.Tensor) -> int:
    """Elements, at most 16 bytes of them, that the start of every head of a query, of K or of V is a
    multiple of."""
    batch, heads, *_ = tensor.shape
    return _alignment(tensor.dtype, batch, heads, tensor.stride())


def _alignment(dtype: torch.dtype, batch: int, heads: int, strides: tuple[int, ...]) -> int:
    offset = 16 // dtype.itemsize
    if batch > 1:
        offset |= strides[0]
    if heads > 1:
        offset |= strides[1]
    return offset & -offset  # the lowest bit set in any of them


def _exponent_scale(scaling: float, softcap: float | None) -> tuple[float, float]:
    """Scale and cap of base-2 scores, see `log2_weights`."""
    if softcap is None:
        return scaling * LOG2E.value, 0.0
    return scaling / softcap, softcap * LOG2E.value


def visible(
    mask: torch.Tensor | None, batch: int, has_last: bool
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """The mask as bytes (B, N), of stride 0 where it has one row, and its span, see `span_kernel`."""
    if mask is None:
        return None, None
    return once(mask, ("span", batch, has_last), lambda: _visible(mask, batch, has_last))


def _visible(mask: torch.Tensor, batch: int, has_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows = _rows(mask, batch)
    span = torch.empty((batch, 2), dtype=torch.int32, device=mask.device)
    launcher = _span_launcher(mask.device, rows.stride(1), has_last)
    launcher((batch,), rows, span, rows.shape[1], rows.stride(0))
    return rows, span


def _rows(mask: torch.Tensor, batch: int) -> torch.Tensor:
    # Of mask.data: a mask that keeps its rows, and they it, would never be freed.
    row_stride = 0 if mask.shape[0] == 1 else mask.stride(0)
    rows = mask.data.view(torch.uint8)
    return rows.as_strided((batch, mask.shape[3]), (row_stride, mask.stride(3)))


@cache
def _span_launcher(device: torch.device, stride_mn: int, has_last: bool) -> Launcher:
    return Launcher(
        span_kernel,
        device,
        STRIDE_MN=stride_mn,
        HAS_LAST=has_last,
        BLOCK=4096,
        PDL=dependent(device)["PDL"],
        num_warps=16,
    )


def mask_stride(rows: torch.Tensor | None, axis: int) -> int:
    return 0 if rows is None else rows.stride(axis)


def as_bytes(rows: torch.Tensor | None) -> torch.Tensor | None:
    return None if rows is None else rows.contiguous().view(torch.uint8)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _per_row(values: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """int64 (B,) without gaps, from (B,) or one value for all rows."""
    if values is None:
        return None
    return (values if values.shape == (batch,) else values.expand(batch)).contiguous()
