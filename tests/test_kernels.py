"""The Triton kernels against the reference: on a GPU, or on the CPU through Triton's interpreter.

Coupled tests give both sides the same uniforms. Pass 1 leaves rounded weights, which are bounded against
float64; the draws of pass 2 are then compared with the reference's draws *from those very weights*, so
that only a draw within rounding of a boundary may differ, and the test measures how near it is.
"""

from __future__ import annotations

import importlib.util
import math
import os
from fractions import Fraction
from typing import Any

import pytest
import torch
from tolerance import ALPHA, assert_mean, attention_budget, average_budget, gamma, score_budget

from santa_hf import reference, santa_decode
from santa_hf.rng import Stream, uniform

CUDA = torch.cuda.is_available()
if not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip(
        "needs a CUDA GPU or TRITON_INTERPRET=1, see test_kernels_interpreted.py",
        allow_module_level=True,
    )
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from santa_hf.kernels import common, flash, launch  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
ESTIMATORS = ("systematic", "stratified", "multinomial")
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)

# (B, H, KVH, N, D, Dv, dtype); the interpreter takes the first ones.
F32, F16 = torch.float32, torch.float16
# The interpreter multiplies bfloat16 as integers.
BF16 = torch.bfloat16 if CUDA else torch.float16
SMALL = [
    (1, 2, 1, 1, 32, 32, F32),
    (2, 6, 2, 300, 64, 40, F16),
    (1, 5, 1, 129, 40, 64, BF16),
    (1, 7, 1, 513, 80, 96, F32),
]
LARGE = [
    (3, 12, 4, 1000, 128, 128, BF16),
    (1, 16, 1, 700, 576, 512, BF16),
    (2, 8, 8, 640, 96, 192, F16),
    (1, 128, 1, 400, 64, 64, BF16),
    (2, 28, 4, 2500, 128, 128, BF16),
    (4, 9, 3, 999, 256, 80, F32),
    (1, 32, 8, 40000, 128, 128, BF16),
    (256, 8, 2, 300, 64, 64, BF16),
    (1, 4, 1, 900, 512, 256, F16),
]
SHAPES = SMALL + [
    pytest.param(shape, marks=pytest.mark.gpu, id="-".join(map(str, shape))) for shape in LARGE
]


def case(
    shape: tuple[Any, ...], mask: str | None = None, spread: float = 1.0, source: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """query, key, value and the keywords that they are drawn with."""
    batch, heads, kv_heads, length, dim, value_dim, dtype = shape
    generator = torch.Generator().manual_seed(source)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    query = normal(batch, heads, 1, dim) * spread
    key, value = normal(batch, kv_heads, length, dim), normal(batch, kv_heads, length, value_dim)
    keywords: dict[str, Any] = {
        "samples": 50,
        "estimator": "systematic",
        "scaling": dim**-0.5,
        "mask": None,
        "seed": 7,
        "layer": 3,
        "position": None,
    }
    if mask is not None:
        visible = torch.ones(batch, 1, 1, length, dtype=torch.bool)
        if mask in ("left padding", "both"):
            for b in range(batch):
                visible[b, ..., : (b + 1) * length // (2 * batch + 2)] = False
        if mask in ("static tail", "both"):
            visible[..., -(length // 4) :] = length < 4
        if mask == "holes":
            visible &= torch.rand(batch, 1, 1, length, generator=generator) < 0.5
        if mask == "expanded":
            visible = visible[:1, ..., :1].expand(batch, 1, 1, length)
        keywords["mask"] = visible.to(DEVICE)
    return query, key, value, keywords


def kernel_draws(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keywords: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, 1, Dv) of the two passes and the keys they drew (B, KVH, G, S)."""
    batch, heads = query.shape[:2]
    index = torch.empty(batch, heads, keywords["samples"], dtype=torch.int64, device=DEVICE)
    out = launch.prop(query, key, value, **keywords, index=index)
    return out, index.view(batch, key.shape[1], -1, keywords["samples"])


def kernel_softmax(
    query: torch.Tensor, key: torch.Tensor, keywords: dict[str, Any]
) -> reference._TiledSoftmax:
    """The weights that pass 1 leaves, exactly, in the reference's form."""
    batch, heads = query.shape[:2]
    mask, span = launch.visible(keywords["mask"], batch, True)
    stash, top, total, done = launch.scores(
        query, key, scaling=keywords["scaling"], mask=mask, span=span,
        softcap=keywords.get("softcap"),
    )  # fmt: skip
    assert not done.any()
    shape = (batch, key.shape[1], heads // key.shape[1])
    empty = top == -torch.inf
    assert (total[empty] == 0).all()
    # A tile without a visible key is never read, and pass 1 may leave what it likes there.
    stash = stash.transpose(2, 3).flatten(1, 2)
    weight = torch.where(empty[..., None], 0.0, stash.double())
    units = (weight * 2**23).round().long()
    assert torch.equal(units.sum(-1), total.long())
    peak = top.amax(-1, keepdim=True).double()
    sinks, sink = keywords.get("sinks"), None
    if sinks is not None:
        logits = sinks.double().view(1, -1, 1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
        peak = torch.maximum(peak, logits)
        sink = (logits - peak).exp2().view(*shape, 1)
    mass = (top.double() - peak.masked_fill(peak == -torch.inf, 0.0)).exp2() * total / 2**23
    first, span = reference._visible_span(keywords["mask"], batch, key.shape[2], query.device)
    cdf = (units.cumsum(-1).double() / 2**23).view(*shape, *units.shape[2:])
    return reference._TiledSoftmax(cdf, mass.view(*shape, -1), first, span, sink)


def coordinates(
    query: torch.Tensor, key: torch.Tensor, softmax: reference._TiledSoftmax, keywords: Any
) -> Any:
    position = keywords["position"]
    if position is None:
        position = softmax.first + softmax.span - 1
    head = torch.arange(query.shape[1], device=DEVICE) + keywords.get("head_offset", 0)
    return (
        keywords["seed"],
        keywords["layer"],
        head.view(1, key.shape[1], -1, 1),
        position.view(-1, 1, 1, 1),
    )


# Pass 2 forms the masses of tiles with one float32 exp2 each.
MASS_ERROR = 2.0**-20


def assert_draws_match(
    query: torch.Tensor, key: torch.Tensor, index: torch.Tensor, keywords: dict[str, Any]
) -> None:
    """Every draw of the kernel is the reference's from the same weights, or next to a boundary."""
    softmax = kernel_softmax(query, key, keywords)
    where = coordinates(query, key, softmax, keywords)
    samples, estimator = keywords["samples"], keywords["estimator"]
    tile, fraction, weight = reference._draw_global(softmax, estimator, samples, where)
    expected = reference._invert_tile(softmax.cdf, tile, fraction) + tile * reference.TILE
    expected += softmax.first.view(-1, 1, 1, 1)
    expected = torch.where(weight.expand_as(expected) > 0, expected, -1)
    moved = index != expected
    moved &= (softmax.total > 0).expand_as(moved)
    mass = softmax.mass if softmax.sink is None else torch.cat((softmax.mass, softmax.sink), -1)
    prefix = mass.cumsum(-1) / softmax.total
    if estimator == "systematic":
        # Tiles share a grid: one tile's end on a grid point excuses the head, and only that.
        x = prefix * samples - uniform(
            *where, torch.zeros(1, dtype=torch.int64, device=DEVICE), Stream.GRID
        )
        tied = ((x - x.round()).abs() < samples * MASS_ERROR).any(-1, keepdim=True)
        # Inside a tile nothing but the last bit of a float64 product can differ.
        assert not (moved & ~tied).any(), f"{int((moved & ~tied).sum())} draws moved without a tie"
        assert tied.float().mean() <= samples * prefix.shape[-1] * 4 * MASS_ERROR + 0.01
        return
    k = torch.arange(samples, device=DEVICE)
    point = uniform(*where, k, Stream.SAMPLE)
    point = (k + point) / samples if estimator == "stratified" else point
    keys = (
        softmax.cdf / softmax.cdf[..., -1:].clamp(min=1e-300) * softmax.mass[..., None]
    ).flatten(3)
    before = torch.nn.functional.pad(softmax.mass.cumsum(-1), (1, -1))
    reach = keys + before.repeat_interleave(reference.TILE, -1)
    row = (index - softmax.first.view(-1, 1, 1, 1)).clamp(min=0)
    high = reach.gather(-1, row) / softmax.total
    low = torch.nn.functional.pad(reach, (1, -1)).gather(-1, row) / softmax.total
    inside = (low - MASS_ERROR <= point) & (point <= high + MASS_ERROR)
    assert (inside | ~moved).all()
    assert moved.float().mean() < 0.02


@triton.jit
def _uniform_kernel(p_out, p_seed, p_layer, p_head, p_position, p_index, STREAM: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    i = tl.arange(0, 64)
    layer = tl.load(p_layer)
    draw = common.uniform(
        tl.load(p_seed),
        layer,
        tl.load(p_head + i),
        tl.load(p_position),
        tl.load(p_index + i),
        STREAM,
    )
    tl.store(p_out + i, draw)


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1])
def test_uniforms_are_bitwise_those_of_torch(seed: int, stream: Stream) -> None:
    index = torch.randint(0, 2**31, (64,), device=DEVICE)
    head = torch.randint(0, 2**20, (64,), device=DEVICE)
    for layer, position in ((0, 0), (2**24 - 1, 2**31 + 5), (17, -1)):
        out = torch.empty(64, dtype=torch.float64, device=DEVICE)
        words = [torch.tensor([x], device=DEVICE) for x in (seed, layer, position)]
        _uniform_kernel[(1,)](out, words[0], words[1], head, words[2], index, STREAM=int(stream))
        assert torch.equal(out, uniform(seed, layer, head, words[2], index, stream))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_rounded_weights_are_within_their_budget(
    shape: tuple[Any, ...], softcap: float | None
) -> None:
    query, key, _, keywords = case(shape, "both")
    keywords["softcap"] = softcap
    softmax = kernel_softmax(query, key, keywords)
    grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])
    exact = grouped.double() @ key.double().transpose(-1, -2) * keywords["scaling"]
    budget = score_budget(grouped, key, keywords["scaling"])
    if softcap is not None:
        exact = softcap * (exact / softcap).tanh()
        budget = budget + 8 * softcap * torch.finfo(F32).eps
    exact = exact.masked_fill(~keywords["mask"], -torch.inf)
    p = exact.softmax(-1).nan_to_num(0.0)
    weight = torch.diff(softmax.cdf, dim=-1, prepend=torch.zeros_like(softmax.cdf[..., :1]))
    scale = softmax.mass / softmax.cdf[..., -1].clamp(min=1e-300)
    rounded = (weight * scale[..., None]).flatten(3)
    for b in range(shape[0]):
        first, span = int(softmax.first[b]), int(softmax.span[b])
        mine = rounded[b, ..., :span] / softmax.total[b].clamp(min=1e-300)
        # Half an ulp of fp16 and half of 2**-23 of the tile's top; the score's error twice (its own
        # and the normaliser's), and a few roundings of exp2 and its argument.
        worst = budget[b].amax() + gamma(8, F32) * (
            1 + exact[b, ..., first : first + span].abs().max()
        )
        relative = 2.0**-11 + 2 * torch.expm1(worst)
        tops = torch.stack([t.amax(-1) for t in p[b, ..., first : first + span].split(128, -1)], -1)
        tops = tops.repeat_interleave(128, -1)[..., :span]
        bound = 2 * relative * p[b, ..., first : first + span] + 2.0**-23 * tops + 2.0**-40
        assert ((mine - p[b, ..., first : first + span]).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", [None, "both"])
@each_estimator
def test_draws_and_output_equal_the_reference(
    shape: tuple[Any, ...], mask: str | None, estimator: str
) -> None:
    query, key, value, keywords = case(shape, mask)
    keywords["estimator"] = estimator
    out, index = kernel_draws(query, key, value, keywords)
    assert_draws_match(query, key, index, keywords)
    assert_output_is_the_mean(out, index, value, keywords["samples"])


def assert_output_is_the_mean(
    out: torch.Tensor, index: torch.Tensor, value: torch.Tensor, samples: int
) -> None:
    batch, kv_heads, group, _ = index.shape
    b = torch.arange(batch, device=DEVICE).view(-1, 1, 1, 1)
    h = torch.arange(kv_heads, device=DEVICE).view(1, -1, 1, 1)
    rows = value[b, h, index.clamp(min=0)].double() * (index >= 0)[..., None]
    weight = torch.full(index.shape, 1.0 / samples, dtype=torch.float64, device=DEVICE)
    bound = average_budget(weight, rows, out.dtype)
    error = (out.double().view(batch, kv_heads, group, -1) - rows.mean(-2)).abs()
    assert (error <= bound).all()


@pytest.mark.parametrize("estimator", ["systematic", "dense"])
def test_sinks_may_be_strided_and_of_16_bits(estimator: str) -> None:
    """The logit of a sink is widened before anything is computed with it."""
    query, key, value, keywords = case((1, 6, 2, 200, 64, 64, F32))
    keywords["estimator"] = estimator
    sinks = torch.randn(12, generator=torch.Generator().manual_seed(1)).to(DEVICE, F16)[::2] + 3
    launcher = launch.fused if estimator == "dense" else launch.prop
    spread = torch.stack((sinks, -sinks), -1)[:, 0]
    assert not spread.is_contiguous()
    for narrow in (spread, sinks):
        got = launcher(query, key, value, **{**keywords, "sinks": narrow})
        want = launcher(query, key, value, **{**keywords, "sinks": sinks.float()})
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("mask", ["left padding", "static tail", "holes", "expanded"])
@pytest.mark.parametrize("extra", ["softcap", "sinks"])
def test_masks_softcap_and_sinks(mask: str, extra: str) -> None:
    query, key, value, keywords = case(SMALL[1], mask)
    heads = query.shape[1]
    keywords[extra] = 2.0 if extra == "softcap" else torch.linspace(-2, 6, heads, device=DEVICE)
    out, index = kernel_draws(query, key, value, keywords)
    assert_draws_match(query, key, index, keywords)
    assert_output_is_the_mean(out, index, value, keywords["samples"])
    exact = reference.dense(
        query.double(), key.double(), value.double(), scaling=keywords["scaling"],
        mask=keywords["mask"], **{extra: keywords[extra]},
    )  # fmt: skip
    keywords["estimator"] = "dense"
    dense = launch.fused(query, key, value, **keywords)
    assert (dense.double() - exact).abs().max() <= 8 * 2.0**-11 * value.double().abs().max()


@pytest.mark.parametrize("kernel", ["prop", "flash"])
@pytest.mark.parametrize("mask", [None, "both"])
def test_exact_rows_are_dense_and_the_others_draw_as_without_them(
    kernel: str, mask: str | None
) -> None:
    query, key, value, keywords = case((3, 6, 2, 300, 64, 40, F16), mask=mask)
    calls = {
        "drawn": {},
        "dense": {"estimator": "dense"},
        "mixed": {"exact": torch.tensor([False, True, False], device=DEVICE)},
    }
    drawn, dense, mixed = (
        santa_decode(query, key, value, **{**keywords, "kernel": kernel, **call})
        for call in calls.values()
    )
    assert (drawn - dense).abs().amax((1, 2, 3)).min() > 1e-2
    assert torch.equal(mixed[1], dense[1])
    assert torch.equal(mixed[::2], drawn[::2])


@settings(max_examples=20 if CUDA else 12, deadline=None)
@given(st.data())
def test_any_case_equals_the_reference(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    shape = (
        data.draw(st.integers(1, 3)),
        kv_heads * data.draw(st.integers(1, 9)),
        kv_heads,
        data.draw(st.integers(1, 3000 if CUDA else 400)),
        data.draw(st.sampled_from([32, 40, 64, 128])),
        data.draw(st.sampled_from([32, 80, 128])),
        data.draw(st.sampled_from([F32, BF16, F16])),
    )
    mask = data.draw(st.sampled_from([None, "left padding", "static tail", "both", "holes"]))
    query, key, value, keywords = case(
        shape, mask, data.draw(st.sampled_from([0.0, 1.0, 20.0])), data.draw(st.integers(0, 99))
    )
    keywords["estimator"] = data.draw(st.sampled_from(ESTIMATORS))
    keywords["samples"] = data.draw(st.sampled_from([1, 2, 31, 32, 33, 130]))
    out, index = kernel_draws(query, key, value, keywords)
    assert_draws_match(query, key, index, keywords)
    seen = torch.ones(1, dtype=torch.bool) if mask is None else keywords["mask"].any(-1)
    if bool(seen.all()):
        assert_output_is_the_mean(out, index, value, keywords["samples"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", [None, "both"])
def test_dense_is_softmax_attention(shape: tuple[Any, ...], mask: str | None) -> None:
    query, key, value, keywords = case(shape, mask)
    keywords["estimator"] = "dense"
    assert_dense_is_attention(query, key, value, keywords)


def assert_dense_is_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keywords: dict[str, Any]
) -> None:
    mask = keywords["mask"]
    out = launch.fused(query, key, value, **keywords)
    exact = reference.dense(
        query.double(),
        key.double(),
        value.double(),
        scaling=keywords["scaling"],
        mask=mask,
    )
    # Weights are rounded to the dtype before the product with V, as in flash attention, and scores
    # thrice before their exponential: times the scale, times log2(e), and less the maximum.
    grouped = query.double().unflatten(1, (key.shape[1], -1))[:, :, :, 0]
    peak = (grouped @ key.double().nan_to_num().transpose(-1, -2)).abs().max() * keywords["scaling"]
    largest = value.double().abs().max()
    spare = torch.finfo(query.dtype).eps * largest + 2 * gamma(3, F32) * peak * largest
    seen = slice(None) if mask is None else mask.any(-1).flatten()
    budget = attention_budget(
        query[seen], key[seen], value[seen], keywords["scaling"],
        None if mask is None else mask[seen],
    )  # fmt: skip
    assert (out.double() - exact).abs().max() <= budget + spare


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", [None, "both"])
@each_estimator
def test_a_fixed_budget_per_tile_equals_the_reference(
    shape: tuple[Any, ...], mask: str | None, estimator: str
) -> None:
    query, key, value, keywords = case(shape, mask)
    keywords["estimator"] = estimator
    assert_fixed_budgets_match(query, key, value, keywords)


def assert_fixed_budgets_match(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keywords: dict[str, Any]
) -> None:
    out = launch.fused(query, key, value, **keywords).double()
    exact = reference.decode(
        query.double(), key.double(), value.double(), **keywords, allocation="tile"
    )
    # The oracle's weights are not rounded: a head may hold a draw that fell on the next key.
    same = torch.finfo(query.dtype).eps * 4 * value.double().abs().max() + 1e-6
    flipped = ((out - exact).abs().amax(-1) > same).float().mean()
    chance = 2 * keywords["samples"] * 2.0**-12
    assert flipped <= max(chance, 2 / query.shape[1] if query.shape[1] > 4 else 0)


@settings(max_examples=12 if CUDA else 6, deadline=None)
@given(st.data())
def test_any_case_of_one_pass_equals_the_reference(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 2))
    shape = (
        data.draw(st.integers(1, 3)),
        kv_heads * data.draw(st.sampled_from([1, 3, 4, 7, 70] if CUDA else [1, 3])),
        kv_heads,
        data.draw(st.integers(1, 3000 if CUDA else 600)),
        data.draw(st.sampled_from([32, 40, 64, 128])),
        data.draw(st.sampled_from([32, 80, 128])),
        data.draw(st.sampled_from([F32, BF16, F16])),
    )
    mask = data.draw(st.sampled_from([None, "left padding", "static tail", "both", "holes"]))
    query, key, value, keywords = case(
        shape, mask, data.draw(st.sampled_from([0.0, 1.0, 4.0])), data.draw(st.integers(0, 99))
    )
    keywords["estimator"] = data.draw(st.sampled_from(ESTIMATORS))
    keywords["samples"] = data.draw(st.sampled_from([1, 2, 31, 130]))
    assert_fixed_budgets_match(query, key, value, keywords)
    keywords["estimator"] = "dense"
    assert_dense_is_attention(query, key, value, keywords)


@triton.jit(do_not_specialize=["draws"])
def _count_kernel(p_weight, p_offset, p_out, draws, TILE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    o_t, o_g = tl.arange(0, TILE), tl.arange(0, 4)
    o_weight = o_g[:, None] * TILE + o_t[None, :]
    b_weight = tl.load(p_weight + o_weight).to(tl.uint32)
    b_prefix = tl.cumsum(b_weight, axis=1)
    b_offset = tl.load(p_offset + o_g)
    b_rate, b_shift, b_add, fine = flash._steps(draws, tl.sum(b_weight, axis=1), b_offset)
    b_rate, b_shift, b_add = b_rate[:, None], b_shift[:, None], b_add[:, None]
    tl.store(p_out + o_weight, flash._draws_below(b_prefix, b_rate, b_shift, b_add, fine))


@pytest.mark.parametrize("draws", [1, 2, 3, 16, 255, 256, 2048, 2**20 - 1, 2**31 - 1])
def test_counts_of_a_tile_are_exact_to_a_step(draws: int) -> None:
    """Against whole numbers of any size: each boundary within a step, and never a draw too many."""
    tile = reference.FIXED_TILE
    generator = torch.Generator().manual_seed(draws)
    weight = torch.randint(0, 2**23 + 1, (4, tile), generator=generator)
    weight[0] = 2**23  # flat
    weight[1] = torch.where(torch.arange(tile) == 77, 2**23, 0)  # all on one key
    weight[2] = (weight[2].double() ** 8 / 2.0**161).long()  # a few heavy keys
    weight[3, -3:] = 0  # keys behind the last one with mass
    for offset in (0.0, 1 - 2.0**-53, 0.37, 0.5):
        offsets = torch.full((4,), offset, dtype=torch.float64)
        out = torch.empty(4, tile, dtype=torch.int32, device=DEVICE)
        _count_kernel[(1,)](weight.to(DEVICE), offsets.to(DEVICE), out, draws, TILE=tile)
        # One step is this part of a draw; the offset is known to one, a boundary to another.
        fine = 30 - (draws.bit_length() - 1)
        for row, counts in zip(weight.tolist(), out.tolist(), strict=True):
            whole, prefix = sum(row), 0
            assert counts[-1] == draws
            for units, count in zip(row, counts, strict=True):
                prefix += units
                steps = Fraction(draws * prefix << fine, whole)
                point = int(offset * 2**fine)
                low, high = (-((point - math.floor(steps + d)) // 2**fine) for d in (-1, 1))
                assert low <= count <= high
                assert 0 <= count <= draws


@pytest.mark.parametrize("samples", [300, 2100, 70000])
def test_large_counts_are_exact(samples: int) -> None:
    """One key has all the mass: every draw is its row, whatever the count's digits."""
    query, key, value, keywords = case((1, 2, 1, 200, 32, 32, BF16))
    key.zero_()
    key[:, :, 77] = query[:, :1, 0] * 100
    query[:, 1] = query[:, 0]
    keywords["samples"] = samples
    row = value[:, :, 77].expand(1, 2, 32).unsqueeze(2)
    assert torch.equal(launch.fused(query, key, value, **keywords), row)
    if samples < 3000:
        assert torch.equal(launch.prop(query, key, value, **keywords), row)


KERNELS = {"prop": launch.prop, "flash": launch.fused, "dense": launch.fused}


def run(kernel: str, *tensors: torch.Tensor, **keywords: Any) -> torch.Tensor:
    if kernel == "dense":
        keywords["estimator"] = "dense"
    return KERNELS[kernel](*tensors, **keywords)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_padding_batch_and_strides_change_no_bit(kernel: str) -> None:
    shape = (1, 6, 2, 260, 64, 64, BF16)
    query, key, value, keywords = case(shape)
    keywords["position"] = torch.tensor([1000], device=DEVICE)
    alone = run(kernel, query, key, value, **keywords)
    # The row as the second of a batch, in a cache with head room, padded left and right by NaN.
    left, room = 33, 380
    caches = [torch.full((2, room, 2, 64), torch.nan, dtype=BF16, device=DEVICE) for _ in "kv"]
    wide = [cache.transpose(1, 2)[:, :, :350] for cache in caches]
    mask = torch.zeros(2, 1, 1, 350, dtype=torch.bool, device=DEVICE)
    mask[0, ..., 5:111] = True
    mask[1, ..., left : left + 260] = True
    for cache, rows in zip(wide, (key, value), strict=True):
        cache[0, :, 5:111] = torch.randn(2, 106, 64, device=DEVICE).to(BF16)
        cache[1:, :, left : left + 260] = rows
    keywords["mask"] = mask
    keywords["position"] = torch.tensor([3, 1000], device=DEVICE)
    both = run(kernel, torch.cat((query * 0.5, query)), *wide, **keywords)
    assert torch.equal(both[1:], alone)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_rows_of_a_batch_are_those_computed_alone(kernel: str) -> None:
    """Also where there are more splits than programs, and a program goes from row to row."""
    query, key, value, keywords = case((5, 6, 2, 1500 if CUDA else 600, 64, 64, F16))
    if CUDA:
        query, key, value = (x.repeat(8, 1, 1, 1) for x in (query, key, value))
    key[1, 1, 3] = torch.nan  # stays in its row
    rows = len(query)
    keywords["seed"] = torch.arange(rows, device=DEVICE)
    keywords["position"] = 7 * torch.arange(rows, device=DEVICE)
    together = run(kernel, query, key, value, **keywords)
    for b in (0, 1, 2, 17, rows - 1) if CUDA else range(rows):
        one = {name: keywords[name][b : b + 1] for name in ("seed", "position")}
        row = slice(b, b + 1)
        alone = run(kernel, query[row], key[row], value[row], **{**keywords, **one})
        torch.testing.assert_close(together[row], alone, rtol=0, atol=0, equal_nan=True)
        assert alone.isfinite().all() == (b % 5 != 1)


@pytest.mark.parametrize("layout", ["head room", "tokens first", "odd"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_layouts_of_a_cache_change_no_bit(kernel: str, layout: str) -> None:
    query, key, value, keywords = case((2, 6, 2, 260, 64, 64, F16))
    expected = run(kernel, query, key, value, **keywords)

    def laid_out(states: torch.Tensor) -> torch.Tensor:
        if layout == "head room":  # head stride = capacity * D
            out = states.new_empty(2, 2, 400, 64)[:, :, :260]
        elif layout == "tokens first":
            out = states.new_empty(2, 260, 2, 64).transpose(1, 2)
        else:  # rows at odd addresses
            out = states.new_empty(2, 2, 300, 71)[:, :, 5:265, 3:67]
        return out.copy_(states)

    assert torch.equal(run(kernel, query, laid_out(key), laid_out(value), **keywords), expected)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The second row of a batch lies 2**31 elements behind the first."""
    query, key, value, keywords = case((2, 4, 1, 300, 64, 64, BF16))
    memory = torch.zeros(2**31 + 300 * 64, dtype=BF16, device=DEVICE)
    far = memory.as_strided((2, 1, 300, 64), (2**31, 300 * 64, 64, 1))
    for kernel in KERNELS:
        expected = run(kernel, query, key, value, **keywords)
        assert torch.equal(run(kernel, query, far.copy_(key), value, **keywords), expected), kernel
        assert torch.equal(run(kernel, query, key, far.copy_(value), **keywords), expected), kernel


@pytest.mark.parametrize("mask", ["both", "holes"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_hidden_rows_may_hold_anything(kernel: str, mask: str) -> None:
    query, key, value, keywords = case((2, 6, 2, 300, 64, 40, F16), mask=mask)
    clean = run(kernel, query, key, value, **keywords)
    hidden = ~keywords["mask"].transpose(-1, -2)
    for states in (key, value):
        states.masked_fill_(hidden, torch.nan)
    spoiled = run(kernel, query, key, value, **keywords)
    assert torch.equal(spoiled, clean)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_rows_without_a_key_are_zero_and_nan_spreads(kernel: str) -> None:
    query, key, value, keywords = case((3, 4, 2, 300, 32, 32, F32))
    mask = torch.ones(3, 1, 1, 300, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    mask[2, ..., :10] = False
    key[2, :, 5] = torch.nan  # hidden
    key[1, 1, 200, 3] = torch.nan
    out = run(kernel, query, key, value, **{**keywords, "mask": mask})
    assert (out[0] == 0).all()
    assert out[1, 2:].isnan().all()
    assert out[1, :2].isfinite().all()
    assert out[2].isfinite().all()


@pytest.mark.parametrize(
    "estimator", ["systematic", "multinomial", pytest.param("stratified", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("profile", ["random", "peaked", "sink", "flat", "boundaries"])
@pytest.mark.parametrize("kernel", ["prop", "flash"])
def test_unbiased(kernel: str, profile: str, estimator: str) -> None:
    """The mean over seeds is attention; the multinomial variance bounds the standard error."""
    rows, length = 1024 if CUDA else 64, 300
    query, key, value, keywords = case((1, 2, 1, length, 32, 32, F32))
    scale = {"random": 1.0, "peaked": 5.0, "sink": 1.0, "flat": 0.0, "boundaries": 1.0}[profile]
    query = query * scale
    if profile == "boundaries":
        # Tiles of 1/2, 1/4 and 1/4 of the mass: their ends are on points of the grid of 8 draws.
        query.zero_()
        query[..., 0] = 32**0.5
        mass = torch.tensor([2 / 128, 1 / 128, 1 / 44]).repeat_interleave(128)[:length]
        key[..., 0] = mass.log().to(DEVICE)
    if profile == "sink":
        key[:, :, 0] = query[0, 0] * 2.0
    keywords.update(
        samples=8,
        estimator=estimator,
        seed=torch.arange(rows, device=DEVICE) * 7919,
        position=torch.zeros(rows, dtype=torch.int64, device=DEVICE),
    )
    expand = (rows, -1, -1, -1)
    out = run(kernel, query.expand(expand), key.expand(expand), value.expand(expand), **keywords)
    p = (query.double()[0, :, 0] @ key.double()[0, 0].T * keywords["scaling"]).softmax(-1)
    mean = p @ value[0, 0].double()
    variance = (p @ value[0, 0].double() ** 2 - mean**2) / 8
    if kernel == "flash":  # tiles of 4 draws or more: at most twice the variance of 8 over the row
        variance = 2 * variance
    assert ALPHA < 1e-3
    assert_mean(out[:, :, 0], mean, variance, 2.0**-10 * value.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["prop", "flash"])
@each_estimator
def test_the_error_falls_with_the_budget(kernel: str, estimator: str) -> None:
    """Mean squared error: variance / draws if they are independent, and no more if they are spread."""
    rows, length = 512, 1024
    query, key, value, keywords = case((1, 2, 1, length, 32, 32, F32))
    tiles = length // reference.FIXED_TILE if kernel == "flash" else 1
    p = (query.double()[0, :, 0] @ key.double()[0, 0].T * keywords["scaling"]).softmax(-1)
    p = p.view(2, tiles, -1)
    mass, rows_of_v = p.sum(-1), value.double()[0, 0].view(tiles, -1, 32)
    mean = torch.einsum("gtn,tnd->gtd", p, rows_of_v) / mass[..., None]
    square = torch.einsum("gtn,tnd->gtd", p, rows_of_v**2) / mass[..., None]
    variance = ((square - mean**2).sum(-1) * mass**2 * tiles).sum()  # of one draw, over both heads
    exact = torch.einsum("gtd,gt->gd", mean, mass)
    for samples in (8, 64, 512):
        keywords.update(
            samples=samples,
            estimator=estimator,
            seed=torch.arange(rows, device=DEVICE) * 7919 + samples,
            position=torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        )
        wide = [x.expand(rows, -1, -1, -1) for x in (query, key, value)]
        out = run(kernel, *wide, **keywords)[:, :, 0].double()
        error = (out - exact).square().sum((1, 2)).mean().item()
        if estimator == "multinomial":
            assert 0.85 < error * samples / variance.item() < 1.15
        else:
            assert error * samples / variance.item() < 1.05


def test_dispatch_is_explicit() -> None:
    query, key, value, _ = case(SMALL[1])
    expected = santa_decode(query, key, value, kernel="prop", seed=3)
    if CUDA:
        assert torch.equal(santa_decode(query, key, value, seed=3), expected)
    with pytest.raises(NotImplementedError, match="float64"):
        santa_decode(query.double(), key.double(), value.double(), kernel="prop")
    santa_decode(query.double(), key.double(), value.double(), kernel="auto")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_growing_context_compiles_once(kernel: str) -> None:
    """Over a length at which pass 2 begins to walk more tiles at a time."""
    _, _, _, keywords = case((1, 4, 2, 8, 64, 64, BF16))
    boundary = launch.FEW_TILES * reference.TILE
    cache = torch.randn(1, 2, boundary + 256, 64, device=DEVICE).to(BF16)
    query = torch.randn(1, 4, 1, 64, device=DEVICE).to(BF16)
    kernels = (
        launch.scores_kernel,
        launch.sample_kernel,
        launch.dense_kernel,
        launch.flash_kernel,
        launch.combine_kernel,
    )

    def compiled() -> int:
        return sum(len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels)

    counts = []
    for length in range(boundary - 100, boundary + 100):
        keys = cache[:, :, :length]
        contiguous = keys.contiguous() if length % 2 else keys
        run(kernel, query, contiguous, contiguous, **{**keywords, "layer": length, "seed": length})
        counts.append(compiled())
    assert counts[0] == counts[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_graph_replay_and_streams(kernel: str) -> None:
    query, key, value, keywords = case((2, 8, 2, 5000, 128, 128, BF16))
    keywords["samples"] = 300
    expected = run(kernel, query, key, value, **keywords)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = run(kernel, query, key, value, **keywords)
        second = run(kernel, query, key, value, **{**keywords, "layer": 4})
        third = run(kernel, query, key, value, **keywords)
    streams = [torch.cuda.Stream() for _ in range(3)]
    outs = []
    for _ in range(20):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(run(kernel, query, key, value, **keywords))
    torch.cuda.synchronize()
    assert torch.equal(first, expected)
    assert torch.equal(third, expected)
    assert kernel == "dense" or not torch.equal(second, expected)
    assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.gpu
def test_prefix_of_a_million_keys() -> None:
    """Flat scores over 2**20 keys: the grid is known in closed form."""
    length, samples = 2**20, 1000
    query, key, value, keywords = case((1, 2, 1, 128, 32, 32, BF16))
    query.zero_()
    key, value = (x[:, :, :1].expand(1, 1, length, 32).contiguous() for x in (key, value))
    keywords["samples"] = samples
    _, index = kernel_draws(query, key, value, keywords)
    head = torch.arange(2, device=DEVICE).view(1, 1, 2, 1)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    offset = uniform(7, 3, head, torch.tensor(length - 1, device=DEVICE), zero, Stream.GRID)
    tile = ((torch.arange(samples, device=DEVICE) + offset) / samples * (length // 128)).long()
    assert torch.equal(index // 128, tile)


@pytest.mark.gpu
@each_estimator
def test_draws_from_a_million_random_keys(estimator: str) -> None:
    query, key, value, keywords = case((1, 2, 1, 2**20, 32, 32, BF16), "both", spread=3.0)
    keywords.update(estimator=estimator, samples=1000)
    out, index = kernel_draws(query, key, value, keywords)
    assert_draws_match(query, key, index, keywords)
    assert_output_is_the_mean(out, index, value, 1000)
