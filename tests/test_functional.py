"""santa_decode: every bad argument is named, every good one gives what the contract says."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import attention, attention_budget, gamma, unit_roundoff, working_dtype

from santa_hf import reference, santa_decode
from santa_hf.config import ESTIMATORS

SAMPLED = ("systematic", "stratified", "multinomial")


def tensors(
    batch: int = 2,
    heads: int = 6,
    kv_heads: int = 2,
    length: int = 40,
    dim: int = 8,
    value_dim: int = 4,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    return {
        "query": torch.randn(batch, heads, 1, dim, dtype=dtype),
        "key": torch.randn(batch, kv_heads, length, dim, dtype=dtype),
        "value": torch.randn(batch, kv_heads, length, value_dim, dtype=dtype),
    }


def visible(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


# What to change in a valid call, and the error that names it.
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, r"query must be a tensor, got \[1.0\]"),
    ({"key": None}, TypeError, "key must be a tensor, got None"),
    (
        {"query": torch.zeros(6, 1, 8)},
        ValueError,
        r"query must have 4 dimensions, got .*\(6, 1, 8\)",
    ),
    ({"key": torch.zeros(2, 40, 8)}, ValueError, "key must have 4 dimensions"),
    ({"value": torch.zeros(2, 2, 1, 40, 4)}, ValueError, "value must have 4 dimensions"),
    ({"query": torch.zeros(2, 6, 3, 8)}, ValueError, "one token per row, .*got 3 tokens"),
    ({"query": torch.zeros(2, 6, 0, 8)}, ValueError, "one token per row, .*got 0 tokens"),
    ({"query": torch.zeros(2, 5, 1, 8)}, ValueError, "multiple of KV heads .*H=5, KVH=2"),
    ({"query": torch.zeros(2, 0, 1, 8)}, ValueError, "no dimension empty, got B=2, H=0"),
    ({"key": torch.zeros(2, 3, 40, 8)}, ValueError, r"value must be \(2, 3, 40, Dv\), got"),
    ({"key": torch.zeros(1, 2, 40, 8)}, ValueError, r"key must be \(2, KVH, N, 8\), got \(1, 2,"),
    ({"key": torch.zeros(2, 2, 40, 7)}, ValueError, r"key must be \(2, KVH, N, 8\), got"),
    ({"value": torch.zeros(2, 2, 39, 4)}, ValueError, r"value must be \(2, 2, 40, Dv\), got"),
    (
        {"query": torch.zeros(2, 6, 1, 8).double()},
        TypeError,
        "key has torch.float32, query torch.f",
    ),
    ({"value": torch.zeros(2, 2, 40, 4).half()}, TypeError, "value has torch.float16, query torch"),
    (
        {"query": torch.zeros(2, 6, 1, 8).long()},
        TypeError,
        "must share one of .*query has torch.int",
    ),
    ({"key": torch.zeros(2, 2, 40, 16)[..., ::2]}, ValueError, "key must have a unit last stride"),
    ({"value": torch.zeros(2, 2, 4, 40).mT}, ValueError, "value must have a unit last stride"),
    ({"key": torch.zeros(2, 2, 40, 8, device="meta")}, ValueError, "key is on meta, query on cpu"),
    ({"estimator": "sys"}, ValueError, "estimator must be one of systematic, .*, dense, got 'sys'"),
    ({"estimator": ["dense"]}, ValueError, "estimator must be one of systematic, "),
    ({"kernel": "triton"}, ValueError, "kernel must be one of auto, reference, prop, flash, got"),
    ({"samples": 0}, ValueError, r"samples must be in \[1, 16777216\], got 0"),
    ({"samples": -1}, ValueError, r"samples must be in \[1, 16777216\], got -1"),
    ({"samples": 2.0}, TypeError, r"samples must be an integer in \[1, 16777216\], got 2.0"),
    ({"samples": True}, TypeError, "samples must be an integer in .* got True"),
    ({"layer": -1}, ValueError, "layer must be in .* got -1"),
    ({"layer": 2**24}, ValueError, "layer must be in .* got 16777216"),
    ({"layer": None}, TypeError, "layer must be an integer in .* got None"),
    ({"head_offset": -1}, ValueError, "head_offset must be in .* got -1"),
    ({"head_offset": 1.0}, TypeError, "head_offset must be an integer in .* got 1.0"),
    ({"seed": -1}, ValueError, "seed must be in .* got -1"),
    ({"seed": 2**63}, ValueError, "seed must be in .* got 9223372036854775808"),
    ({"seed": "0"}, TypeError, "seed must be an integer in .* got '0'"),
    (
        {"seed": torch.zeros(2)},
        ValueError,
        r"seed must be int64 of shape \(2,\), got torch.float32",
    ),
    (
        {"seed": torch.tensor([1, 2, 3])},
        ValueError,
        r"seed must be int64 of shape \(2,\), .*\(3,\)",
    ),
    ({"position": 7}, TypeError, "position must be a tensor, got 7"),
    ({"position": torch.tensor(7)}, ValueError, r"position must be int64 of shape \(2,\), .*\(\)"),
    ({"position": torch.tensor([[7], [8]])}, ValueError, r"position must be int64 of shape \(2,\)"),
    ({"position": torch.tensor([7, 8]).int()}, ValueError, "position must be int64 .*torch.int32"),
    ({"mask": [True]}, TypeError, "mask must be a tensor"),
    ({"mask": torch.ones(2, 1, 1, 40)}, TypeError, "mask must be bool .* got torch.float32"),
    ({"mask": torch.ones(2, 1, 1, 40).long()}, TypeError, "mask must be bool .* got torch.int64"),
    ({"mask": visible(2, 1, 1, 39)}, ValueError, r"mask must broadcast to \(2, 1, 1, 40\), got"),
    ({"mask": visible(3, 1, 1, 40)}, ValueError, r"mask must broadcast to .*got \(3, 1, 1, 40\)"),
    ({"mask": visible(2, 6, 1, 40)}, ValueError, r"mask must broadcast to .*got \(2, 6, 1, 40\)"),
    ({"mask": visible(2, 1, 40, 40)}, ValueError, r"mask must broadcast to .*\(2, 1, 40, 40\)"),
    ({"mask": visible(2, 40)}, ValueError, r"mask must broadcast to .*got \(1, 1, 2, 40\)"),
    ({"mask": visible(1, 2, 1, 1, 40)}, ValueError, r"mask must broadcast to .*\(1, 2, 1, 1, 40\)"),
    ({"softcap": 0.0}, ValueError, "softcap must be a positive finite number or None, got 0.0"),
    ({"softcap": -1.0}, ValueError, "softcap must be a positive finite number or None, got -1.0"),
    (
        {"softcap": torch.inf},
        ValueError,
        "softcap must be a positive finite number or None, got inf",
    ),
    ({"softcap": "2"}, ValueError, "softcap must be a positive finite number or None, got '2'"),
    ({"scaling": "2"}, ValueError, "scaling must be a finite number or None, got '2'"),
    ({"scaling": torch.nan}, ValueError, "scaling must be a finite number or None, got nan"),
    (
        {"scaling": torch.ones(2)},
        ValueError,
        r"scaling must be a finite number or None, got tensor",
    ),
    ({"sinks": [0.0] * 6}, TypeError, "sinks must be a tensor, got"),
    ({"sinks": torch.zeros(2)}, ValueError, r"sinks must be floating point of shape \(6,\), got"),
    ({"sinks": torch.zeros(6).long()}, ValueError, r"sinks must be floating point .*torch.int64"),
    ({"exact": True}, TypeError, "exact must be a tensor, got True"),
    ({"exact": visible(3)}, ValueError, r"exact must be bool of shape \(2,\), got .*\(3,\)"),
    ({"exact": torch.ones(2)}, ValueError, "exact must be bool .*torch.float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=lambda x: str(x)[:60])
def test_bad_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    santa_decode(**tensors())
    with pytest.raises(error, match=message):
        santa_decode(**{**tensors(), **change})


@pytest.mark.parametrize("empty", ["batch", "length", "dim"])
def test_empty_dimensions_are_refused(empty: str) -> None:
    with pytest.raises(ValueError, match="no dimension empty"):
        santa_decode(**tensors(**{empty: 0}))


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("estimator", SAMPLED)
def test_gradients_are_refused(estimator: str, name: str) -> None:
    given = tensors()
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient, which draws do not have"):
        santa_decode(**given, estimator=estimator)
    with torch.no_grad():
        assert not santa_decode(**given, estimator=estimator).requires_grad
    assert santa_decode(**given, estimator="dense").requires_grad


def test_positional_options_and_unknown_ones_are_refused() -> None:
    with pytest.raises(TypeError):
        santa_decode(*tensors().values(), 128)  # type: ignore[misc]
    with pytest.raises(TypeError):
        santa_decode(**tensors(), sample=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("kernel", ["prop", "flash"])
def test_an_explicit_kernel_that_cannot_run_raises(kernel: str) -> None:
    # Values on the CPU, whatever the machine has.
    with pytest.raises(NotImplementedError, match=f"kernel='{kernel}' cannot run here: "):
        santa_decode(**tensors(), kernel=kernel)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_auto_and_reference_agree_on_a_cpu(estimator: str) -> None:
    given = tensors()
    auto = santa_decode(**given, estimator=estimator)
    assert torch.equal(auto, santa_decode(**given, estimator=estimator, kernel="reference"))


def test_defaults() -> None:
    given = tensors(length=300)
    plain = santa_decode(**given)
    spelt = santa_decode(
        **given,
        samples=128,
        estimator="systematic",
        scaling=8**-0.5,
        mask=None,
        seed=0,
        layer=0,
        position=torch.tensor([299, 299]),
        head_offset=0,
        softcap=None,
        sinks=None,
        kernel="auto",
    )
    assert torch.equal(plain, spelt)
    for change in (
        {"samples": 127},
        {"estimator": "stratified"},
        {"scaling": 1.0},
        {"mask": visible(1, 1, 1, 300).logical_and(torch.arange(300) > 0)},
        {"seed": 1},
        {"layer": 1},
        {"position": torch.tensor([300, 300])},
        {"head_offset": 6},
        {"softcap": 1.0},
        {"sinks": torch.zeros(6)},
    ):
        assert not torch.equal(santa_decode(**given, **change), plain), change


@pytest.mark.parametrize("shape", [(40,), (1, 40), (1, 1, 40), (1, 1, 1, 40), (2, 1, 1, 40), (1,)])
def test_masks_of_every_broadcastable_shape(shape: tuple[int, ...]) -> None:
    given = tensors()
    mask = torch.ones(shape, dtype=torch.bool)
    if shape[-1] == 40:
        mask[..., :11] = False
    wide = mask.expand(2, 1, 1, 40)
    for estimator in ESTIMATORS:
        out = santa_decode(**given, estimator=estimator, mask=mask)
        for same in (wide, wide.contiguous()):
            assert torch.equal(santa_decode(**given, estimator=estimator, mask=same), out)


def test_seed_per_row_equals_seed_per_call() -> None:
    given = tensors(length=300)
    seeds = [3, 2**40 + 1]
    together = santa_decode(**given, seed=torch.tensor(seeds))
    for row, seed in enumerate(seeds):
        assert torch.equal(santa_decode(**given, seed=seed)[row], together[row])


def test_torch_generator_is_not_touched() -> None:
    given = tensors()
    before = torch.get_rng_state()
    for estimator in ESTIMATORS:
        santa_decode(**given, estimator=estimator, mask=visible(2, 1, 1, 40))
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_are_not_written_to() -> None:
    given = {**tensors(length=300), "mask": torch.arange(300) > 10, "sinks": torch.zeros(6)}
    given |= {"position": torch.tensor([5, 6]), "seed": torch.tensor([1, 2])}
    copies = {name: tensor.clone() for name, tensor in given.items()}
    for estimator in ESTIMATORS:
        for softcap in (None, 2.0):
            santa_decode(**given, estimator=estimator, softcap=softcap)
    assert all(torch.equal(given[name], copies[name]) for name in given)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], torch.dtype]:
    """A valid call: random shapes, layouts, mask and options."""
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 8))
    length, dim, value_dim = (draw(st.integers(1, n)) for n in (700, 20, 20))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def cache(columns: int) -> torch.Tensor:
        shape = batch, kv_heads, length, columns
        layout = draw(st.sampled_from(["contiguous", "transposed", "head room"]))
        if layout == "transposed":
            wide = torch.randn(batch, length, kv_heads, columns, generator=source)
            return wide.to(dtype).transpose(1, 2)
        if layout == "head room":
            wide = torch.randn(*shape[:2], length + 30, columns, generator=source)
            return wide.to(dtype)[:, :, :length]
        return torch.randn(shape, generator=source).to(dtype)

    mask = None
    rows = draw(st.sampled_from([None, 1, batch]))
    if rows is not None:
        density = draw(st.sampled_from([0.02, 0.5, 1.0]))
        mask = torch.rand(rows, 1, 1, length, generator=source) < density
        if draw(st.booleans()):
            mask &= torch.arange(length) >= draw(st.integers(0, length - 1))
    call = {
        "query": torch.randn(batch, heads, 1, dim, generator=source).to(dtype),
        "key": cache(dim),
        "value": cache(value_dim),
        "mask": mask,
        "samples": draw(st.sampled_from([1, 2, 17, 128, 900])),
        "estimator": draw(st.sampled_from(ESTIMATORS)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "layer": draw(st.integers(0, 2**24 - 1)),
        "head_offset": draw(st.integers(0, 2**31 - 1 - heads)),
        "position": draw(
            st.none() | st.lists(st.integers(0, 2**40), min_size=batch, max_size=batch)
        ),
    }
    if call["position"] is not None:
        call["position"] = torch.tensor(call["position"], dtype=torch.int64)
    return call, dtype


@settings(derandomize=True, deadline=None, database=None, max_examples=150)
@given(calls())
def test_any_valid_call(case: tuple[dict[str, Any], torch.dtype]) -> None:
    call, dtype = case
    query, key, value, mask = (call[name] for name in ("query", "key", "value", "mask"))
    out = santa_decode(**call)
    assert out.shape == (*query.shape[:3], value.shape[3])
    assert out.dtype == dtype
    assert out.device == query.device
    assert out.isfinite().all()
    scaling = query.shape[-1] ** -0.5
    if call["estimator"] == "dense":
        if mask is None or mask.any(-1).all():
            exact = attention(query, key, value, scaling, mask)
            budget = attention_budget(query, key, value, scaling, mask)
            assert (out.double() - exact).abs().max() <= budget
        return
    assert torch.equal(santa_decode(**call), out)
    # An average of visible rows: inside their range, and zero where there is none.
    group = query.shape[1] // key.shape[1]
    rows = value.double().repeat_interleave(group, 1)
    shown = visible(1, 1, 1, key.shape[2]) if mask is None else mask
    shown = shown.transpose(-1, -2).expand(*rows.shape[:3], 1)
    low = rows.masked_fill(~shown, torch.inf).amin(2, keepdim=True)
    high = rows.masked_fill(~shown, -torch.inf).amax(2, keepdim=True)
    roundings = gamma(2 * call["samples"] + 2, working_dtype(dtype)) + 2 * unit_roundoff(dtype)
    slack = roundings * rows.abs().max()
    empty = ~shown.any(2, keepdim=True).expand_as(out)
    assert (out[empty] == 0).all()
    assert (empty | ((out >= low - slack) & (out <= high + slack))).all()


def test_dispatch_hands_everything_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any) -> Any:
        seen.update(given)
        return query

    monkeypatch.setattr(reference, "decode", spy)
    options = {
        "samples": 3,
        "estimator": "multinomial",
        "scaling": 0.5,
        "seed": 9,
        "layer": 4,
        "head_offset": 12,
        "softcap": 3.0,
    }
    sinks, position = torch.zeros(6), torch.tensor([1, 2])
    mask = visible(1, 1, 1, 40)
    santa_decode(**tensors(), **options, sinks=sinks, position=position, mask=mask)
    assert options.items() <= seen.items()
    assert torch.equal(seen["position"], position)
    assert seen["mask"].shape[1:] == (1, 1, 40)
    assert torch.equal(seen["sinks"], sinks)


@pytest.mark.parametrize("rows", [[False, True], [True, True], [False, False]])
def test_exact_rows_are_dense_and_the_others_draw_as_without_them(rows: list[bool]) -> None:
    call = tensors()
    drawn, dense = santa_decode(**call, samples=4), santa_decode(**call, estimator="dense")
    out = santa_decode(**call, samples=4, exact=torch.tensor(rows))
    for i, exact in enumerate(rows):
        assert torch.equal(out[i], (dense if exact else drawn)[i])
    assert not torch.equal(drawn, dense)


def test_one_thread_decodes_while_another_compiles() -> None:
    """From torch 2.13 on, all threads are told that something is compiled."""
    given: dict[str, Any] = {**tensors(), "samples": 8}
    expected = santa_decode(**given)
    compiling, decoded = threading.Event(), threading.Event()
    results: list[torch.Tensor] = []

    def backend(graph: Any, _: Any) -> Any:
        compiling.set()
        decoded.wait(60)
        return graph.forward

    def decode() -> None:
        compiling.wait(60)
        try:
            results.append(santa_decode(**given))
        finally:
            decoded.set()

    thread = threading.Thread(target=decode)
    thread.start()
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    thread.join()
    (result,) = results
    assert torch.equal(result, expected)
