"""The kernels over latents: on a GPU, or on the CPU through Triton's interpreter.

They are compared with float64, and with the ordinary kernels on keys put together from their two parts:
pass 2 is the same code, so that only the scores' order of summation may move a draw.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from tolerance import attention, attention_budget, average_budget

from santa_hf import santa_decode

CUDA = torch.cuda.is_available()
if not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip(
        "needs a CUDA GPU or TRITON_INTERPRET=1, see test_kernels_interpreted.py",
        allow_module_level=True,
    )
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from santa_hf.kernels import host, latent, launch  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
F16 = torch.float16
BF16 = torch.bfloat16 if CUDA else F16  # the interpreter multiplies bfloat16 as integers
# (B, H, N, rank, rotary, dtype); the interpreter takes the first ones.
SHAPES: list[Any] = [
    (1, 5, 1, 20, 8, F16),
    (2, 6, 200, 32, 16, F16),
    (1, 70, 150, 40, 16, BF16),
] + [
    pytest.param(shape, marks=pytest.mark.gpu)
    for shape in (
        (1, 128, 5000, 512, 64, BF16),
        (3, 16, 3001, 512, 64, BF16),
        (2, 40, 900, 256, 32, F16),
        (33, 32, 129, 512, 64, BF16),
        (2, 128, 4001, 512, 64, BF16),
    )
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_mask = pytest.mark.parametrize("mask", [None, "padded", "holes"])


def case(
    shape: tuple[Any, ...], mask: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """query, latents, rotary keys, and the keywords that they are drawn with."""
    batch, heads, length, rank, rotary, dtype = shape
    generator = torch.Generator().manual_seed(length)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    visible = None
    if mask is not None:
        visible = torch.ones(batch, 1, 1, length, dtype=torch.bool)
        for b in range(batch if mask == "padded" else 0):
            visible[b, ..., : (b + 1) * length // (2 * batch + 2)] = False
            visible[b, ..., length - b % 3 * length // 9 :] = False
        if mask == "holes":
            visible &= torch.rand(batch, 1, 1, length, generator=generator) < 0.6
        visible = visible.to(DEVICE)
    # A cache with head room, its rows further apart than they are long.
    latents = normal(batch, 1, length + 3, rank + 8)[:, :, :length, :rank]
    return (
        normal(batch, heads, 1, rank + rotary),
        latents,
        normal(batch, 1, length + 5, rotary)[:, :, :length],
        {"scaling": 0.7 * (rank + rotary) ** -0.5, "mask": visible},
    )


@each_shape
@each_mask
def test_dense_is_as_near_to_float64_as_eager_code(
    shape: tuple[Any, ...], mask: str | None
) -> None:
    query, latents, rotary_key, keywords = case(shape, mask)
    out = latent.dense(query, latents, latents, rotary_key=rotary_key, **keywords)
    key = torch.cat((latents, rotary_key), -1)
    # Heads as if they were queries: keys of one head are not repeated for 128.
    query, out = query.transpose(1, 2), out.transpose(1, 2)
    expected = attention(query, key, latents, **keywords).nan_to_num(0.0)
    visible = keywords["mask"]
    if visible is not None:  # a row that sees nothing is NaN in eager code, and zero here
        seen = visible.any(-1).flatten()
        assert (out[~seen] == 0).all()
        out, expected = out[seen], expected[seen]
        query, key, latents, visible = query[seen], key[seen], latents[seen], visible[seen]
    if len(query):
        budget = attention_budget(query, key, latents, keywords["scaling"], visible)
        assert (out.double() - expected).abs().max() <= budget


@pytest.mark.parametrize("memory", [200_000, 20_000])
def test_dense_on_other_gpus(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 heads a program, and fewer keys a tile where there is less shared memory."""
    monkeypatch.setattr(latent, "_multiplies_64_rows", lambda device: False)
    monkeypatch.setattr(host, "shared_memory", lambda device: memory - 16 * 1024)
    query, latents, rotary_key, keywords = case((1, 70, 150, 40, 16, BF16), "padded")
    out = latent.dense(query, latents, latents, rotary_key=rotary_key, **keywords)
    query, out = query.transpose(1, 2), out.transpose(1, 2)
    key = torch.cat((latents, rotary_key), -1)
    exact = attention(query, key, latents, **keywords)
    budget = attention_budget(query, key, latents, keywords["scaling"], keywords["mask"])
    assert (out.double() - exact).abs().max() <= budget


# Heads beyond a block of 64 make no difference to them.
@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:], ids=str)
@pytest.mark.parametrize(
    ("estimator", "mask"),
    [("systematic", "padded"), ("systematic", None), ("multinomial", "holes")],
)
def test_draws_are_those_of_the_ordinary_kernels(
    shape: tuple[Any, ...], estimator: str, mask: str | None
) -> None:
    query, latents, rotary_key, keywords = case(shape, mask)
    batch, heads, samples = shape[0], shape[1], 20
    keywords |= {
        "samples": samples, "estimator": estimator, "seed": 7, "layer": 3, "position": None,
        "head_offset": 2,
    }  # fmt: skip
    index, expected = (
        torch.empty(batch, heads, samples, dtype=torch.int64, device=DEVICE) for _ in range(2)
    )
    out = latent.prop(query, latents, latents, rotary_key=rotary_key, index=index, **keywords)
    key = torch.cat((latents, rotary_key), -1)
    launch.prop(query, key, latents, index=expected, **keywords)
    assert (index != expected).float().mean() < 0.02
    seen = torch.ones(batch, dtype=torch.bool, device=DEVICE)
    if keywords["mask"] is not None:
        seen = keywords["mask"].any(-1).flatten()
        rows = keywords["mask"][:, 0, 0].gather(1, index.flatten(1).clamp(0, shape[2] - 1))
        assert rows[seen].all(), "a hidden key was drawn"
    rows = latents[:, 0][torch.arange(batch)[:, None, None], index.clamp(0, shape[2] - 1)]
    weight = torch.full((batch, heads, samples), 1 / samples, dtype=torch.float64, device=DEVICE)
    mean = (weight[..., None] * rows.double()).sum(2)
    error = (out[:, :, 0].double() - mean).abs()
    assert (error <= average_budget(weight, rows, out.dtype))[seen].all()
    assert (out[~seen] == 0).all()


@pytest.mark.parametrize("mask", [None, "padded"])
def test_exact_rows_are_dense_and_the_others_are_not_touched(mask: str | None) -> None:
    query, latents, rotary_key, keywords = case((2, 6, 200, 32, 16, F16), mask)
    step = {"rotary_key": rotary_key, "kernel": "prop", "samples": 4, **keywords}
    exact = torch.tensor([True, False], device=DEVICE)
    mixed = santa_decode(query, latents, latents, exact=exact, **step)
    sampled = santa_decode(query, latents, latents, **step)
    dense = santa_decode(query, latents, latents, estimator="dense", **step)
    assert torch.equal(mixed[0], dense[0])
    assert torch.equal(mixed[1], sampled[1])
    assert not torch.equal(sampled[0], dense[0])


@each_mask
def test_rows_of_a_batch_are_those_computed_alone_up_to_rounding(mask: str | None) -> None:
    """Also where the splits of one row fill a GPU, and those of a batch are too many for it."""
    query, latents, rotary_key, keywords = case(
        (33, 32, 5000, 512, 64, BF16) if CUDA else (4, 5, 2100, 20, 8, F16), mask
    )
    latents[1, 0, 1000] = torch.nan  # stays in its row
    together = latent.dense(query, latents, latents, rotary_key=rotary_key, **keywords)
    for b in (0, 1, 2, len(query) - 1):
        row = slice(b, b + 1)
        one = {**keywords, "mask": None if mask is None else keywords["mask"][row]}
        alone = latent.dense(
            query[row], latents[row], latents[row], rotary_key=rotary_key[row], **one
        )
        # Two orders of float32 sums, each rounded once.
        atol = 2 * torch.finfo(alone.dtype).eps * alone.nan_to_num().abs().max().item()
        torch.testing.assert_close(together[row], alone, rtol=0, atol=atol, equal_nan=True)
        assert alone.isfinite().all() == (b != 1)


def test_a_misspelt_keyword_is_refused() -> None:
    query, latents, rotary_key, keywords = case((1, 5, 9, 20, 8, F16), None)
    with pytest.raises(TypeError, match="maks"):
        latent.dense(query, latents, latents, rotary_key=rotary_key, maks=None, **keywords)


@pytest.mark.parametrize("kernel", ["flash", "prop", "auto"])
def test_dense_runs_whatever_kernel_would_sample(kernel: str) -> None:
    query, latents, rotary_key, keywords = case((2, 6, 200, 32, 16, F16), "padded")
    step = {"rotary_key": rotary_key, "estimator": "dense", **keywords}
    out = santa_decode(query, latents, latents, kernel=kernel, **step)
    expected = latent.dense(query, latents, latents, rotary_key=rotary_key, **keywords)
    if kernel == "auto" and not CUDA:  # which is the reference there
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    else:
        assert torch.equal(out, expected)


def test_what_cannot_run_is_refused_by_name() -> None:
    query, latents, rotary_key, keywords = case((1, 5, 9, 20, 8, F16), None)
    step = {"rotary_key": rotary_key, **keywords}
    with pytest.raises(NotImplementedError, match="one-pass sampling kernel over latents"):
        santa_decode(query, latents, latents, kernel="flash", **step)
    with pytest.raises(NotImplementedError, match="keys that are their own values"):
        santa_decode(query, latents, latents.clone(), kernel="prop", **step)
    step["rotary_key"] = rotary_key.float()
    with pytest.raises(NotImplementedError, match="16-bit"):
        santa_decode(query.float(), latents.float(), latents.float(), kernel="prop", **step)
