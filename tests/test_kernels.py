"""The Triton kernels against the reference: on a GPU, or on the CPU through Triton's interpreter.

Coupled tests give both sides the same uniforms. Pass 1 leaves rounded weights, which are bounded against
float64; the draws of pass 2 are then compared with the reference's draws *from those very weights*, so
that only a draw within rounding of a boundary may differ. The draws of one pass are counted by values
that are the identity, and how many fall before each key is compared with the number of the reference's
points below that key's cumulative weight, give or take what rounding may do to the weight.
"""

from __future__ import annotations

import importlib.util
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_unbiased import Softmax, analytic_variance, directions, drawn, share
from tolerance import assert_mean, average_budget, gamma, score_budget, unit_roundoff

from santa_hf import functional, reference, santa_decode, shared
from santa_hf.functional import are_valid, decode_valid, plain_step
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
from hypothesis import Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from santa_hf.integration import attention  # noqa: E402
from santa_hf.kernels import common, dense, flash, host, launch, launcher  # noqa: E402
from santa_hf.kernels import sample as pass_2  # noqa: E402
from santa_hf.kernels import scores as pass_1  # noqa: E402
from santa_hf.kernels.launcher import ALIGNMENT, Launcher, Layout, Part  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
ESTIMATORS = ("systematic", "stratified", "multinomial")
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def some(names: str, here: list[Any], everywhere: list[Any]) -> pytest.MarkDecorator:
    """Parameters for the interpreter, and on a GPU all others too."""
    others = [pytest.param(*x, marks=pytest.mark.gpu) for x in everywhere if x not in here]
    return pytest.mark.parametrize(names, [*(pytest.param(*x) for x in here), *others])


each_mask_and_estimator = some(
    "mask, estimator",
    [(None, "systematic"), *(("both", estimator) for estimator in ESTIMATORS)],
    [(mask, estimator) for mask in (None, "both") for estimator in ESTIMATORS],
)

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
    (2, 12, 2, 777, 320, 512, F32),
    (1, 4, 2, 300, 576, 576, F32),
    (1, 32, 1, 500, 192, 576, BF16),
    (1, 64, 1, 300, 64, 64, F16),
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
        "samples": 34,
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
        if mask == "hidden tiles":
            visible[..., length // 8 : length - length // 8] = length < 8
        # Moving a mask makes it contiguous, so these two are laid out where they are used.
        if mask == "expanded":
            pattern = torch.rand(1, 1, 1, length, generator=generator) < 0.6
            visible = pattern.to(DEVICE).expand(batch, 1, 1, length)
        if mask == "strided":
            pattern = torch.rand(batch, 1, 1, 2 * length, generator=generator) < 0.6
            visible = pattern.to(DEVICE)[..., ::2]
        keywords["mask"] = visible.to(DEVICE)
    return query, key, value, keywords


MASKS = ["left padding", "static tail", "both", "holes", "hidden tiles", "expanded", "strided"]
EXTRAS = ["softcap", "sinks", "head_offset", "position", "seed"]
some_extras = st.sets(st.sampled_from(EXTRAS)).map(sorted)


def with_extras(keywords: dict[str, Any], query: torch.Tensor, names: list[str]) -> dict[str, Any]:
    """The keywords with a soft cap, sinks, a head offset, and positions and seeds of each row."""
    batch, heads = query.shape[:2]
    rows = torch.arange(batch, device=DEVICE)
    values = {
        "softcap": 2.0,
        "sinks": torch.linspace(-2, 6, heads, device=DEVICE),
        "head_offset": 2**31 - 1000,
        "position": 2**31 - 1 + 97 * rows,
        "seed": 2**62 + 7919 * rows,
    }
    return keywords | {name: values[name] for name in names}


def exact_scores(
    query: torch.Tensor, key: torch.Tensor, keywords: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in float64, -inf where hidden, (B, KVH, G, N), and how far a kernel's may be from them,
    the largest of each head (B, KVH, G, 1)."""
    grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])
    scores = grouped.double() @ key.double().transpose(-1, -2) * keywords["scaling"]
    budget = score_budget(grouped, key, keywords["scaling"])
    softcap = keywords.get("softcap")
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
        budget = budget + 8 * softcap * torch.finfo(F32).eps
    # The exponential's argument is rounded: times the scale, times log2(e), and less the maximum.
    budget = budget + gamma(8, F32) * (1 + scores.abs())
    if keywords["mask"] is not None:
        hidden = ~keywords["mask"]
        scores, budget = scores.masked_fill(hidden, -torch.inf), budget.masked_fill(hidden, 0.0)
    return scores, budget.amax(-1, keepdim=True)


def exact_softmax(scores: torch.Tensor, keywords: dict[str, Any]) -> torch.Tensor:
    """Probabilities of the keys, float64 (B, KVH, G, N): zero where nothing is visible."""
    sinks = keywords.get("sinks")
    if sinks is not None:
        shape = (*scores.shape[:3], 1)
        sink = sinks.double().view(1, *scores.shape[1:3], 1).expand(shape)
        scores = torch.cat((scores, sink), -1)
    p = scores.softmax(-1).nan_to_num(0.0)
    return p if sinks is None else p[..., :-1]


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
    mask, span = host.visible(keywords["mask"], batch, True)
    stash, top, total, done, parts = pass_1.scores(
        query, key, scaling=keywords["scaling"], mask=mask, span=span,
        softcap=keywords.get("softcap"), parts=True,
    ).tensors()  # fmt: skip
    assert not done.any()
    shape = (batch, key.shape[1], heads // key.shape[1])
    empty = top == -torch.inf
    assert (total[empty] == 0).all()
    # A tile without a visible key is never read, and pass 1 may leave what it likes there.
    stash = stash.transpose(2, 3).flatten(1, 2)
    weight = torch.where(empty[..., None], 0.0, stash.double())
    units = (weight * 2**23).round().long()
    assert torch.equal(units.sum(-1), total.long())
    assert parts is not None
    parts = parts.transpose(2, 3).flatten(1, 2).masked_fill(empty[..., None], 0)
    assert torch.equal(units.unflatten(-1, (-1, pass_1.PART)).sum(-1), parts.long())
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
    seed = keywords["seed"]
    return (
        seed.view(-1, 1, 1, 1) if isinstance(seed, torch.Tensor) else seed,
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
        # A tile whose end is on a grid point may have one draw more or less than here, and so may the
        # next one that has any. Inside a tile nothing but the last bit of a float64 product can differ.
        x = prefix * samples - uniform(
            *where, torch.zeros(1, dtype=torch.int64, device=DEVICE), Stream.GRID
        )
        tied = (x - x.round()).abs() < samples * MASS_ERROR
        tile = torch.where(weight > 0, tile, softmax.mass.shape[-1])
        ends = torch.nn.functional.pad(tied, (1, 0))
        excused = ends.gather(-1, tile) | ends.gather(-1, tile + 1)
        assert not (moved & ~excused).any(), f"{int((moved & ~excused).sum())} moved without a tie"
        assert excused.float().mean() <= 0.1
        assert moved.float().mean() <= 0.02
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
    assert_weights_are_rounded(query, key, keywords)


def assert_weights_are_rounded(
    query: torch.Tensor, key: torch.Tensor, keywords: dict[str, Any]
) -> None:
    """The softmax that pass 1 leaves is the exact one, but for rounding, and hides what is hidden."""
    softmax = kernel_softmax(query, key, keywords)
    scores, worst = exact_scores(query, key, keywords)
    p = exact_softmax(scores, keywords)
    weight = torch.diff(softmax.cdf, dim=-1, prepend=torch.zeros_like(softmax.cdf[..., :1]))
    scale = softmax.mass / softmax.cdf[..., -1].clamp(min=1e-300)
    rounded = (weight * scale[..., None]).flatten(3)
    for b in range(len(query)):
        first, span = int(softmax.first[b]), int(softmax.span[b])
        if not span:
            assert (softmax.mass[b] == 0).all()
            continue
        mine, exact = rounded[b, ..., :span] / softmax.total[b], p[b, ..., first : first + span]
        assert (rounded[b, ..., span:] == 0).all()
        assert (mine[scores[b, ..., first : first + span] == -torch.inf] == 0).all()
        # Half an ulp of fp16 and half of 2**-23 of the tile's top; the score's error twice (its own
        # and the normaliser's).
        relative = 2.0**-11 + 2 * torch.expm1(worst[b])
        tops = torch.stack([t.amax(-1) for t in exact.split(128, -1)], -1)
        tops = tops.repeat_interleave(128, -1)[..., :span]
        bound = 2 * relative * exact + 2.0**-23 * tops + 2.0**-40
        assert ((mine - exact).abs() <= bound).all()


def test_the_rounding_of_two_comparable_keys() -> None:
    """Weights 1 and w: w is rounded to fp16, so by 2**-12 at most above a half, and p = w / (1 + w) by
    2**-12 / (1 + w)**2 of that; less than half a step below 1, both keys are equally likely."""
    heads = launch.MAX_GROUP
    step = 2.0**-11  # of fp16 in [1/2, 1)
    gap = torch.linspace(0, 1, heads, dtype=torch.float64)
    w = torch.cat((1 - 4 * step * gap[: heads // 2], 0.5 + 0.5 * gap[heads // 2 :]))
    query = torch.zeros(1, heads, 1, 32, device=DEVICE)
    query[0, :, 0, 0] = w.log().to(DEVICE)
    key = torch.zeros(1, 1, 2, 32, device=DEVICE)
    key[..., 1, 0] = 1.0
    w = query[0, :, 0, 0].double().exp().cpu()  # the logarithm was rounded too
    softmax = kernel_softmax(query, key, {"scaling": 1.0, "mask": None})
    rounded = softmax.cdf[0, 0, :, 0, 1].cpu() - softmax.cdf[0, 0, :, 0, 0].cpu()
    off = (rounded - w).abs()
    spare = gamma(8, F32)
    assert (off <= step / 2 + spare).all()
    p, drawn_with = w / (1 + w), rounded / (1 + rounded)
    bound = (step / 2 + spare) / (1 + w) ** 2 * (1 + step)
    assert ((drawn_with - p).abs() <= bound).all()
    assert ((drawn_with - p).abs() / bound).max() > 0.9
    near = w > 1 - step / 2 + spare
    assert 1 < near.sum() < heads // 2
    assert (rounded[near] == 1).all()
    assert (rounded[w < 1 - step / 2 - spare] < 1).all()
    # Light weights: fp16 has steps of 2**-24 there, and units are steps of 2**-23.
    query[0, :, 0, 0] = -20 * gap.to(DEVICE)
    w = query[0, :, 0, 0].double().exp().cpu()
    softmax = kernel_softmax(query, key, {"scaling": 1.0, "mask": None})
    rounded = softmax.cdf[0, 0, :, 0, 1].cpu() - softmax.cdf[0, 0, :, 0, 0].cpu()
    assert ((rounded - w).abs() <= w * (2.0**-11 + 64 * spare) + 2.0**-24 + 2.0**-25).all()
    assert (rounded[w < 2.0**-25] == 0).all()


@each_estimator
def test_the_stash_of_the_reference_is_what_it_says(estimator: str) -> None:
    """float16, then a multiple of 2**-23, before anything is summed: draws by its own definition."""
    query, key, _, keywords = case((1, 3, 1, 100, 32, 32, F32), spread=4.0)
    query, key, samples = query.cpu(), key.cpu(), 40_000
    keywords.update(samples=samples, estimator=estimator)
    scores = (key[0, 0] @ (query[0, :, 0] * keywords["scaling"]).T).T
    weight = (scores - scores.amax(-1, keepdim=True)).exp()
    stashed = torch.round(weight.half().double() * 2**23) / 2**23
    assert (stashed != weight.double()).any()
    assert ((stashed == 0) & (weight > 0)).any()
    cdf = stashed.cumsum(-1) / stashed.sum(-1, keepdim=True)
    k, head = torch.arange(samples), torch.arange(3)[:, None]
    stream = Stream.TILE if estimator == "systematic" else Stream.SAMPLE
    index = torch.zeros_like(k) if estimator == "systematic" else k
    point = uniform(7, 3, head, torch.tensor(99), index, stream)
    if estimator != "multinomial":
        point = (k + point) / samples
    expected = torch.searchsorted(cdf, point.expand(3, -1).contiguous(), right=True)
    rounded, plain = (
        reference.draw(query, key, **keywords, stash=stash).index[0, 0] for stash in (True, False)
    )
    assert torch.equal(rounded, expected)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_mask_and_estimator
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


@pytest.fixture(params=[False, True], ids=["few draws", "many draws"])
def sums_of_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass 1 leaves no sums of parts, and does as if draws were many."""
    if request.param:
        monkeypatch.setattr(launch, "MANY_DRAWS", 0)


def recorded(sample: Callable[..., None], seen: list[pass_1.Weights]) -> Callable[..., None]:
    """Pass 2, and `seen` of what pass 1 left for it."""

    def call(value: Any, span: Any, weights: pass_1.Weights, *rest: Any, **keywords: Any) -> None:
        seen.append(weights)
        sample(value, span, weights, *rest, **keywords)

    return call


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mask", [None, "both", "hidden tiles"])
def test_sums_of_parts_change_no_draw(
    monkeypatch: pytest.MonkeyPatch, mask: str | None, estimator: str
) -> None:
    """With many draws pass 1 leaves sums of parts for pass 2, which otherwise forms them itself."""
    shape = (2, 6, 2, 700, 64, 40, F16) if CUDA else (1, 2, 1, 400, 64, 40, F16)
    query, key, value, keywords = case(shape, mask)
    keywords = with_extras(keywords, query, EXTRAS)
    keywords["estimator"] = estimator
    seen: list[pass_1.Weights] = []
    monkeypatch.setattr(launch, "sample", recorded(pass_2.sample, seen))
    for samples in (1, 33, 600) if CUDA else (20, 130):
        keywords["samples"] = samples
        results = []
        for most in (0, samples):  # draws up to which there are no sums
            monkeypatch.setattr(launch, "MANY_DRAWS", most)
            results.append(kernel_draws(query, key, value, keywords))
        assert [weights.parts is not None for weights in seen] == [True, False]
        seen.clear()
        (out, index), (_, expected) = results
        assert torch.equal(index, expected)
        assert_output_is_the_mean(out, index, value, samples)


@pytest.mark.parametrize("estimator", ["systematic", "dense"])
def test_sinks_may_be_strided_and_of_16_bits(estimator: str) -> None:
    """The logit of a sink is widened before anything is computed with it."""
    query, key, value, keywords = case((1, 6, 2, 200, 64, 64, F32))
    keywords["estimator"] = estimator
    sinks = torch.randn(12, generator=torch.Generator().manual_seed(1)).to(DEVICE, F16)[::2] + 3
    decode = launch.fused if estimator == "dense" else launch.prop
    spread = torch.stack((sinks, -sinks), -1)[:, 0]
    assert not spread.is_contiguous()
    for narrow in (spread, sinks):
        got = decode(query, key, value, **{**keywords, "sinks": narrow})
        want = decode(query, key, value, **{**keywords, "sinks": sinks.float()})
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mask", "extras"),
    [(mask, EXTRAS) for mask in MASKS] + [("holes", ["softcap"]), ("both", ["sinks"])],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_masks_softcap_sinks_and_coordinates(mask: str, extras: list[str]) -> None:
    query, key, value, keywords = case((2, 4, 2, 340, 40, 40, F16), mask)
    keywords = with_extras(keywords, query, extras)
    assert_prop_matches(query, key, value, keywords)
    assert_dense_is_attention(query, key, value, keywords)
    assert_fixed_budgets_match(query, key, value, keywords)


@pytest.mark.usefixtures("sums_of_parts")
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


# To shrink a failure would take the interpreter a quarter of an hour.
fixed = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate])


@settings(fixed, max_examples=40 if CUDA else 12)
@given(st.data())
def test_any_case_equals_the_reference(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3 if CUDA else 2))
    shape = (
        data.draw(st.integers(1, 3 if CUDA else 2)),
        kv_heads * data.draw(st.integers(1, 9 if CUDA else 5)),
        kv_heads,
        data.draw(st.integers(1, 3000 if CUDA else 400)),
        data.draw(st.sampled_from([32, 40, 64, 128])),
        data.draw(st.sampled_from([32, 80, 128])),
        data.draw(st.sampled_from([F32, BF16, F16])),
    )
    query, key, value, keywords = case(
        shape,
        data.draw(st.sampled_from([None, *MASKS])),
        data.draw(st.sampled_from([0.0, 1.0, 20.0])),
        data.draw(st.integers(0, 99)),
    )
    keywords = with_extras(keywords, query, data.draw(some_extras))
    keywords["estimator"] = data.draw(st.sampled_from(ESTIMATORS))
    keywords["samples"] = data.draw(
        st.sampled_from([1, 2, 31, 32, 33, 65, *([130, 700] if CUDA else [])])
    )
    assert_prop_matches(query, key, value, keywords)


def assert_prop_matches(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keywords: dict[str, Any]
) -> None:
    assert_weights_are_rounded(query, key, keywords)
    out, index = kernel_draws(query, key, value, keywords)
    assert_draws_match(query, key, index, keywords)
    if keywords["mask"] is not None:
        seen = keywords["mask"].any(-1).flatten()
        assert (out[~seen] == 0).all()
        out, index, value = out[seen], index[seen], value[seen]
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
    out = launch.fused(query, key, value, **{**keywords, "estimator": "dense"})
    scores, worst = exact_scores(query, key, keywords)
    p = exact_softmax(scores, keywords)
    value = value.double()
    # Weights are rounded to the dtype before the product with V, as in flash attention, relative to a
    # maximum that only rises, and to a multiple of its smallest number; then the sums in float32.
    dtype = query.dtype
    depth = dense.DENSE_TILE + 3 * (key.shape[2] // dense.DENSE_TILE) + 16
    relative = 2 * torch.expm1(2 * worst) + 2 * unit_roundoff(dtype) + gamma(2 * depth, F32)
    smallest = torch.finfo(dtype).tiny * unit_roundoff(dtype)
    visible = (scores > -torch.inf).sum(-1, keepdim=True)
    lost = smallest * visible * p.amax(-1, keepdim=True) * value.abs().amax((2, 3))[..., None, None]
    bound = relative * (p @ value.abs()) + lost + torch.finfo(dtype).tiny
    error = (out.double().view_as(bound) - p @ value).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_mask_and_estimator
def test_a_fixed_budget_per_tile_equals_the_reference(
    shape: tuple[Any, ...], mask: str | None, estimator: str
) -> None:
    query, key, value, keywords = case(shape, mask)
    keywords["estimator"] = estimator
    if estimator != "systematic" and not CUDA:
        keywords["samples"] = 14  # the interpreter takes them one by one
    assert_fixed_budgets_match(query, key, value, keywords)


@contextmanager
def _one_block_of_values() -> Iterator[None]:
    """Columns of V are independent of each other, and the interpreter is slow: all at once there."""
    blocks = host.one_pass_blocks
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            dense.dense_plan.cache_clear()
            patch.setattr(
                host,
                "one_pass_blocks",
                lambda dtype, dim, value_dim, block_g: (
                    blocks(dtype, dim, value_dim, block_g)[0],
                    max(16, triton.next_power_of_2(value_dim)),
                ),
            )
        yield
    dense.dense_plan.cache_clear()


def weight_of_keys(
    query: torch.Tensor, key: torch.Tensor, keywords: dict[str, Any], unit: float
) -> torch.Tensor:
    """The weight that the fused kernel gave each row of V times `unit`, (B, KVH, G, N): the output
    for values that are the identity, some keys at a time."""
    batch, kv_heads, length, _ = key.shape
    parts = []
    for start in range(0, length, 512):
        width = min(512, length - start)
        value = torch.zeros(batch, kv_heads, length, width, dtype=query.dtype, device=DEVICE)
        value[:, :, start : start + width].diagonal(dim1=2, dim2=3).fill_(unit)
        with _one_block_of_values():
            parts.append(launch.fused(query, key, value, **keywords))
    return torch.cat(parts, -1).view(batch, kv_heads, -1, length)


def assert_fixed_budgets_match(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keywords: dict[str, Any]
) -> None:
    """Before every key of every tile lie as many draws as points of the reference below its CDF."""
    tile_size, dtype, samples = reference.FIXED_TILE, query.dtype, keywords["samples"]
    batch, kv_heads, length, _ = key.shape
    _, worst = exact_scores(query, key, keywords)
    wide = query.double().view(batch, kv_heads, -1, query.shape[-1]), key.double()
    softmax = reference._tiled_softmax(
        *wide, keywords["mask"], keywords["scaling"], tile_size, keywords.get("softcap"),
        keywords.get("sinks"),
    )  # fmt: skip
    where = coordinates(query, key, softmax, keywords)
    _, point, weight = reference._draw_per_tile(softmax, keywords["estimator"], samples, where)
    point, weight = (
        x.unflatten(-1, (softmax.mass.shape[-1], -1)) for x in (point, weight.nan_to_num(0.0))
    )
    held, weight = (weight > 0).sum(-1, keepdim=True), weight[..., 0]  # draws of a tile, and of one
    point = point.masked_fill(torch.arange(point.shape[-1], device=DEVICE) >= held, torch.inf)
    point = point.sort(-1).values

    # A weight is off by the factor exp(error of its score) and then rounded to a multiple of 2**-23,
    # so that F = A / (A + B) becomes (A + a) / (A + B + a + b): off by |a B - b A| / (A + B)^2. The
    # offset and the boundary between two keys are whole steps of 2**-30 of the tile.
    whole = softmax.cdf[..., -1:].clamp(min=1.0)
    own = torch.diff(softmax.cdf, dim=-1, prepend=torch.zeros_like(softmax.cdf[..., :1]))
    rough = own.clamp(0, 2.0**-24).sum(-1, keepdim=True) / whole
    error = torch.expm1(worst)[..., None]
    below = softmax.cdf / whole
    slack = 2 * error / (1 - error) * below * (1 - below) + 2 * rough + 2.0**-29
    low = torch.searchsorted(point, below - slack)
    high = torch.minimum(torch.searchsorted(point, below + slack, right=True), held)
    low = torch.where(softmax.cdf == softmax.cdf[..., -1:], held, low)  # all draws are used up
    high = torch.where(softmax.cdf == 0, 0, high)

    # 16-bit weights are multiplied by what keeps those of light tiles from being rounded to nothing.
    unit = 1.0 if dtype == F32 else 1024.0
    given = weight_of_keys(query, key, keywords, unit).double() / unit
    keys = torch.arange(below[0, 0, 0].numel(), device=DEVICE) + softmax.first[:, None]
    if keywords["mask"] is not None:
        assert (given.masked_fill(keywords["mask"], 0.0) == 0).all(), "a hidden key was drawn"
    place = keys.clamp(max=length - 1)[:, None, None].expand(*given.shape[:3], -1)
    given = given.gather(3, place).masked_fill((keys >= length)[:, None, None], 0.0)
    given = given.unflatten(-1, (-1, tile_size))
    # The masses of the tile and of the row, and a dozen roundings.
    relative = torch.expm1(2 * worst)[..., None] + 2 * rough.amax(-2, keepdim=True)
    relative = relative + gamma(16, F32) + unit_roundoff(dtype)
    lost = torch.finfo(dtype).tiny * unit_roundoff(dtype) / unit
    readable = (held == 0) | (weight[..., None] > 16 * lost)
    assert (softmax.mass[..., None] * ~readable).sum() <= 2.0**-20 * softmax.mass.sum()
    count = given / weight[..., None].clamp(min=1e-300)
    drawn = count.round().masked_fill(~readable | (held == 0), 0.0)
    assert (given.masked_fill(held > 0, 0.0) == 0).all(), "a tile without mass was drawn from"
    off = (count - drawn).abs().masked_fill(~readable, 0.0)
    bound = relative * drawn + lost / weight[..., None].clamp(min=1e-300)
    assert (bound.masked_fill(~readable | (held == 0), 0.0) < 0.5).all()
    assert ((off <= bound) | (held == 0)).all()
    before = drawn.cumsum(-1).long()
    moved = ((before < low) | (before > high)) & readable
    assert not moved.any(), f"{int(moved.sum())} keys with draws that no tie excuses"
    assert (high > low).double().mean() <= 0.1

    # What was drawn is what is summed.
    out = launch.fused(query, key, value, **keywords).double()
    share = torch.zeros(*given.shape[:3], length + 1, dtype=torch.float64, device=DEVICE)
    place = keys.clamp(max=length)[:, None, None].expand(*given.shape[:3], -1)
    share.scatter_add_(3, place, (drawn * weight[..., None]).flatten(3))
    share, value = share[..., :length], value.double()
    size = share @ value.abs()
    depth = 2 * (tile_size + 4 * weight.shape[-1])
    missed = (weight * held[..., 0] * ~readable[..., 0]).sum(-1, keepdim=True) * value.abs().max()
    bound = (relative[..., 0] + gamma(depth, F32)) * size + missed + torch.finfo(dtype).tiny
    assert ((out.view_as(size) - share @ value).abs() <= bound).all()


@settings(fixed, max_examples=30 if CUDA else 6)
@given(st.data())
def test_any_case_of_one_pass_equals_the_reference(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 2))
    shape = (
        data.draw(st.integers(1, 3 if CUDA else 2)),
        kv_heads * data.draw(st.sampled_from([1, 3, 4, 7, 70] if CUDA else [1, 3])),
        kv_heads,
        data.draw(st.integers(1, 3000 if CUDA else 600)),
        data.draw(st.sampled_from([32, 40, 64, 128])),
        data.draw(st.sampled_from([32, 80, 128])),
        data.draw(st.sampled_from([F32, BF16, F16])),
    )
    query, key, value, keywords = case(
        shape,
        data.draw(st.sampled_from([None, *MASKS])),
        data.draw(st.sampled_from([0.0, 1.0, 4.0])),
        data.draw(st.integers(0, 99)),
    )
    keywords = with_extras(keywords, query, data.draw(some_extras))
    keywords["estimator"] = data.draw(st.sampled_from(ESTIMATORS))
    keywords["samples"] = data.draw(st.sampled_from([1, 2, 31, 130 if CUDA else 65]))
    assert_fixed_budgets_match(query, key, value, keywords)
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


@pytest.mark.parametrize("samples", [513, 4097, 140001])
def test_large_counts_are_exact(samples: int) -> None:
    """Two keys share the draws, +1 and -1, and their counts, one of them odd, differ by one: of bf16,
    which holds integers to 256, or of fp16, which does to 2048, nothing remains but the sum of all
    digits."""
    query, key, value, keywords = case((1, 2, 1, 200, 32, 32, BF16))
    key.zero_()
    key[:, :, 77:79] = query[:, :1] * 100
    query[:, 1] = query[:, 0]
    value[:, :, 77], value[:, :, 78] = 1, -1
    keywords["samples"] = samples
    head = torch.arange(2, device=DEVICE).view(1, 2, 1, 1)
    position = torch.tensor(199, device=DEVICE)
    for kernel in ("flash", "prop") if samples == 513 or CUDA else ("flash",):
        stream = Stream.FIXED_TILE if kernel == "flash" else Stream.TILE
        offset = uniform(7, 3, head, position, torch.zeros_like(position), stream)
        assert ((offset - 0.5).abs() > 1e-5).all()
        # Half of the mass lies before the second key: points offset + j below samples / 2.
        ahead = (samples / 2 - offset).ceil()
        expected = ((2 * ahead - samples) / samples).to(BF16).expand(1, 2, 1, 32)
        assert torch.equal(run(kernel, query, key, value, **keywords), expected)


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
    """Also in a batch that alone fills the GPU: splits depend on the length and the heads."""
    distinct = 5 if CUDA else 3
    query, key, value, keywords = case((distinct, 6, 2, 1500 if CUDA else 300, 64, 64, F16))
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
        assert alone.isfinite().all() == (b % distinct != 1)


def scattered(states: torch.Tensor, rows: torch.Tensor, slots: int) -> torch.Tensor:
    """A paged cache with the `states` (B, KVH, N, D) in the slots `rows` (B, N), and NaN elsewhere."""
    storage = states.new_full((slots, states.shape[1], states.shape[3]), torch.nan)
    storage[rows.long()] = states.transpose(1, 2)
    return storage.transpose(0, 1).expand(len(states), -1, -1, -1)


@some(
    "shape, mask",
    [
        ((3, 6, 2, 300, 64, 40, F16), "both"),
        ((2, 5, 1, 129, 40, 64, F32), "holes"),
        ((1, 4, 2, 200, 32, 32, F32), None),
    ],
    [
        (shape, mask)
        for mask in (None, "both", "holes")
        for shape in [
            (3, 12, 4, 1000, 128, 128, BF16),
            (1, 32, 8, 40000, 128, 128, BF16),
            (16, 32, 8, 3000, 128, 128, F16),
            (2, 12, 2, 777, 320, 512, F32),
        ]
    ],
)
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "dense"])
def test_slots_of_a_paged_cache_change_no_draw_and_no_bit(
    estimator: str, shape: tuple[Any, ...], mask: str | None
) -> None:
    """Also of rows that are exact beside others that are drawn."""
    query, key, value, keywords = case(shape, mask)
    batch, heads, length = len(query), query.shape[1], key.shape[2]
    slots = batch * length + 77
    rows = torch.randperm(slots)[: batch * length].view(batch, length).to(DEVICE)
    if shape[-1] == F32:
        rows = rows.int()
    paged = scattered(key, rows, slots), scattered(value, rows, slots)
    keywords["estimator"] = estimator
    if estimator == "dense":
        expected = launch.fused(query, key, value, **keywords)
        assert torch.equal(launch.fused(query, *paged, **keywords, rows=rows), expected)
        return
    for exact in (None, torch.arange(batch, device=DEVICE) == batch - 1):
        index = torch.full((2, batch, heads, keywords["samples"]), -2, device=DEVICE)
        keywords["exact"] = exact
        expected = launch.prop(query, key, value, **keywords, index=index[0])
        out = launch.prop(query, *paged, **keywords, rows=rows, index=index[1])
        assert torch.equal(out, expected)
        assert torch.equal(*index)


@pytest.mark.usefixtures("sums_of_parts")
@pytest.mark.parametrize("kernel", ["prop", "flash", "reference"])
def test_a_decode_step_reads_a_paged_cache(kernel: str) -> None:
    query, key, value, keywords = case((2, 4, 2, 260, 64, 64, F16), "both")
    rows = torch.randperm(600)[: 2 * 260].view(2, 260).to(DEVICE)
    paged = scattered(key, rows, 600), scattered(value, rows, 600)
    assert are_valid(query, *paged, keywords["mask"], None, None, None, rows)
    assert not are_valid(query, *paged, keywords["mask"], None, None, None, rows[:, 1:])
    expected = decode_valid(query, key, value, **keywords, kernel=kernel)
    out = decode_valid(query, *paged, **keywords, kernel=kernel, rows=rows)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("layout", ["head room", "tokens first", "odd"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_layouts_of_a_cache_change_no_bit(kernel: str, layout: str) -> None:
    query, key, value, keywords = case((2, 4, 2, 260, 64, 64, F16))
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
@pytest.mark.parametrize("axis", ["batch", "head", "row"])
def test_offsets_beyond_32_bits(axis: str) -> None:
    """The second row of a batch, or its second head, lies 2**31 elements behind the first, or the last
    keys do."""
    batch, heads, length = {"batch": (2, 1, 300), "head": (1, 2, 300), "row": (1, 1, 600)}[axis]
    query, key, value, keywords = case((batch, 4, heads, length, 64, 64, BF16))
    stride = 2**22 if axis == "row" else 64
    far = 2**31 if axis == "head" else stride * length
    memory = torch.zeros(max(2**31 + length * 64, length * stride), dtype=BF16, device=DEVICE)
    far_states = memory.as_strided(
        (batch, heads, length, 64), (2**31 if axis == "batch" else far, far, stride, 1)
    )
    for kernel in KERNELS:
        expected = run(kernel, query, key, value, **keywords)
        assert torch.equal(run(kernel, query, far_states.copy_(key), value, **keywords), expected)
        assert torch.equal(run(kernel, query, key, far_states.copy_(value), **keywords), expected)


def test_rows_of_one_tile_beyond_32_bits() -> None:
    """Keys 2**25 elements apart; where a 32-bit offset would wrap around to there is memory, of zeros,
    so that it gives a wrong result and no fault."""
    query, key, value, keywords = case((1, 2, 1, 100, 32, 32, F16))
    stride, zeros = 2**25, 2**31 + 100 * 2**25
    memory = torch.from_numpy(np.zeros(0 if CUDA else zeros, np.float16)).to(DEVICE)
    if CUDA:
        memory = torch.zeros(zeros, dtype=F16, device=DEVICE)
    far = memory.as_strided((1, 1, 100, 32), (stride, stride, stride, 1), 2**31)
    for kernel in KERNELS:
        expected = run(kernel, query, key, value, **keywords)
        assert torch.equal(run(kernel, query, far.copy_(key), value, **keywords), expected), kernel
        assert torch.equal(run(kernel, query, key, far.copy_(value), **keywords), expected), kernel
    rows = torch.arange(100, dtype=torch.int32, device=DEVICE)[None]
    for kernel in ("prop", "dense"):
        expected = run(kernel, query, value, value, **keywords)
        assert torch.equal(run(kernel, query, far, far, **keywords, rows=rows), expected), kernel


@pytest.mark.usefixtures("sums_of_parts")
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


@pytest.mark.parametrize("estimator", ["stratified", "multinomial"])
def test_hidden_tiles_are_skipped_and_change_no_bit(estimator: str) -> None:
    """Two tiles between others: nothing is written for them, and without their keys, since these draws
    know no tile, everything is the same. (Memory that nobody wrote is NaN here, see conftest.py.)"""
    query, key, value, keywords = case((1, 6, 2, 600, 64, 40, F16))
    first, hidden = 5, slice(5 + 128, 5 + 384)
    mask = torch.ones(1, 1, 1, 600, dtype=torch.bool, device=DEVICE)
    mask[..., :first] = False
    mask[..., hidden] = False
    keywords.update(estimator=estimator, position=torch.tensor([599], device=DEVICE))
    rows, span = host.visible(mask, 1, True)
    stash, top, total, *_ = pass_1.scores(
        query, key, scaling=keywords["scaling"], mask=rows, span=span
    ).tensors()
    assert stash[:, :, 1:3].isnan().all()
    assert (top[:, :, 1:3] == -torch.inf).all()
    assert (total[:, :, 1:3] == 0).all()
    assert stash[:, :, [0, 3]].isfinite().all()
    out, index = kernel_draws(query, key, value, {**keywords, "mask": mask})
    kept = mask[0, 0, 0].nonzero()[:, 0]
    without, among = kernel_draws(query, key[:, :, kept], value[:, :, kept], keywords)
    assert torch.equal(out, without)
    assert torch.equal(index, kept[among])


@pytest.mark.usefixtures("sums_of_parts")
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


PROFILES = ["random", "peaked", "sink", "flat", "boundaries"]
# The profiles that fixed budgets per tile would bias most.
each_profile = some("profile", [("flat",), ("sink",), ("boundaries",)], [(p,) for p in PROFILES])


def row_of(profile: str, samples: int) -> tuple[torch.Tensor, torch.Tensor, Softmax]:
    """query (1, 1, 1, 32), key (1, 1, 300, 32) and, in float64, the softmax that they have."""
    length = 300
    query, key, _, keywords = case((1, 1, 1, length, 32, 32, F32))
    query = query * {"peaked": 5.0, "flat": 0.0}.get(profile, 1.0)
    if profile == "boundaries":
        # Tiles of 1/2, 1/4 and 1/4 of the mass: their ends are on points of the grid of 8 draws.
        query.zero_()
        query[..., 0] = 32**0.5
        mass = torch.tensor([2 / 128, 1 / 128, 1 / 44]).repeat_interleave(128)[:length]
        key[..., 0] = mass.log().to(DEVICE)
    if profile == "sink":
        key[:, :, 0] = query[0, 0] * 2.0
    scores, _ = exact_scores(query, key, keywords)
    return query, key, Softmax(scores[0, 0, 0].cpu(), torch.ones(length, dtype=torch.bool), samples)


@some(
    "profile, estimator",
    [(profile, "systematic") for profile in PROFILES]
    + [("random", "stratified"), ("boundaries", "stratified"), ("sink", "multinomial")],
    [(profile, estimator) for profile in PROFILES for estimator in ESTIMATORS],
)
@pytest.mark.parametrize("kernel", ["prop", "flash"])
def test_unbiased(kernel: str, profile: str, estimator: str) -> None:
    """The mean over heads and seeds is attention, along directions that show where a bias would be."""
    rows, heads = (128, 16) if CUDA else (1, 48)
    query, key, softmax = row_of(profile, samples=8)
    x = directions(300, 28)  # random columns, a ramp, the parity of the tile
    _, _, _, keywords = case((1, 1, 1, 1, 32, 32, F32))
    keywords.update(
        samples=softmax.samples,
        estimator=estimator,
        seed=torch.arange(rows, device=DEVICE) * 7919,
        position=torch.zeros(rows, dtype=torch.int64, device=DEVICE),
    )
    value = x.T.contiguous().to(DEVICE, F32)[None, None]
    states = [key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)]
    out = run(kernel, query.expand(rows, heads, 1, 32), *states, **keywords)
    allocation = "tile" if kernel == "flash" else "global"
    if estimator == "systematic":
        # No closed form: that of the reference over other seeds, whose mean is exact (test_unbiased).
        draws = drawn(softmax, estimator, allocation, 2000, torch.arange(2000) + 10**6)
        variance = (share(draws, 300) @ x.T).var(0)
    else:
        variance = analytic_variance(softmax, x, estimator, allocation)
    # Rounding a weight to fp16 moves it by 2**-11 at most, and its sum likewise.
    floor = 2.0**-10 * (x.abs() @ softmax.p)
    assert_mean(out.flatten(0, 2).cpu(), x @ softmax.p, variance, floor)


def seeds_over_a_grid(
    offset: torch.Tensor, levels: int, within: torch.Tensor | None = None
) -> torch.Tensor:
    """For each of so many equally spaced numbers in [0, 1), the seed whose offset is nearest."""
    grid = (torch.arange(levels, device=offset.device) + 0.5) / levels
    distance = (offset - grid[:, None]).abs()
    if within is not None:
        distance = distance.masked_fill(~within, torch.inf)
    nearest, seed = distance.min(1)
    assert (nearest < 1 / (8 * levels)).all()
    return seed


@each_profile
def test_systematic_over_a_grid_of_uniforms(profile: str) -> None:
    """Of M equally spaced offsets, points a unit apart hit [a, b) once in 1 / (b - a), within 1 / M:
    tiles for the offset of the grid, and keys for that inside a tile, its budget given."""
    samples, levels, seeds = 8, 12, torch.arange(2**15, device=DEVICE)
    query, key, softmax = row_of(profile, samples)
    _, _, value, keywords = case((1, 1, 1, 300, 32, 32, F32))
    weights = pass_1.scores(
        query, key, scaling=keywords["scaling"], mask=None, span=None, parts=True
    )
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    where = seeds, 3, zero, zero
    grid = uniform(*where, zero, Stream.GRID)
    tiles = softmax.tiles(reference.TILE)
    mass = torch.stack([t.sum() for t in tiles])
    points = torch.arange(samples)[:, None] + grid.cpu()
    ends = (points < samples * mass.cumsum(0)[:, None, None]).sum(1)
    ends[-1] = samples
    budget = ends.diff(dim=0, prepend=torch.zeros_like(ends[:1])).to(DEVICE)  # [T, seeds]

    chosen = [seeds_over_a_grid(grid, 3 * levels)]
    inside = []
    for t in range(len(tiles)):
        offset = uniform(*where, zero + t, Stream.TILE)
        for n in budget[t].unique().tolist():
            within = budget[t] == n
            if n and within.float().mean() > 0.02:
                inside.append((t, n))
                chosen.append(seeds_over_a_grid(offset, levels, within))
    rows = sum(map(len, chosen))
    index = torch.empty(rows, 1, samples, dtype=torch.int64, device=DEVICE)
    many = pass_1.Weights(*(x.expand(rows, *x.shape[1:]).contiguous() for x in weights.tensors()))
    pass_2.sample(
        value.expand(rows, -1, -1, -1), None, many, query.new_empty(rows, 1, 1, 32),
        samples=samples, estimator="systematic", seed=torch.cat(chosen), layer=3, position=zero,
        head_offset=0, index=index,
    )  # fmt: skip
    over_grid, *over_tiles = index[:, 0].cpu().split([len(c) for c in chosen])
    # 2**-10 of a tile's draws, or of a key's, for weights rounded to fp16.
    mean = torch.stack([(over_grid // reference.TILE == t).sum(1).double() for t in range(3)], 1)
    assert ((mean - samples * mass).abs() < 1 + 2.0**-7).all()
    assert ((mean.mean(0) - samples * mass).abs() <= 1.25 / (3 * levels) + samples * 2.0**-10).all()
    for (t, n), drawn_keys in zip(inside, over_tiles, strict=True):
        mine = (drawn_keys // reference.TILE == t).sum(1)
        assert ((mine - n).abs() <= (profile == "boundaries")).all()
        if not (mine == n).all():  # the tile ends on a point of the grid
            continue
        keys = torch.arange(len(tiles[t])) + t * reference.TILE
        row = drawn_keys[:, None].masked_fill(drawn_keys[:, None] // reference.TILE != t, 10**6)
        below = (row <= keys[:, None]).sum(-1).double().mean(0)
        expected = n * tiles[t].cumsum(0) / tiles[t].sum()
        assert ((below - expected).abs() <= 1.25 / levels + n * 2.0**-10).all()


@each_profile
def test_fixed_budgets_over_a_grid_of_uniforms(profile: str) -> None:
    """Likewise for one pass; the columns of V say which keys lie below some key of a tile."""
    samples, levels, seeds = 8, 16, torch.arange(2**13, device=DEVICE)
    query, key, softmax = row_of(profile, samples)
    _, _, _, keywords = case((1, 1, 1, 300, 32, 32, F32))
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    tiles = softmax.tiles(reference.FIXED_TILE)
    keywords |= {"samples": samples, "position": zero.expand(levels)}
    for t, p in enumerate(tiles):
        offset = uniform(seeds, 3, zero, zero, zero + t, Stream.FIXED_TILE)
        keys = torch.arange(300) - t * reference.FIXED_TILE
        # The median key and others, of which some end on a point of the draws in "flat".
        last = torch.arange(32) * len(p) // 32
        value = ((keys[:, None] >= 0) & (keys[:, None] <= last)).to(DEVICE, F32)[None, None]
        keywords["seed"] = seeds_over_a_grid(offset, levels)
        states = [x.expand(levels, -1, -1, -1) for x in (query, key, value)]
        out = launch.fused(*states, **keywords)[:, 0, 0].double().cpu()
        draws = samples // len(tiles)
        error = (out.mean(0) - p.cumsum(0)[last]).abs()
        assert (error <= p.sum() * (1.25 / levels / draws + 2.0**-15)).all()
        # Not on average alone: each is within a draw.
        assert ((out - p.cumsum(0)[last]).abs() <= p.sum() * (1 / draws + 2.0**-15)).all()


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


def dispatches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kernels whose launches go through Triton's dispatch from now on."""
    launched: list[Any] = []
    dispatch = triton.JITFunction.run

    def run_and_record(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self)
        return dispatch(self, *args, **kwargs)

    monkeypatch.setattr(triton.JITFunction, "run", run_and_record)
    return launched


@pytest.mark.gpu
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_compiled_kernels_give_what_triton_s_dispatch_gives(
    kernel: str, scored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel, every bit; also after an argument moves to an address of another alignment, and
    after Triton's own cache is emptied."""
    query, key, value, keywords = case((3, 8, 2, 1500, 64, 64, BF16), "both" if scored else None)
    if scored:
        keywords = with_extras(keywords, query, EXTRAS)
        keywords["exact"] = torch.tensor([True, False, False], device=DEVICE)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)
        return storage[1:].view(tensor.shape).copy_(tensor)

    cases = [
        (query, key, value),
        (moved(query), moved(key), moved(value)),
        (query, moved(key), value),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Launcher, "__call__", lambda self, grid, *x: self._dispatch(grid, x))
        expected = [run(kernel, *tensors, **keywords) for tensors in cases]
    for tensors in cases:
        run(kernel, *tensors, **keywords)
    dispatched = dispatches(monkeypatch)
    for i in (0, 1, 2, 1, 0):
        assert torch.equal(run(kernel, *cases[i], **keywords), expected[i])
    torch.cuda.synchronize()
    for jit in (pass_1.scores_kernel, pass_2.sample_kernel, dense.dense_kernel):
        jit.device_caches.clear()
    assert torch.equal(run(kernel, *cases[0], **keywords), expected[0])
    assert not dispatched


@pytest.mark.gpu
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_growing_context_compiles_once(
    kernel: str, scored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a length at which pass 2 begins to walk more tiles at a time, all compiled by the first of
    200 steps; also with a mask, sinks, a soft cap and exact rows, which take every kernel there is."""
    query, _, _, keywords = case((2, 4, 2, 8, 64, 64, BF16))
    boundary = pass_2.FEW_TILES * reference.TILE
    cache = torch.randn(2, 2, boundary + 256, 64, device=DEVICE).to(BF16)
    visible = torch.ones(2, 1, 1, boundary + 256, dtype=torch.bool, device=DEVICE)
    visible[1, ..., :77] = False
    if scored:
        keywords = with_extras(keywords, query, EXTRAS)
        keywords["exact"] = torch.tensor([True, False], device=DEVICE)
    kernels = (
        common.span_kernel,
        pass_1.scores_kernel,
        pass_2.sample_kernel,
        dense.dense_kernel,
        flash.flash_kernel,
        dense.combine_kernel,
    )

    def compiled() -> int:
        return sum(len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels)

    for module in (host, pass_1, pass_2, dense, flash):
        for name, cached in vars(module).items():
            if name.endswith(("_launcher", "_plan")):
                cached.cache_clear()
    dispatched = dispatches(monkeypatch)
    counts, dispatches_by = [], []
    for step, length in enumerate(range(boundary - 100, boundary + 100)):
        keys = cache[:, :, :length]
        contiguous = keys.contiguous() if length % 2 else keys
        keywords["layer"] = step
        if scored:
            keywords["mask"] = visible[..., :length]
            keywords["position"] = keywords["position"] + 1
        else:
            keywords["seed"] = step
        run(kernel, query, contiguous, contiguous, **keywords)
        counts.append(compiled())
        dispatches_by.append(len(dispatched))
    assert counts[0] > 0
    assert counts[0] == counts[-1]
    assert 0 < dispatches_by[0] == dispatches_by[-1]  # and Triton is asked for nothing again


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("samples", [34, 300, 513])
def test_workspaces_take_the_bytes_of_the_formula(kernel: str, samples: int) -> None:
    """As `launch` documents them: bytes asked for at once, with nothing else on the device."""
    batch, heads, length, value_dim = 3, 8, 5000, 80
    query, key, value, keywords = case((batch, heads, 2, length, 64, value_dim, BF16))
    keywords["samples"] = samples
    run(kernel, query, key, value, **keywords)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    allocated = torch.cuda.memory_allocated()
    out = run(kernel, query, key, value, **keywords)
    workspace = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    workspace -= out.numel() * out.element_size()
    if kernel == "prop":
        chunks = -(-samples // {34: 16, 300: 32, 513: 64}[samples])
        tile_bytes = 264 if samples <= 512 else 296
        tiles = -(-length // 128)
        expected = batch * heads * (tile_bytes * tiles + 4 * value_dim * chunks + 4)
        assert 0 <= workspace - expected < 6 * ALIGNMENT
    else:
        splits, rest = divmod(workspace, batch * heads * (4 * value_dim + 8))
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        assert rest < 3 * ALIGNMENT
        assert 1 < splits <= 2 * processors
    # The allocator rounds each of a handful of blocks up, the largest ones by less than 1 MiB.
    peak = torch.cuda.max_memory_allocated() - allocated
    assert workspace <= peak <= workspace + out.numel() * out.element_size() + 6 * 2**20
    assert torch.cuda.memory_allocated() - allocated <= 2**20  # nothing is kept but the result


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_tensors_of_a_gpu_that_is_not_the_current_one(kernel: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    query, key, value, keywords = case((2, 6, 2, 700, 64, 64, BF16), "both")
    keywords = with_extras(keywords, query, EXTRAS)
    keywords["exact"] = torch.tensor([False, True], device=DEVICE)
    here = run(kernel, query, key, value, **keywords)
    there = [
        {k: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for k, x in given.items()}
        for given in ({"query": query, "key": key, "value": value}, keywords)
    ]
    with torch.cuda.device(0):
        out = run(kernel, *there[0].values(), **there[1])
        assert torch.cuda.current_device() == 0
    assert out.device == torch.device("cuda:1")
    assert torch.equal(out.to(here.device), here)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "estimator"),
    [("prop", "systematic"), ("flash", "systematic"), ("flash", "multinomial"), ("prop", "dense")],
)
def test_the_operator_keeps_its_schema_with_every_kernel(
    implementation: str, estimator: str
) -> None:
    query, key, value, keywords = case((2, 6, 3, 300, 64, 40, BF16), "both")
    extras = with_extras(keywords, query, EXTRAS)
    choices = {
        "samples": 20,
        "estimator": estimator,
        "scaling": 0.125,
        "layer": 2,
        "implementation": implementation,
    }
    exact = torch.tensor([True, False], device=DEVICE)
    rows = torch.randint(300, (2, 200), device=DEVICE)
    for tensors, scalars in (
        ((None,) * 7, {"seed": 1, "softcap": None, "head_offset": 0}),
        ((*(None,) * 6, rows), {"seed": 1, "softcap": None, "head_offset": 0}),
        (
            (*(extras[k] for k in ("mask", "position", "seed", "sinks")), exact, None, None),
            {"seed": 0, "softcap": 2.0, "head_offset": 6},
        ),
    ):
        torch.library.opcheck(
            torch.ops.santa_hf.decode.default, (query, key, value, *tensors), choices | scalars
        )


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


@some(
    "mask, samples",
    here=[(None, 17), ("rows", 17)],
    everywhere=[(m, n) for m in (None, "one row", "rows") for n in (1, 17, 130, 600)],
)
def test_the_short_way_draws_the_same_bits(mask: str | None, samples: int) -> None:
    """At every length, by what the first of them worked out; also as a view of a longer cache."""
    query, key, value, keywords = case((2, 4, 2, 600 if CUDA else 300, 32, 24, F16))
    keywords.update(samples=samples, position=torch.tensor([700, 7], device=DEVICE))
    visible = torch.rand(2, 1, 1, key.shape[2], device=DEVICE) < 0.7
    plain = None
    for length in (150, key.shape[2] - 10):
        tensors = query, key[:, :, :length], value[:, :, :length]
        seen = None if mask is None else visible[: 1 if mask == "one row" else 2, ..., :length]
        keywords.update(mask=seen, layer=length, seed=length + 1, head_offset=5)
        plain = plain or launch.Plain(*tensors, seen)
        for estimator in ESTIMATORS if CUDA else ("systematic",):
            out = plain.prop(
                *tensors, seen, keywords["position"], samples, estimator, keywords["scaling"],
                length + 1, length, 5,
            )  # fmt: skip
            assert torch.equal(out, launch.prop(*tensors, **{**keywords, "estimator": estimator}))
        out = plain.dense(*tensors, seen, keywords["scaling"])
        assert torch.equal(out, run("dense", *tensors, **keywords))


def kind_of_step(**changes: Any) -> tuple[Any, ...]:
    """query, key, value, mask and position of a step, but for `changes`."""
    given = {
        "length": 40, "batch": 2, "heads": 4, "query_dtype": F16, "query_transposed": False,
        "key_batch": 2, "key_heads": 2, "key_dim": 32, "key_room": 64, "key_dtype": F16, "key_step": 1,
        "value_batch": 2, "value_heads": 2, "value_dim": 24, "value_room": 64, "value_dtype": F16,
        "value_step": 1, "value_length": 40, "mask": 2, "mask_heads": 1, "mask_step": 1,
        "mask_dtype": torch.bool, "mask_length": 40, "position": 2, "position_dtype": torch.int64,
    } | changes  # fmt: skip

    def normal(*shape: int, dtype: Any, step: int = 1) -> torch.Tensor:
        return torch.randn(*shape[:-1], shape[-1] * step).to(DEVICE, dtype)[..., ::step]

    batch, heads, dim = given["batch"], given["heads"], given["key_dim"]
    query = normal(batch, heads, 1, dim, dtype=given["query_dtype"])
    if given["query_transposed"]:
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
    states = [
        normal(
            *(given[f"{name}_{what}"] for what in ("batch", "heads", "room", "dim")),
            dtype=given[f"{name}_dtype"],
            step=given[f"{name}_step"],
        )
        for name in ("key", "value")
    ]
    mask, position = None, None
    if given["mask"]:
        shape = given["mask"], given["mask_heads"], 1, given["mask_length"] * given["mask_step"]
        mask = (torch.rand(shape, device=DEVICE) < 0.7).to(given["mask_dtype"])
        mask = mask[..., :: given["mask_step"]]
    if given["position"]:
        position = torch.arange(given["position"], device=DEVICE).to(given["position_dtype"])
    key, value = states[0][:, :, : given["length"]], states[1][:, :, : given["value_length"]]
    return query, key, value, mask, position


def longer(length: int) -> dict[str, int]:
    return {"length": length, "value_length": length, "mask_length": length}


@pytest.fixture
def no_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """`plain_step` has seen nothing yet."""
    monkeypatch.setattr(functional, "_plain", {})


@pytest.mark.usefixtures("no_kinds")
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 3, "key_batch": 3, "value_batch": 3, "mask": 3, "position": 3},
        {"heads": 8}, {"key_heads": 4, "value_heads": 4}, {"key_dim": 16}, {"value_dim": 32},
        {"key_room": 71}, {"value_room": 71}, {"query_transposed": True}, {"mask": None}, {"mask": 1},
        {"mask_step": 2}, {"query_dtype": F32, "key_dtype": F32, "value_dtype": F32},
    ],
    ids=str,
)  # fmt: skip
def test_another_kind_of_step_has_another_short_way(changes: dict[str, Any]) -> None:
    """Which draws what the long way does, before and after it has seen a longer cache."""
    found = []
    for kind in ({}, changes, changes | longer(47), longer(47), {}):
        query, key, value, mask, position = kind_of_step(**kind)
        plain = plain_step(query, key, value, mask, position)
        assert isinstance(plain, launch.Plain)
        found.append(plain)
        out = plain.prop(query, key, value, mask, position, 5, "systematic", 0.2, 7, 3, 2)
        expected = launch.prop(
            query, key, value, samples=5, estimator="systematic", scaling=0.2, mask=mask, seed=7,
            layer=3, position=position, head_offset=2,
        )  # fmt: skip
        assert torch.equal(out, expected)
    one, other, *rest = found
    assert one is not other
    assert rest == [other, one, one]


@pytest.mark.usefixtures("no_kinds")
@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 5}, {"query_dtype": F32}, {"key_dtype": F32}, {"value_dtype": F32},
        {"key_batch": 1}, {"value_batch": 1}, {"value_heads": 1}, {"value_length": 39},
        {"key_step": 2}, {"value_step": 2}, {"mask_length": 39}, {"mask_heads": 4}, {"mask": 3},
        {"mask_dtype": torch.float16}, {"position": 1}, {"position": None},
        {"position_dtype": torch.int32},
        {"query_dtype": torch.float64, "key_dtype": torch.float64, "value_dtype": torch.float64},
        longer(0),
    ],
    ids=str,
)  # fmt: skip
def test_steps_without_a_short_way(changes: dict[str, Any]) -> None:
    """Though one that is like them but for this has one."""
    for _ in range(2):
        assert plain_step(*kind_of_step()) is not None
        assert plain_step(*kind_of_step(**changes)) is None


@pytest.mark.usefixtures("no_kinds")
def test_the_short_way_ends_where_the_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MAX_LENGTH", 47)
    for length, within in ((40, True), (48, False), (47, True)):
        assert (plain_step(*kind_of_step(**longer(length))) is not None) == within
    # What is remembered is bounded.
    monkeypatch.setattr(functional, "KINDS", 3)
    monkeypatch.setattr(host, "KEPT", 3)
    for room in range(41, 50):
        step = kind_of_step(key_room=room)
        plain = plain_step(*step)
        assert len(functional._plain) <= 3
    for samples in range(1, 9):
        plain.prop(*step, samples, "systematic", 0.2, 7, 3, 0)
        plain.dense(*step[:4], samples / 10)
        assert len(plain._drawn) <= 3
        assert len(plain._exact) <= 3


def test_a_model_takes_the_short_way_and_generates_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    for name in ("prop", "dense"):
        short = getattr(launch.Plain, name)
        monkeypatch.setattr(
            launch.Plain, name, lambda *x, s=short, n=name: taken.append(n) or s(*x)
        )
    model = tiny.build("llama").to(DEVICE)
    inputs = {k: x.to(DEVICE) for k, x in tiny.left_padded(tiny.prompts(30, 41)).items()}
    way = attention.plain_step
    for estimator, name in (("systematic", "prop"), ("dense", "dense")):
        results = []
        for kernel, found in (("prop", way), ("prop", lambda *_: None), ("auto", way)):
            taken.clear()
            monkeypatch.setattr(attention, "plain_step", found)
            tiny.use(model, "santa", samples=9, estimator=estimator, kernel=kernel)
            results.append(model.generate(**inputs, max_new_tokens=3, do_sample=False))
            short = found is way and (kernel == "prop" or CUDA)
            assert taken == ([name] * 2 * tiny.LAYERS if short else [])
        assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("kernel", ["flash", "reference"])
def test_another_kernel_goes_its_own_way(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "plain_step", lambda *_: pytest.fail("not asked for"))
    model = tiny.use(tiny.build("llama").to(DEVICE), "santa", samples=9, kernel=kernel)
    (prompt,) = tiny.prompts(12)
    model.generate(prompt.to(DEVICE), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_nothing_is_written_between_the_parts_of_a_workspace(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into gaps of 4 KiB, that conftest.py fills as it does memory that nobody wrote."""
    workspaces: list[tuple[Layout, torch.Tensor]] = []
    allocate = Layout.allocate

    def recorded(layout: Layout, device: torch.device) -> list[Part]:
        parts = allocate(layout, device)
        workspaces.append((layout, parts[0]._memory))
        return parts

    def forget() -> None:
        for cached in (pass_1.weights_layout, pass_2.sample_plan, dense.partials):
            cached.cache_clear()

    query, key, value, keywords = case((2, 6, 2, 300, 32, 24, F32), "both")
    keywords["samples"] = 20
    monkeypatch.setattr(Layout, "allocate", recorded)
    monkeypatch.setattr(launcher, "ALIGNMENT", 4096)
    monkeypatch.setattr(launch, "MANY_DRAWS", 0)
    forget()
    run(kernel, query, key, value, **keywords)
    forget()
    assert len(workspaces) == (2 if kernel == "prop" else 1)
    for layout, memory in workspaces:
        gaps = torch.ones_like(memory, dtype=torch.bool)
        for offset, shape, dtype in layout.places:
            gaps[offset : offset + math.prod(shape) * dtype.itemsize] = False
        assert gaps.sum() > 1000
        poison = torch.full((len(memory) // 4,), 2**31 - 1, dtype=torch.int32, device=DEVICE)
        assert torch.equal(memory[gaps], poison.view(torch.uint8)[gaps])
        assert not torch.equal(memory, poison.view(torch.uint8))


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_layers_that_share_a_mask_find_its_span_once(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value, keywords = case((2, 4, 2, 300, 32, 32, F32))
    padding = torch.ones(2, 300, dtype=torch.bool, device=DEVICE)
    padding[1, :77] = False
    expected = run(kernel, query, key, value, **{**keywords, "mask": padding[:, None, None]})
    found: list[Any] = []
    find = host._visible
    monkeypatch.setattr(host, "_visible", lambda *x: found.append(x[1:]) or find(*x))
    mask = shared.share(padding[:, None, None].clone())  # no view: what it keeps must not hold it
    for _ in range(3):
        assert torch.equal(run(kernel, query, key, value, **keywords | {"mask": mask}), expected)
    assert len(found) == 1
    run(kernel, query[:1], key[:1], value[:1], **keywords | {"mask": shared.share(mask[:1])})
    assert found[1][0] == 1
    gone = weakref.ref(mask)
    del mask
    assert gone() is None


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_graph_finds_the_span_of_its_mask_at_every_replay(kernel: str) -> None:
    """Though a step before it found that of what the mask held then."""
    query, key, value, keywords = case((2, 8, 2, 5000, 128, 128, BF16))
    keywords["mask"] = shared.share(torch.ones(2, 1, 1, 5000, dtype=torch.bool, device=DEVICE))
    whole = run(kernel, query, key, value, **keywords)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(kernel, query, key, value, **keywords)
    graph.replay()
    assert torch.equal(out, whole)
    keywords["mask"][..., :1234] = False
    graph.replay()
    mask = keywords["mask"].clone()
    assert torch.equal(out, run(kernel, query, key, value, **keywords | {"mask": mask}))
    assert not torch.equal(out, whole)


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
