"""Multi-head latent attention: steps over latents equal the expanded ones, and are sampled alike."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import tiny
import torch
import transformers
from tolerance import assert_mean
from torch.nn.functional import linear
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
)

import santa_hf
from santa_hf import reference
from santa_hf.integration import mla
from santa_hf.integration.attention import santa_attention
from santa_hf.integration.paged import PAGED

NEW_TOKENS = 6
LAYERS = 2
HEADS = 4
RANK, ROTARY, NOPE, VALUE = 20, 8, 16, 12
ALONE = {"input_ids": tiny.prompts(150)[0]}
PADDED = tiny.left_padded(tiny.prompts(150, 90))
REPEATING = {"input_ids": torch.cat([ALONE["input_ids"], ALONE["input_ids"][:, 100:130]], 1)}

COMMON: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROTARY,
    "v_head_dim": VALUE,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
# One dense and one expert layer, where there are experts.
MIXED = {**EXPERTS, "mlp_layer_types": ["dense", "sparse"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "DeepseekV2": {**EXPERTS, "first_k_dense_replace": 1},
    "DeepseekV3": {**EXPERTS, "first_k_dense_replace": 1},
    "Youtu": {"embedding_initializer_range": 0.2},
    "MiniCPM3": {},
    "Glm4MoeLite": MIXED,
    "AXK1": MIXED,
    "LongcatFlash": {
        "num_layers": 1,  # of two attentions each
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "head_dim": ROTARY,
    },
    "KimiLinear": {
        "mlp_layer_types": ["dense", "dense"],
        "layer_types": ["full_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": HEADS,
        "q_lora_rank": None,
        "num_local_experts": 4,
        "moe_intermediate_size": 32,
    },
    "Mistral4": {**EXPERTS, "first_k_dense_replace": 1},
}
MAIN = ("DeepseekV2", "DeepseekV3")
SPARSE = {
    **MIXED,
    "first_k_dense_replace": 1,
    "index_topk": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "head_dim": ROTARY,
}


def build(
    family: str, dtype: torch.dtype = torch.float32, attention: str = "santa", **changes: Any
) -> PreTrainedModel:
    """Value heads of 12 beside query heads of 16 + 8."""
    extra = FAMILIES.get(family, SPARSE)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **extra, **changes})
    torch.manual_seed(1)
    if family == "Mistral4":  # which no AutoModel makes without its vision tower
        from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

        model = Mistral4ForCausalLM._from_config(config, attn_implementation=attention)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def generate(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor] = PADDED, **kwargs: Any
) -> torch.Tensor:
    """Raw logits of each new token: (B, steps, vocabulary)."""
    out = model.generate(
        **inputs,
        **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs},
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1)


@contextmanager
def absorbed_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of keys of the decode steps that ran over latents."""
    lengths: list[int] = []
    decode = santa_hf.integration.attention.santa_decode

    def spy(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs["rotary_key"] is not None:
            assert key.shape[1] == 1
            lengths.append(key.shape[2])
        return decode(query, key, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(santa_hf.integration.attention, "santa_decode", spy)
        yield lengths


CASES: dict[str, dict[str, Any]] = {
    "alone": {"inputs": ALONE},
    "padded": {},
    "static": {"inputs": ALONE, "cache_implementation": "static"},
    "static padded": {"cache_implementation": "static"},
    "prompt lookup": {"inputs": REPEATING, "prompt_lookup_num_tokens": 4},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family in FAMILIES for case in CASES if family in MAIN or case == "padded"],
)
def test_dense_equals_sdpa(family: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    expected = generate(tiny.use(model, "sdpa"), **CASES[case])
    tiny.use(model, "santa", estimator="dense")
    with absorbed_calls(monkeypatch) as calls:
        dense = generate(model, **CASES[case])
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-5)
    if case == "prompt lookup":  # which verifies several tokens at some steps
        assert 0 < len(calls) < LAYERS * (NEW_TOKENS - 1)
    else:
        assert len(calls) == LAYERS * (NEW_TOKENS - 1)
    assert not santa_hf.stats(model).total.fallbacks


@pytest.mark.parametrize(
    ("family", "cache"),
    [(family, "dynamic") for family in FAMILIES] + [(family, "static") for family in MAIN],
)
def test_sampling_is_counted_and_its_error_vanishes(family: str, cache: str) -> None:
    """Teacher forcing is not needed: the tokens of the first step come from an exact prefill."""
    model = build(family)
    keywords = {"cache_implementation": cache, "max_new_tokens": 2}
    exact = generate(tiny.use(model, "sdpa"), **keywords)
    error = {}
    for samples in (16, 4096):
        tiny.use(model, "santa", samples=samples, strict=True)
        santa_hf.reset_stats(model)
        with santa_hf.count_value_rows():
            sampled = generate(model, **keywords)
        total = santa_hf.stats(model).total
        assert (total.sampled, total.multi_token) == (LAYERS, LAYERS)
        assert total.samples == samples * HEADS * 2 * LAYERS
        # One latent serves all heads, so it counts once: 151 and 91 visible, and few of them read.
        assert total.rows_visible == LAYERS * (151 + 91)
        assert 0 < total.rows_read <= min(total.rows_visible, samples * HEADS * 2 * LAYERS)
        error[samples] = float((sampled - exact)[:, 1].square().mean().sqrt())
    assert error[16] > 1e-2
    assert error[4096] < error[16] / 20


def latent_step(rows: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query (rows, 3, 1, 28), latents (rows, 1, 300, 20) and rotary keys, every row alike."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((1, 3, 1, RANK + ROTARY), (1, 1, 300, RANK), (1, 1, 300, ROTARY))
    query, latent, rotary_key = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return tuple(x.expand(rows, -1, -1, -1) for x in (query, latent, rotary_key))  # type: ignore[return-value]


@pytest.mark.parametrize("estimator", ["systematic", "stratified", "multinomial"])
def test_unbiased_over_seeds(estimator: str) -> None:
    rows, samples, scaling = 1500, 8, 0.5
    query, latent, rotary_key = latent_step(rows)
    out = santa_hf.santa_decode(
        query,
        latent,
        latent,
        rotary_key=rotary_key,
        scaling=scaling,
        samples=samples,
        estimator=estimator,
        seed=torch.arange(rows) * 7919,
        position=torch.zeros(rows, dtype=torch.int64),
    )
    key = torch.cat((latent, rotary_key), -1)[0, 0]
    p = (query[0, :, 0] @ key.T * scaling).softmax(-1)
    mean = p @ latent[0, 0]
    variance = (p @ latent[0, 0].square() - mean.square()) / samples
    assert_mean(out[:, :, 0], mean, variance, 1e-12)


@pytest.mark.parametrize("mask", [False, True])
def test_draws_are_those_of_keys_in_one_part(mask: bool) -> None:
    query, latent, rotary_key = latent_step(2)
    visible = None
    if mask:
        visible = torch.ones(2, 1, 1, 300, dtype=torch.bool)
        visible[0, ..., :170] = False
        visible[1, ..., 250:] = False
    keywords: dict[str, Any] = {
        "samples": 40, "estimator": "systematic", "scaling": 0.5, "mask": visible, "seed": 3,
        "layer": 1, "position": None,
    }  # fmt: skip
    draws = reference.draw(query, latent, rotary_key=rotary_key, **keywords)
    whole = reference.draw(query, torch.cat((latent, rotary_key), -1), **keywords)
    assert torch.equal(draws.index, whole.index)


def greedy(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=32, do_sample=False, **kwargs)[:, length:]


@pytest.mark.parametrize("family", MAIN)
def test_tokens_are_the_same_alone_padded_and_with_any_cache(family: str) -> None:
    """In float64, where experts do not run: every layer is dense."""
    dense = {"first_k_dense_replace": LAYERS}
    model = tiny.use(build(family, torch.float64, **dense), "santa", samples=8, strict=True)
    padded = greedy(model, PADDED)
    for i, length in enumerate((150, 90)):
        row = {"input_ids": PADDED["input_ids"][i : i + 1, 150 - length :]}
        assert torch.equal(greedy(model, row)[0], padded[i])
    assert torch.equal(greedy(model, PADDED, cache_implementation="static"), padded)
    assert not torch.equal(greedy(tiny.use(model, "santa", samples=8, seed=1), PADDED), padded)
    assert not torch.equal(greedy(tiny.use(model, "santa", estimator="dense"), PADDED), padded)


def unadopt() -> None:
    """As in a process that has not loaded a model with latents."""
    for layer, original in mla._expansions.items():
        if original is not None:
            layer.expand_kv = original  # type: ignore[attr-defined]
    mla._expansions.clear()


@pytest.mark.parametrize(
    ("family", "estimator", "prefill"),
    [
        ("DeepseekV3", "systematic", "eager"),
        ("DeepseekV2", "systematic", "eager"),
        ("DeepseekV3", "dense", "compiled"),
        ("DeepseekV2", "dense", "compiled"),
    ],
)
def test_a_full_graph_computes_what_eager_computes(
    family: str, estimator: str, prefill: str
) -> None:
    """Over latents, also where no call before it was eager; the dense one gives SDPA's logits."""
    torch.compiler.reset()
    unadopt()
    model = build(family, torch.float64, first_k_dense_replace=LAYERS)
    tiny.use(model, "santa", samples=8, estimator=estimator)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def run(step: Callable[..., Any], prefill: Callable[..., Any]) -> torch.Tensor:
        mask = torch.zeros(2, 170, dtype=torch.int64)
        mask[:, :150] = PADDED["attention_mask"]
        cache = StaticCache(config=model.config, max_cache_len=170)
        with torch.no_grad():
            logits = [prefill(**PADDED, past_key_values=cache).logits[:, -1]]
            for i in range(16):
                mask[:, 150 + i] = 1
                position = mask.sum(-1, keepdim=True) - 1
                token = logits[-1].argmax(-1, keepdim=True)
                out = step(token, attention_mask=mask, position_ids=position, past_key_values=cache)
                logits.append(out.logits[:, -1])
        return torch.stack(logits)

    out = run(compiled, compiled if prefill == "compiled" else model)
    steps = [n for graph in graphs for n in graph.graph.nodes if "santa_hf.decode" in str(n.target)]
    assert len(steps) == LAYERS
    for step in steps:
        rotary_key = step.args[8]
        assert rotary_key is not None
        assert rotary_key.meta["example_value"].shape == (2, 1, 170, ROTARY)
    if estimator == "dense":
        expected = run(tiny.use(model, "sdpa"), model)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(out.argmax(-1), run(model, model).argmax(-1))


def test_a_model_is_adopted_when_it_is_switched_to_santa() -> None:
    unadopt()
    model = build("DeepseekV3", attention="sdpa")
    layer = model.model.layers[0].self_attn
    assert not mla.caches_latents(layer)
    model.set_attn_implementation("santa")
    assert mla.caches_latents(layer)


def reload(model: PreTrainedModel) -> None:
    model.load_state_dict({name: -w for name, w in model.state_dict().items()})


def merge(model: PreTrainedModel) -> None:
    """As adapters are merged: in place, past the version counter."""
    for layer in model.model.layers:
        weight = layer.self_attn.kv_b_proj.weight
        weight.data += 0.3 * torch.randn_like(weight.data)


def replace(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.weight = torch.nn.Parameter(
            0.3 * torch.randn_like(layer.self_attn.kv_b_proj.weight)
        )


def widen(model: PreTrainedModel) -> None:
    model.double()


@pytest.mark.parametrize("change", [reload, merge, replace, widen])
def test_a_changed_weight_is_used_at_once(change: Callable[[PreTrainedModel], None]) -> None:
    model = build("DeepseekV3", first_k_dense_replace=LAYERS)
    before = generate(tiny.use(model, "santa", estimator="dense"))
    with torch.no_grad():
        change(model)
    after = generate(model)
    torch.testing.assert_close(after, generate(tiny.use(model, "sdpa")), rtol=1e-5, atol=1e-5)
    assert change is widen or (after - before).abs().max() > 1e-2


class Adapter(torch.nn.Linear):
    """A linear layer that adds something to its product, as LoRA's or a quantised one does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(x)


def wrap(layer: torch.nn.Module) -> None:
    layer.kv_b_proj.__class__ = Adapter


def hook(layer: torch.nn.Module) -> None:
    layer.kv_b_proj.register_forward_hook(lambda module, args, out: 1.5 * out)


def offload(layer: torch.nn.Module) -> None:
    """As accelerate offloads: the weight is on meta, and a new forward brings it along."""
    weight = layer.kv_b_proj.weight.data
    layer.kv_b_proj.weight = torch.nn.Parameter(weight.to("meta"))
    layer.kv_b_proj.forward = lambda x: linear(x, weight)


def hook_inputs(layer: torch.nn.Module) -> None:
    layer.kv_b_proj.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


def add_bias(layer: torch.nn.Module) -> None:
    layer.kv_b_proj.bias = torch.nn.Parameter(torch.randn(layer.kv_b_proj.out_features))


def offload_by_accelerate(layer: torch.nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(layer, execution_device="cpu")
    assert layer.kv_b_proj.weight.is_meta


def expand_otherwise(layer: torch.nn.Module) -> None:
    expand = partial(mla.expand, layer)
    layer.expand_kv = lambda latent, rotary_key: tuple(1.1 * x for x in expand(latent, rotary_key))


@pytest.mark.parametrize("santa", [{"samples": 4}, {"estimator": "dense"}], ids=str)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wrap, "not a plain linear layer"),
        (add_bias, "not a plain linear layer"),
        (hook, "has hooks"),
        (hook_inputs, "has hooks"),
        (offload, "has hooks"),
        (offload_by_accelerate, "has hooks"),
        (expand_otherwise, "expanded beforehand"),
    ],
)
def test_what_cannot_be_absorbed_is_expanded(
    change: Callable[[torch.nn.Module], None], reason: str, santa: dict[str, Any]
) -> None:
    model = build("DeepseekV3")
    for layer in model.model.layers:
        change(layer.self_attn)
    expected = generate(tiny.use(model, "sdpa"))
    tiny.use(model, "santa", **santa)
    with pytest.warns(UserWarning, match=reason) as caught:
        out = generate(model)
    assert len([w for w in caught if "santa_hf" in str(w.message)]) == 1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    total = santa_hf.stats(model).total
    assert list(total.fallbacks.values()) == [LAYERS * (NEW_TOKENS - 1)]
    assert reason in next(iter(total.fallbacks))
    assert total.sampled == total.dense == 0
    tiny.use(model, "santa", strict=True, **santa)
    wanted = "computed over its latents" if "estimator" in santa else "sampled"
    with pytest.raises(NotImplementedError, match=f"cannot be {wanted}.*{reason}"):
        generate(model)


class Marked(torch.Tensor):
    """A tensor that may hold its values in another form."""


def subclass(layer: torch.nn.Module) -> None:
    weight = layer.kv_b_proj.weight.data.as_subclass(Marked)
    layer.kv_b_proj.weight = torch.nn.Parameter(weight, requires_grad=False)


def move(layer: torch.nn.Module) -> None:
    layer.kv_b_proj.to("meta")


def quantise(layer: torch.nn.Module) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    linear = layer.kv_b_proj
    layer.kv_b_proj = fp8.FP8Linear(linear.in_features, linear.out_features, block_size=(128, 128))


def train(layer: torch.nn.Module) -> None:
    layer.train()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (subclass, "not a plain one of the layer's heads"),
        (move, "another dtype or device"),
        (quantise, "not a plain linear layer"),
        (train, "training mode"),
    ],
)
def test_a_layer_that_cannot_absorb_says_why(
    change: Callable[[torch.nn.Module], None], reason: str
) -> None:
    layer = build("DeepseekV3").model.layers[0].self_attn
    change(layer)
    query, latent = torch.randn(1, HEADS, 1, NOPE + ROTARY), torch.randn(1, 1, 9, RANK)
    rotary_key, position = torch.randn(1, 1, 9, ROTARY), torch.tensor([[8]])
    layer.config.santa = {"strict": True}
    with torch.no_grad(), pytest.raises(NotImplementedError, match=reason):
        santa_attention(layer, query, latent, rotary_key, None, position_ids=position)


def test_hooks_on_a_sharded_weight_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism replaces the forward of a linear layer; whatever else is there is not its."""
    layer = build("DeepseekV3").model.layers[0].self_attn
    linear, weight = layer.kv_b_proj, layer.kv_b_proj.weight.detach()
    monkeypatch.setattr(mla, "_local_weight", lambda linear: weight)  # as of a DTensor
    query, latent = torch.randn(1, HEADS, 1, NOPE + ROTARY), torch.randn(1, 1, 9, RANK)
    parallel = import_module("transformers.distributed.tensor_parallel")
    parallel.ColwiseParallel().install_forward(linear, None)
    with torch.no_grad():
        assert mla.why_not_absorbed(layer, query, latent) is None
        handle = linear.register_forward_hook(lambda module, args, out: 1.5 * out)
        assert "hooks" in str(mla.why_not_absorbed(layer, query, latent))
        handle.remove()
        linear.forward = functools.wraps(linear.forward)(lambda x: x)
        assert "hooks" in str(mla.why_not_absorbed(layer, query, latent))


@pytest.mark.filterwarnings("ignore:santa_hf")
@pytest.mark.parametrize("family", MAIN)
def test_autocast_decodes_as_with_sdpa(family: str) -> None:
    """V2's norm leaves latents in float32 beside a query in bfloat16; V3's rotation widens the query."""
    model = build(family, first_k_dense_replace=LAYERS)
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(tiny.use(model, "sdpa"), max_new_tokens=2)
        out = generate(tiny.use(model, "santa", estimator="dense"), max_new_tokens=2)
    assert (out - expected).square().mean().sqrt() < 0.02 * expected.std()
    fallbacks = santa_hf.stats(model).total.fallbacks
    assert [*fallbacks.values()] == ([LAYERS] if family == "DeepseekV2" else [])
    assert all("autocast" in reason for reason in fallbacks)


@pytest.mark.parametrize("value", [VALUE, ROTARY])
def test_latents_as_wide_as_the_query(value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart by their rotary keys; where these too are as wide as a head's, they are expanded."""
    model = build("DeepseekV3", kv_lora_rank=NOPE + ROTARY, v_head_dim=value)
    expected = generate(tiny.use(model, "sdpa"))
    tiny.use(model, "santa", estimator="dense")
    with absorbed_calls(monkeypatch) as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(generate(model), expected, rtol=1e-5, atol=1e-5)
    steps = LAYERS * (NEW_TOKENS - 1)
    fallbacks = santa_hf.stats(model).total.fallbacks
    assert len(calls) == (steps if value == VALUE else 0)
    assert sum(fallbacks.values()) == (0 if value == VALUE else steps)


@pytest.mark.parametrize("family", MAIN)
def test_the_output_of_a_layer_is_unbiased(family: str) -> None:
    """With its own absorption and projection, over seeds, against the expanded heads."""
    layer = build(family, torch.float64).model.layers[0].self_attn
    query = torch.randn(2, HEADS, 1, NOPE + ROTARY, dtype=torch.float64)
    latent = torch.randn(2, 1, 90, RANK, dtype=torch.float64)
    rotary_key = torch.randn(2, 1, 90, ROTARY, dtype=torch.float64)
    mask = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    mask[1, ..., :40] = False
    attend = partial(
        santa_attention, layer, query, latent, rotary_key, mask, scaling=layer.scaling,
        position_ids=torch.tensor([[89], [49]]),
    )  # fmt: skip
    with torch.no_grad():
        key, value = mla.expand(layer, latent, rotary_key)
        weight = (query @ key.mT * layer.scaling).masked_fill(~mask, -torch.inf).softmax(-1)
        expected = (weight @ value).transpose(1, 2)
        torch.testing.assert_close(attend(santa={"estimator": "dense"})[0], expected)
        seeds = 500
        out = torch.stack([attend(santa={"samples": 4, "seed": s})[0] for s in range(seeds)])
    error = out.std(0) / seeds**0.5
    assert (error > 0).all()
    assert ((out.mean(0) - expected).abs() < 5 * error).all()


def test_rows_below_min_context_are_exact_over_latents() -> None:
    """The second of 150 and 90 tokens, in a batch where the first is sampled."""
    model = build("DeepseekV3", first_k_dense_replace=LAYERS)
    expected = generate(tiny.use(model, "sdpa"))
    out = generate(tiny.use(model, "santa", samples=4, min_context=120, strict=True))
    torch.testing.assert_close(out[1], expected[1], rtol=1e-5, atol=1e-5)
    assert (out[0, 1:] - expected[0, 1:]).abs().max() > 1e-2
    assert santa_hf.stats(model).total.samples == LAYERS * (NEW_TOKENS - 1) * HEADS * 4


@pytest.mark.skipif(
    not hasattr(transformers, "Dots3NoteTextConfig"), reason="Transformers has no such model"
)
@pytest.mark.filterwarnings("ignore:santa_hf")
def test_a_layer_with_heads_of_its_own_is_no_shard() -> None:
    """Of Dots3Note, sliding layers have 2 heads here, the others 4 and keys that they choose."""
    sliding = {
        "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 24,
        "kv_lora_rank": RANK, "head_dim": NOPE + ROTARY, "qk_nope_head_dim": NOPE,
        "v_head_dim": VALUE,
    }  # fmt: skip
    model = build(
        "Dots3NoteText",
        mlp_layer_types=["dense", "dense"],
        layer_types=["indexed_attention", "sliding_attention"],
        head_dim=NOPE + ROTARY,
        sliding_window=40,
        shared_experts_intermediate_size=32,
        **{f"swa_{name}": value for name, value in sliding.items()},
    )
    expected = generate(tiny.use(model, "sdpa"))
    out = generate(tiny.use(model, "santa", estimator="dense"))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    santa_hf.reset_stats(model)
    generate(tiny.use(model, "santa", samples=8))
    chosen, sampled = santa_hf.stats(model).layers.values()
    steps = NEW_TOKENS - 1
    assert [*chosen.fallbacks.values()] == [steps]
    assert not sampled.fallbacks
    assert sampled.samples == steps * 2 * 2 * 8


@pytest.mark.parametrize("santa", [{"samples": 4}, {"estimator": "dense"}], ids=str)
@pytest.mark.parametrize("family", MAIN)
def test_continuous_batching_is_exact(family: str, santa: dict[str, Any]) -> None:
    """Its cache takes heads of one size, and Transformers expands latents before they are cached."""
    model = build(family, torch.float64, first_k_dense_replace=LAYERS, v_head_dim=NOPE + ROTARY)
    model.config.head_dim = NOPE + ROTARY  # the cache's
    prompts = [row[0].tolist() for row in tiny.prompts(150, 37)]

    def tokens() -> list[list[int]]:
        out = model.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64),
        )
        assert all(output.error is None for output in out.values())
        return [out[name].generated_tokens for name in sorted(out)]

    expected = []
    for prompt in prompts:
        row = {"input_ids": torch.tensor([prompt])}
        expected.append(generate(tiny.use(model, "sdpa"), row).argmax(-1)[0].tolist())
    tiny.use(model, "santa", **santa)
    with pytest.warns(UserWarning, match="continuous batching") as caught:
        assert tokens() == expected
    assert len([w for w in caught if "santa_hf" in str(w.message)]) == 1
    total = santa_hf.stats(model).total
    assert list(total.fallbacks.values()) == [LAYERS * (NEW_TOKENS - 1)]
    assert total.sampled == total.dense == 0


@pytest.mark.parametrize("attention", ["sdpa", "santa"])
def test_continuous_batching_of_stock_sizes_fails_as_in_transformers(attention: str) -> None:
    """Values of 12 beside keys of 24: the paged cache has one head size."""
    model = tiny.use(build("DeepseekV3", first_k_dense_replace=LAYERS), attention)
    out = model.generate_batch(
        [ALONE["input_ids"][0].tolist()],
        generation_config=GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64),
    )
    assert all("slice shape" in output.error for output in out.values())


@pytest.mark.filterwarnings("ignore:santa_hf")
def test_an_adapter_is_expanded_until_it_is_merged() -> None:
    peft = pytest.importorskip("peft")
    model = build("DeepseekV3", first_k_dense_replace=LAYERS)
    before = generate(tiny.use(model, "santa", estimator="dense"))
    lora = peft.LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    outputs = {}
    for attention in ("sdpa", "santa"):
        outputs[attention] = generate(tiny.use(model, attention))
    torch.testing.assert_close(outputs["santa"], outputs["sdpa"], rtol=1e-5, atol=1e-5)
    assert sum(santa_hf.stats(model).total.fallbacks.values()) == LAYERS * (NEW_TOKENS - 1)
    wrapped.merge_and_unload()
    merged = generate(tiny.use(model, "santa", estimator="dense", strict=True))
    torch.testing.assert_close(merged, outputs["sdpa"], rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 1e-2


def test_a_weight_of_another_dtype_is_not_absorbed() -> None:
    layer = build("DeepseekV3").model.layers[0].self_attn
    query, latent = torch.randn(1, HEADS, 1, NOPE + ROTARY), torch.randn(1, 1, 9, RANK)
    with torch.no_grad():
        assert mla.why_not_absorbed(layer, query, latent) is None
        assert "dtype" in str(mla.why_not_absorbed(layer, query.double(), latent))
        assert "heads" in str(mla.why_not_absorbed(layer, query[:, :2], latent))
    assert "gradient" in str(mla.why_not_absorbed(layer, query, latent))


def test_gradients_are_those_of_sdpa() -> None:
    gradients = []
    for attention in ("sdpa", "santa"):
        model = tiny.use(build("DeepseekV3"), attention)
        cache = transformers.DynamicCache(config=model.config)
        model(ALONE["input_ids"][:, :40], past_key_values=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model(ALONE["input_ids"][:, 40:41], past_key_values=cache)
        out.logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for sdpa, santa in zip(*gradients, strict=True):
        torch.testing.assert_close(santa, sdpa, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:santa_hf")
@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("DeepseekV32", "dynamic"), ("DeepseekV32", "static"),
        ("GlmMoeDsa", "dynamic"), ("AXK2", "dynamic"), ("HYV4", "dynamic"),
    ],
)  # fmt: skip
def test_sparse_attention_honours_its_choice_of_keys(family: str, cache: str) -> None:
    """DeepSeek V3.2 attends to 16 of about 150 keys, which it leaves to the attention function."""
    model = build(family)
    # Transformers has no SDPA for HYV4.
    tiny.use(model, "eager" if family == "HYV4" else "sdpa")
    expected = generate(model, cache_implementation=cache)
    tiny.use(model, "santa", samples=4)
    santa_hf.reset_stats(model)
    out = generate(model, cache_implementation=cache)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    fallbacks = santa_hf.stats(model).total.fallbacks
    assert [*fallbacks.values()] == [LAYERS * (NEW_TOKENS - 1)]
    assert "keys that it chose" in next(iter(fallbacks))


def test_sparse_attention_without_a_mask_is_not_guessed() -> None:
    """The chosen keys of a prefill may lie ahead of a token: only a mask can say."""
    layer = build("DeepseekV3").model.layers[0].self_attn
    wide = NOPE + ROTARY
    query, key, value = (torch.randn(1, HEADS, n, wide) for n in (3, 9, 9))
    chosen = torch.randint(9, (1, 3, 4))
    attend = partial(santa_attention, layer, query, key, value, indices=chosen)
    with pytest.raises(NotImplementedError, match="attention_mask=None"):
        attend(None)
    out, _ = attend(torch.ones(1, 1, 3, 9, dtype=torch.bool))
    assert out.shape == (1, 3, HEADS, wide)


def test_a_class_that_caches_what_it_expanded_keeps_its_expand_kv() -> None:
    class Layer(torch.nn.Module):
        def expand_kv(self, latent: torch.Tensor, rotary_key: torch.Tensor) -> Any:
            return latent, rotary_key

        def forward(self, x: torch.Tensor, cache: Any) -> Any:
            key, value = self.expand_kv(x, x)
            return cache.update(key, value, 0)

    original = Layer.expand_kv
    mla.adopt(Layer())
    assert Layer.expand_kv is original
    assert not mla.are_latents(Layer(), torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 3))


def test_other_attentions_and_subclasses_expand() -> None:
    layer = build("DeepseekV3").model.layers[0].self_attn
    mla.adopt(layer)
    latent, rotary_key = torch.randn(1, 1, 9, RANK), torch.randn(1, 1, 9, ROTARY)
    assert layer.expand_kv(latent, rotary_key)[0] is latent
    key, value = mla.expand(layer, latent, rotary_key)
    assert key.shape == (1, HEADS, 9, NOPE + ROTARY)
    assert value.shape == (1, HEADS, 9, VALUE)
    layer.__class__ = type("Subclass", (type(layer),), {})
    torch.testing.assert_close(layer.expand_kv(latent, rotary_key)[0], key)
    layer.__class__ = type(layer).__mro__[1]
    for attention in ("sdpa", PAGED):
        layer.config._attn_implementation = attention
        torch.testing.assert_close(layer.expand_kv(latent, rotary_key)[0], key)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_auto_is_dense_where_sampling_is_slower(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla, "sampling_pays", lambda device: False)
    model = tiny.use(build("DeepseekV3"), "santa", samples=4, kernel=kernel, strict=True)
    generate(model)  # steps over 151 to 155 keys
    total = santa_hf.stats(model).total
    steps = LAYERS * (NEW_TOKENS - 1)
    assert (total.dense, total.sampled) == ((steps, 0) if kernel == "auto" else (0, steps))


@pytest.mark.gpu
@pytest.mark.parametrize("family", MAIN)
def test_a_gpu_decodes_as_the_reference(family: str) -> None:
    model = build(family, torch.bfloat16).cuda()
    inputs = {name: x.cuda() for name, x in PADDED.items()}
    logits = {}
    for name, santa in (
        ("sdpa", None),
        ("dense", {"estimator": "dense"}),
        ("prop", {"kernel": "prop", "samples": 4096}),
    ):
        tiny.use(model, "sdpa" if santa is None else "santa", **(santa or {}))
        logits[name] = generate(model, inputs, max_new_tokens=2)[:, 1].float()
    for name in ("dense", "prop"):
        error = (logits[name] - logits["sdpa"]).square().mean().sqrt()
        assert error < 0.1 * logits["sdpa"].std(), name


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", MAIN)
def test_a_gpu_generates_what_the_reference_generates(family: str, cache: str) -> None:
    """With a static cache, generate compiles the step and replays CUDA graphs."""
    model = build(family, torch.bfloat16, first_k_dense_replace=LAYERS).cuda()
    inputs = {name: x.cuda() for name, x in PADDED.items()}
    forced = (torch.arange(200, device="cuda") % 80 + 3).expand(2, -1)

    def logits(attention: str, compiled: bool = True, **santa: Any) -> torch.Tensor:
        tiny.use(model, attention, **santa)
        return generate(
            model,
            inputs,
            max_new_tokens=16,
            cache_implementation=cache,
            disable_compile=not compiled,
            logits_processor=[tiny.Force(forced)],
        )[:, 1:].float()

    bfloat16 = logits("sdpa", compiled=False)
    model.float()  # weights of bfloat16, nothing else rounded
    exact = logits("sdpa", compiled=False)
    model.bfloat16()

    def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).square().mean().sqrt()

    rounding = apart(bfloat16, exact)
    assert apart(logits("santa", estimator="dense"), exact) < 1.5 * rounding
    prop = {"kernel": "prop", "samples": 8, "strict": True}
    sampled = logits("santa", **prop)
    noise = apart(sampled, exact)
    assert noise > 5 * rounding
    # The reference reads the mask on the host, which a graph cannot. Of eight draws, rounding moves few.
    for other in (
        logits("santa", compiled=False, **prop),
        logits("santa", compiled=False, **{**prop, "kernel": "reference"}),
    ):
        assert apart(sampled, other) < 0.7 * noise
    assert apart(sampled, logits("santa", **prop, seed=1)) > 0.9 * noise


@pytest.mark.gpu
@pytest.mark.parametrize("family", MAIN)
def test_a_gpu_generates_the_tokens_of_sdpa(family: str) -> None:
    """In float32, of which there are no kernels over latents: the reference runs on the device."""
    model = build(family, first_k_dense_replace=LAYERS).cuda()
    inputs = {name: x.cuda() for name, x in PADDED.items()}
    expected = greedy(tiny.use(model, "sdpa"), inputs)
    tiny.use(model, "santa", estimator="dense", strict=True)
    for cache in ("dynamic", "static"):
        tokens = greedy(model, inputs, cache_implementation=cache, disable_compile=True)
        assert torch.equal(tokens, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("context", [4096, 32768])
def test_auto_on_a_gpu_is_exact_or_sampled_as_measured(heads: int, context: int) -> None:
    """Heads and widths of DeepSeek-V2-Lite and V3, and a step behind a cache of random latents."""
    model = build(
        "DeepseekV3",
        torch.bfloat16,
        first_k_dense_replace=1,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=65536,
    ).cuda()
    generator = torch.Generator("cuda").manual_seed(context)
    states = [
        torch.randn(1, 1, context, n, generator=generator, device="cuda", dtype=torch.bfloat16)
        for n in (512, 64)
    ]

    def step(attention: str, **santa: Any) -> torch.Tensor:
        tiny.use(model, attention, **santa)
        cache = transformers.DynamicCache(config=model.config)
        cache.update(*states, 0)
        santa_hf.reset_stats(model)
        with torch.no_grad():
            out = model(
                torch.tensor([[5]], device="cuda"),
                past_key_values=cache,
                position_ids=torch.tensor([[context]], device="cuda"),
            )
        return out.logits[0, -1].float()

    sdpa = step("sdpa")
    dense = step("santa", estimator="dense")
    error = (dense - sdpa).square().mean().sqrt()
    assert error < 0.1 * sdpa.std()
    prop = step("santa", kernel="prop", strict=True)
    noise = (prop - dense).square().mean().sqrt()
    assert santa_hf.stats(model).total.sampled == 1
    auto = step("santa", strict=True)
    total = santa_hf.stats(model).total
    pays = mla.sampling_pays(model.device)
    assert (total.sampled, total.dense) == (int(pays), int(not pays))
    assert torch.equal(auto, prop if pays else dense)
    assert noise > 0
