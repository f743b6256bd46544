"""What is kept with a mask: once a step, never longer than it holds."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import tiny
import torch

from santa_hf import functional
from santa_hf.integration import attention, masks
from santa_hf.shared import once, share


def row(*visible: bool) -> torch.Tensor:
    return torch.tensor(visible)[None, None, None].expand(2, 1, 1, -1)


def test_what_a_mask_says_is_derived_once() -> None:
    mask, calls = share(row(True, False, True)), []

    def derive() -> int:
        calls.append(0)
        return int(mask.sum())

    assert [once(mask, "sum", derive) for _ in range(3)] == [4, 4, 4]
    assert len(calls) == 1
    assert once(mask, ("sum", 2), derive) == 4  # something else
    assert len(calls) == 2


def test_a_mask_that_was_written_to_is_asked_again() -> None:
    """Also through what it is a view of, as generate's attention mask."""
    padding = torch.ones(1, 5, dtype=torch.bool)
    mask = share(padding[:, None, None].expand(2, 1, 1, 5))
    assert once(mask, "sum", lambda: int(mask.sum())) == 10
    padding[0, :2] = False
    assert once(mask, "sum", lambda: int(mask.sum())) == 6


def test_a_write_in_inference_mode_does_not_go_unnoticed() -> None:
    with torch.inference_mode():
        mask = share(torch.ones(2, 1, 1, 5, dtype=torch.bool))
        assert once(mask, "sum", lambda: int(mask.sum())) == 10
        mask[..., :2] = False
        assert once(mask, "sum", lambda: int(mask.sum())) == 6


def test_each_stream_derives_for_itself(monkeypatch: Any) -> None:
    """What one stream has launched, another would not wait for."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    stream = [0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: stream[0], raising=False
    )
    mask, calls = share(row(True, False).as_subclass(OnGpu)), []
    for stream[0] in (0, 7, 0, 7):
        once(mask, "sum", lambda: calls.append(stream[0]))
    assert calls == [0, 7]


def test_a_mask_of_somebody_else_is_asked_every_time() -> None:
    mask, calls = row(True, True), []
    for _ in range(2):
        once(mask, "sum", lambda: calls.append(0))
    assert len(calls) == 2


@pytest.mark.parametrize(("mode", "each"), [(torch.no_grad, 1), (torch.inference_mode, 3)])
def test_layers_of_a_step_share_and_steps_do_not(mode: Any, each: int, monkeypatch: Any) -> None:
    """But in inference mode, where nobody could tell whether the mask was written to."""
    model = tiny.use(tiny.build("llama"), "santa", samples=4, min_context=3)
    shared: list[Any] = []
    derived: list[Any] = []
    make, derive = masks.share, attention.once

    def recorded(mask: torch.Tensor) -> torch.Tensor:
        shared.append(weakref.ref(mask))
        return make(mask)

    def counted(mask: torch.Tensor, what: Any, how: Any) -> Any:
        return derive(mask, what, lambda: derived.append(what) or how())

    monkeypatch.setattr(masks, "share", recorded)
    monkeypatch.setattr(attention, "once", counted)
    tokens = torch.randint(5, 60, (2, 9))
    padding = torch.ones_like(tokens)
    padding[0, :4] = 0
    with mode():
        model.generate(
            tokens, attention_mask=padding, max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
    assert len(shared) == 5
    assert len(derived) == 5 * each
    gc.collect()
    assert not any(mask() is not None for mask in shared)  # nothing keeps them


def test_a_compiled_step_leaves_nothing_with_its_mask(monkeypatch: Any) -> None:
    """It would lie in the memory of a CUDA graph. Here layers derive in the operator, from a tensor."""
    seen: list[torch.Tensor] = []
    run = functional._run

    def recorded(*tensors: Any, mask: torch.Tensor, **others: Any) -> torch.Tensor:
        once(mask, "sum", lambda: mask.sum())
        seen.append(mask)
        return run(*tensors, mask=mask, **others)

    monkeypatch.setattr(functional, "_run", recorded)
    query, key = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 5, 16)
    mask = share(torch.ones(2, 1, 1, 5, dtype=torch.bool))
    position = torch.full((2,), 4)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(mask: torch.Tensor) -> torch.Tensor:
        return functional.decode_valid(
            query, key, key, samples=3, mask=mask, position=position, scaling=0.25
        )

    with torch.no_grad():
        expected = functional.decode_valid(
            query, key, key, samples=3, mask=mask, position=position, scaling=0.25
        )
        assert vars(mask)["_santa_derived"]
        vars(mask)["_santa_derived"].clear()
        assert torch.equal(step(mask), expected)
    assert len(seen) == 2
    assert not vars(mask)["_santa_derived"]
