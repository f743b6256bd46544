"""Decode steps of the kernels, and what can run.

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
from functools import cache

import torch

from ..reference import in_order, length_of
from . import host
from .dense import DensePlan, dense, dense_plan
from .flash import flash
from .sample import SamplePlan, sample, sample_plan
from .scores import ScoresPlan, scores, scores_plan

__all__ = ["Plain", "fused", "prop", "why_not"]

# The integer prefix of pass 2 holds (N + 1) * 2**40, a sink included, in an int64.
MAX_LENGTH = 2**23 - 2
MAX_DIM = 1024
MAX_GROUP = 128
# With more draws pass 1 leaves sums of parts for pass 2, whose bytes fewer draws do not repay (H100,
# 4x32k, 256 draws: 97.5 us without them against 100.7).
MANY_DRAWS = 512
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
    mask, span = host.visible(mask, query.shape[0], position is None or exact is not None)
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
        dense(
            query, key, value, out, mask, span, scaling=scaling, softcap=softcap, sinks=sinks,
            only=exact, rows=rows,
        )  # fmt: skip
    return out


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
    mask, span = host.visible(mask, batch, True)
    if estimator == "dense":
        exact = None
    else:
        if rows is not None:
            key, value, rows = in_order(key, rows), in_order(value, rows), None
        flash(
            query, key, value, out, mask, span, samples=samples, estimator=estimator,
            scaling=scaling, seed=seed, layer=layer, position=position, head_offset=head_offset,
            softcap=softcap, sinks=sinks, only=None if exact is None else ~exact,
        )  # fmt: skip
    if estimator == "dense" or exact is not None:
        dense(
            query, key, value, out, mask, span, scaling=scaling, softcap=softcap, sinks=sinks,
            only=exact, rows=rows,
        )  # fmt: skip
    return out


class Plain:
    """Steps whose tensors differ in addresses and length alone: `prop` and `fused` without what they
    look up each time, which takes the host as long as the rest.

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
        self._drawn: dict[tuple[int, str, float], tuple[ScoresPlan, SamplePlan]] = {}
        self._exact: dict[float, DensePlan] = {}

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
        rows, span = host.visible(mask, self.batch, False)
        weights = plans[0](query, key, rows, span, None, None, length)
        out = query.new_empty(self.shape)
        plans[1](
            value, span, None, None, None, None, host.per_row(position, self.batch), weights, None, out,
            seed, layer, head_offset, length,
        )  # fmt: skip
        return out

    def _plans(self, samples: int, estimator: str, scaling: float) -> tuple[ScoresPlan, SamplePlan]:
        device, dtype, (batch, heads, *_), _ = self._query
        kv_heads, _ = self._key
        parts = samples > MANY_DRAWS
        first = scores_plan(
            *self._query, *self._key, scaling, None, self._mask, False, False, parts
        )
        second = sample_plan(
            device, dtype, batch, heads, kv_heads, *self._value, samples, estimator,
            self._mask is not None, False, False, False, False, True, False, parts,
        )  # fmt: skip
        if len(self._drawn) >= host.KEPT:
            self._drawn.clear()
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
            if len(self._exact) >= host.KEPT:
                self._exact.clear()
            plan = self._exact[scaling] = dense_plan(
                *self._query, *self._key, *self._value, scaling, None, self._mask, False, False, False
            )  # fmt: skip
        rows, span = host.visible(mask, self.batch, True)
        out = query.new_empty(self.shape)
        plan(query, key, value, rows, span, None, None, None, out, key.shape[2])
        return out


@cache
def _supported(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
