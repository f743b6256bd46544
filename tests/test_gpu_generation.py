"""Generation on a GPU: the kernels draw what the reference draws, in eager and in CUDA graphs."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import PreTrainedModel

pytestmark = pytest.mark.gpu

NEW_TOKENS = 8
PADDED = tiny.left_padded(tiny.prompts(300, 260))


def logits(model: PreTrainedModel, **kwargs: object) -> torch.Tensor:
    """Raw logits of the first sampled step (B, 1, vocabulary); later ones see other tokens."""
    inputs = {name: tensor.to(model.device) for name, tensor in PADDED.items()}
    out = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return torch.stack(out.logits, 1)[:, 1:2]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_kernels_draw_what_the_reference_draws(family: str, cache: str) -> None:
    model = tiny.build(family).cuda()
    exact = logits(tiny.use(model, tiny.baseline(family)), cache_implementation=cache)
    dense = logits(tiny.use(model, "santa", estimator="dense"), cache_implementation=cache)
    torch.testing.assert_close(dense, exact, rtol=2e-4, atol=2e-4)
    sampled = {}
    for kernel in ("auto", "reference"):
        tiny.use(model, "santa", samples=16, kernel=kernel, strict=True)
        # A static cache on a GPU makes generate compile the decode step and replay CUDA graphs;
        # the reference reads the mask on the host, which a graph cannot.
        compiled = {"disable_compile": True} if kernel == "reference" else {}
        sampled[kernel] = logits(model, cache_implementation=cache, **compiled)
    noise = (sampled["auto"] - exact).square().mean().sqrt()
    apart = (sampled["auto"] - sampled["reference"]).square().mean().sqrt()
    assert noise > 1e-2
    # The same draws, but where rounding moves one of 16 across a boundary; independent ones would be
    # apart by the noise times the square root of two.
    assert apart < 0.7 * noise
