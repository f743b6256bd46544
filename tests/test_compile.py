"""Compiled decoding: one graph without breaks, the draws of eager, and a new configuration heeded."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import tiny
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel, StaticCache

import santa_hf

STEPS = 32
PROMPT = 140
MODEL: Any = None  # of test_one_step_traced_for_two_models: only globals that changed are symbols
CACHE: Any = None


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.compiler.reset()


def decode(model: PreTrainedModel, step: object, steps: int = STEPS) -> torch.Tensor:
    """Greedy tokens (B, steps) of a left-padded batch on a static cache, decoding with `step`."""
    batch = tiny.left_padded(tiny.prompts(PROMPT, PROMPT - 37))
    mask = torch.zeros(2, PROMPT + steps, dtype=torch.int64)
    mask[:, :PROMPT] = batch["attention_mask"]
    positions = (mask[:, :PROMPT].cumsum(-1) - 1).clamp(min=0)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + steps)
    with torch.no_grad():
        out = model(
            batch["input_ids"],
            attention_mask=mask[:, :PROMPT],
            position_ids=positions,
            past_key_values=cache,
        )
        tokens = [out.logits[:, -1:].argmax(-1)]
        for i in range(steps - 1):
            mask[:, PROMPT + i] = 1
            out = step(
                tokens[-1],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
            )
            tokens.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, -1)


# The experts of gpt_oss have no float64.
@pytest.mark.parametrize(
    ("family", "budget"),
    [(family, {"samples": 8}) for family in tiny.FAMILIES if family != "gpt_oss"]
    + [("llama", {"samples": 8, "min_context": 120})],
)
def test_a_full_graph_gives_the_tokens_of_eager(family: str, budget: dict[str, int]) -> None:
    model = tiny.use(tiny.build(family, torch.float64), "santa", **budget)
    eager = decode(model, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(decode(model, compiled), eager)
    assert santa_hf.stats(model).total.sampled > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++")
def test_inductor_lowers_the_operator() -> None:
    """Inductor passes the arguments of an operator on by name, among names of its own."""
    model = tiny.use(tiny.build("llama", torch.float64), "santa", samples=8)
    eager = decode(model, model, 4)
    assert torch.equal(decode(model, torch.compile(model, fullgraph=True), 4), eager)


@pytest.mark.parametrize(("family", "graphs"), [("llama", 1), ("gemma3", 2)])
def test_generate_compiles_by_itself(family: str, graphs: int) -> None:
    """As it does on a GPU: the tokens of eager, and no more graphs than without santa (a sliding layer
    of a static cache counts in Python, which Transformers itself traces twice)."""
    model = tiny.use(tiny.build(family, torch.float64), "santa", samples=8, min_context=120)
    batch = tiny.left_padded(tiny.prompts(PROMPT, PROMPT - 37))
    settings = {"max_new_tokens": STEPS, "do_sample": False, "cache_implementation": "static"}
    eager = model.generate(**batch, **settings)
    compile_config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    counters.clear()
    compiled = model.generate(**batch, **settings, compile_config=compile_config)
    assert torch.equal(compiled, eager)
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_new_configuration_reaches_a_compiled_model() -> None:
    model = tiny.use(tiny.build("llama", torch.float64), "santa", samples=8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    seen = []
    for budget in (
        {"samples": 8},
        {"samples": 2},
        {"samples": 8, "layers": {1: {"samples": 3}}},
        {"samples": 8, "seed": 1},
    ):
        santa_hf.configure(model, budget)
        tokens = decode(model, compiled, 16)
        assert torch.equal(tokens, decode(model, model, 16)), budget
        seen.append(tokens)
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


def test_a_new_seed_compiles_nothing_again() -> None:
    """It is an input of the graph; Dynamo would give up at the ninth constant."""
    model = tiny.use(tiny.build("llama", torch.float64), "santa", samples=4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    santa_hf.configure(model, {"samples": 4, "layers": {1: {"samples": 3}}})
    decode(model, compiled, 12)
    counters.clear()
    seen = []
    for seed in (0, 1, 2, 3, 4, 5, 6, 2**40, 2**63 - 1, 9):
        santa_hf.configure(model, {"samples": 4, "seed": seed, "layers": {1: {"samples": 3}}})
        seen.append(decode(model, compiled, 12))
        assert torch.equal(seen[-1], decode(model, model, 12))
    assert counters["stats"]["unique_graphs"] == 0
    assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) > 8
    # Set by hand it is a constant of the graph, and heeded.
    for change in ({"seed": 3}, {"seed": 4}):
        model.config.santa |= change
        assert torch.equal(decode(model, compiled, 12), decode(model, model, 12))
    model.config.santa = {"samples": 4, "seed": 5}
    assert torch.equal(decode(model, compiled, 12), decode(model, model, 12))


@pytest.mark.parametrize(("family", "graphs"), [("llama", 1), ("gemma3", 2)])
def test_200_steps_compile_nothing_again(family: str, graphs: int) -> None:
    """Nor do seeds between calls of generate, after the first."""
    model = tiny.use(tiny.build(family), "santa", samples=4)
    batch = tiny.left_padded(tiny.prompts(60, 45))  # longer than a window
    compile_config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    counters.clear()
    for seed, steps in ((0, 200), (1, 20), (2, 20)):
        santa_hf.configure(model, {"samples": 4, "seed": seed})
        model.generate(
            **batch, max_new_tokens=steps, do_sample=False, cache_implementation="static",
            compile_config=compile_config,
        )  # fmt: skip
        assert counters["stats"]["unique_graphs"] == graphs


def test_one_step_traced_for_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differed is traced as a symbol the second time, and the length of a mask is still that of the
    keys, although dynamo writes the two differently."""
    for family in ("llama", "gemma3"):
        model = tiny.use(tiny.shared(family), "santa", samples=8)
        cache = StaticCache(config=model.config, max_cache_len=64)
        prompt = tiny.prompts(tiny.WINDOW)[0]
        monkeypatch.setitem(globals(), "MODEL", model)
        monkeypatch.setitem(globals(), "CACHE", cache)
        step = torch.compile(
            lambda token: MODEL(token, past_key_values=CACHE).logits,
            fullgraph=True,
            backend="eager",
        )
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            assert step(prompt[:, :1]).isfinite().all()


def test_a_fallback_warns_when_its_graph_is_traced() -> None:
    model = tiny.use(tiny.build("llama"), "santa").train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="training mode"):
        decode(model, compiled, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("estimator", ["systematic", "dense"])
def test_the_operator_keeps_its_schema(estimator: str, device: str) -> None:
    from santa_hf.ops import decode as operator

    query = torch.randn(2, 6, 1, 16)
    key, value = torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 8)
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., :7] = False
    settings = {
        "seed": 1,
        "samples": 8,
        "estimator": estimator,
        "scaling": 0.25,
        "softcap": None,
        "layer": 2,
        "head_offset": 0,
        "implementation": "auto",
    }
    rows = torch.tensor([3, 4])
    exact = torch.tensor([True, False])
    optionals: list[tuple[torch.Tensor | None, ...]] = [
        (query, key, value, *(None,) * 7),
        (query, key, value, mask, rows, rows, torch.randn(6), exact, None, None),
        (query, key[..., :10].contiguous(), value, *(None,) * 5, torch.randn(2, 3, 40, 6), None),
        (query, key, value, *(None,) * 6, torch.randint(40, (2, 33))),
    ]
    for tensors in optionals:
        moved = [None if x is None else x.to(device) for x in tensors]
        torch.library.opcheck(operator, moved, settings)
