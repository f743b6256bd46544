"""Multi-head latent attention (DeepSeek V2, V3 and relatives): decoding over the latents themselves.

The cache of such a layer holds a latent c (B, 1, N, r) and a rotary key (B, 1, N, dr) per token, and the
layer's `expand_kv` turns the whole cache into keys and values of all heads at every step. With
W = kv_b_proj.weight = [W_k; W_v] for each head, a decode step needs neither (DeepSeek-V2, arXiv
2405.04434, section 2.1.2):

    score = (q_nope W_k) c^T + q_rot k_rot^T,        output = (softmax(score * scaling) c) W_v^T

`adopt` replaces `expand_kv` of a class by one that hands the latents through while attention is "santa",
so that the attention function may absorb W, or expand after all. W_k and W_v are views of the layer's
own weight: nothing is derived that could go stale when it is loaded, moved or merged.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

__all__ = [
    "absorb",
    "adopt",
    "adopt_at_load",
    "are_latents",
    "caches_latents",
    "expand",
    "project",
    "sampling_pays",
    "why_not_absorbed",
]

_Expand = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# The expand_kv that a class had; None where it must stay.
_expansions: dict[type, _Expand | None] = {}


def adopt(module: torch.nn.Module) -> None:
    """Let layers of the module's class hand their latents through, if that is safe; called at each step,
    and at load, see `adopt_at_load`.

    It is where the layer caches latents and expands them afterwards: sparse attention of Transformers
    5.17 expands first, and caches what it expanded.
    """
    layer = type(module)
    if layer in _expansions:
        return
    original = getattr(layer, "expand_kv", None)
    if original is None or not _expands_after_caching(layer):
        _expansions[layer] = None
        return

    @functools.wraps(original)
    def expand_kv(
        self: Any, latent: torch.Tensor, rotary_key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A subclass may use what it gets in a way of its own.
        if (
            self.config._attn_implementation != "santa"
            or _as_wide_as_heads(self, latent, rotary_key)
            or type(self) is not layer
        ):
            return original(self, latent, rotary_key)
        return latent, rotary_key

    _expansions[layer] = original
    layer.expand_kv = expand_kv  # type: ignore[attr-defined]


def _expands_after_caching(layer: type) -> bool:
    try:
        source = inspect.getsource(layer.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False
    update, expand_kv = source.find(".update("), source.find("self.expand_kv(")
    return 0 <= update < expand_kv


def adopt_at_load() -> None:
    """Adopt the layers of a model when it is made with attention "santa", or switched to it. May be
    called again.

    A layer has handed over its keys when a step adopts it: a graph traced at that step would keep
    expanding.
    """
    for name in ("post_init", "set_attn_implementation"):
        original = getattr(PreTrainedModel, name)
        if not hasattr(original, "_santa"):
            setattr(PreTrainedModel, name, _then_adopt(original))


def _then_adopt(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        returned = original(self, *args, **kwargs)
        for layer in self.modules():
            config = getattr(layer, "config", None)
            if (
                hasattr(layer, "expand_kv")
                and getattr(config, "_attn_implementation", None) == "santa"
            ):
                adopt(layer)
        return returned

    method._santa = True  # type: ignore[attr-defined]
    return method


def caches_latents(module: torch.nn.Module) -> bool:
    """Whether the module's class was adopted: what it expands, it expands at every step."""
    return _expansions.get(type(module)) is not None


def are_latents(module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether these are the latents and rotary keys that an adopted layer handed through, and no keys
    and values of its heads."""
    return (
        caches_latents(module)
        and value.shape[-1] == module.qk_rope_head_dim
        and not _as_wide_as_heads(module, key, value)
    )


def _as_wide_as_heads(module: Any, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether widths are those of expanded heads; of such latents nobody could tell what they are."""
    widths = _nope(module) + module.qk_rope_head_dim, _value(module)
    return bool((key.shape[-1], value.shape[-1]) == widths)


def expand(
    module: torch.nn.Module, latent: torch.Tensor, rotary_key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (B, H, N, dn + dr) and values (B, H, N, dv) as the model computes them."""
    original = _expansions[type(module)]
    assert original is not None
    return original(module, latent, rotary_key)


def why_not_absorbed(
    module: torch.nn.Module, query: torch.Tensor, latent: torch.Tensor
) -> str | None:
    """Why the layer's up-projection cannot be absorbed, in the words of the warning; None if it can."""
    linear: Any = getattr(module, "kv_b_proj", None)
    if type(linear) is not torch.nn.Linear or linear.bias is not None:
        return "kv_b_proj is not a plain linear layer (quantised, or wrapped by an adapter)"
    weight = _local_weight(linear)
    forward = linear.__dict__.get("forward")
    sharded = weight is not linear.weight and _is_tensor_parallel(forward)
    if linear._forward_hooks or linear._forward_pre_hooks or not (forward is None or sharded):
        return "kv_b_proj has hooks (offloaded or sharded)"
    rows = query.shape[1] * (_nope(module) + _value(module))
    plain = type(weight) in (torch.nn.Parameter, torch.Tensor)
    if not plain or weight.shape != (rows, latent.shape[-1]):
        return "the weight of kv_b_proj is not a plain one of the layer's heads"
    if weight.dtype != query.dtype or weight.device != query.device:
        return "the weight of kv_b_proj has another dtype or device than the query"
    if torch.is_grad_enabled() and weight.requires_grad:
        return "autograd needs a gradient"
    return None


def _is_tensor_parallel(forward: Any) -> bool:
    """Whether a linear layer's own `forward` is the one by which Transformers' tensor parallelism brings
    a sharded weight along. A wrapper around it copies its names, but not its globals."""
    written_in = getattr(forward, "__globals__", {}).get("__name__")
    return bool(written_in == "transformers.distributed.tensor_parallel")


def absorb(module: torch.nn.Module, query: torch.Tensor) -> torch.Tensor:
    """The query (B, H, 1, dn + dr) as one over latents and rotary keys: (B, H, 1, r + dr)."""
    nope = _nope(module)
    weight = _weight(module)[:, :nope]
    absorbed = torch.bmm(query[:, :, 0, :nope].transpose(0, 1), weight).transpose(0, 1)
    return torch.cat((absorbed[:, :, None], query[..., nope:]), -1)


def project(module: torch.nn.Module, out: torch.Tensor) -> torch.Tensor:
    """A mean of latents (B, H, 1, r) as the output of each head: (B, H, 1, dv)."""
    weight = _weight(module)[:, _nope(module) :]
    return torch.bmm(out[:, :, 0].transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)[
        :, :, None
    ]


def sampling_pays(device: torch.device) -> bool:
    """Whether `kernel="auto"` samples over latents, or computes them exactly as that is faster.

    Latents are read for the scores anyway, so sampling saves products and no traffic. On an H100 exact
    attention was faster on every shape measured but one, by 3% (eval/bench/results/mla.md). On a CPU
    products cost time, and the draws are what a kernel's are checked against: it always samples.
    """
    return device.type != "cuda"


def _nope(module: Any) -> int:
    return int(module.qk_nope_head_dim)


def _value(module: Any) -> int:
    return int(module.v_head_dim)


def _weight(module: Any) -> torch.Tensor:
    """kv_b_proj by heads: (H, dn + dv, r)."""
    weight = _local_weight(module.kv_b_proj)
    return weight.view(-1, _nope(module) + _value(module), weight.shape[1])


def _local_weight(linear: torch.nn.Linear) -> torch.Tensor:
    """The weight, or this rank's heads of one that tensor parallelism shards by heads (DeepSeek V2)."""
    weight = linear.weight
    if type(weight) is torch.nn.Parameter:
        return weight
    from torch.distributed.tensor import DTensor, Shard

    if isinstance(weight, DTensor) and weight.placements == (Shard(0),):
        return weight.to_local()
    return weight
