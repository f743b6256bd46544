"""The torch.library operator that a compiled graph calls: its schema and its fake, no kernel.

Eager code never goes through it: a direct call is cheaper by several microseconds. The
implementation is registered by `functional.py`, and Triton is not imported here.
"""

from __future__ import annotations

import torch

__all__ = ["decode"]

torch.library.define(
    "santa_hf::decode",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? position, Tensor? row_seed, "
    "Tensor? sinks, Tensor? exact, Tensor? rotary_key, Tensor? rows, *, int seed, int samples, "
    "str estimator, float scaling, float? softcap, int layer, int head_offset, str implementation) "
    "-> Tensor",
)


@torch.library.register_fake("santa_hf::decode")
def _decode_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position: torch.Tensor | None,
    row_seed: torch.Tensor | None,
    sinks: torch.Tensor | None,
    exact: torch.Tensor | None,
    rotary_key: torch.Tensor | None,
    rows: torch.Tensor | None,
    **_: object,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], 1, value.shape[3])


decode = torch.ops.santa_hf.decode.default
