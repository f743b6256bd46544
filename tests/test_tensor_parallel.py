"""Tensor parallelism on two gloo ranks: every rank draws its own heads' uniforms, and in float64 the
tokens are those of one rank. A replicated layer (DeepSeek V3) draws alike on both; one whose
up-projection is sharded (DeepSeek V2) absorbs its own heads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny
import torch
import transformers

import santa_hf

NEW_TOKENS = 32
SANTA = {"samples": 8, "strict": True}
DEEPSEEK = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "first_k_dense_replace": tiny.LAYERS,  # experts have no float64
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**{**tiny.COMMON, "vocab_size": 90}),
    "deepseek_v2": transformers.DeepseekV2Config(
        **{**tiny.COMMON, **DEEPSEEK, "vocab_size": 90, "num_key_value_heads": tiny.HEADS}
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **{**tiny.COMMON, **DEEPSEEK, "vocab_size": 90, "num_key_value_heads": tiny.HEADS}
    ),
}

RANK = """
import json, sys, torch
import torch.distributed
from transformers import AutoModelForCausalLM
import santa_hf
directory, santa, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
batch = torch.load(f"{directory}/batch.pt")
result = {}
for name in json.loads(sys.argv[4]):
    model = AutoModelForCausalLM.from_pretrained(
        f"{directory}/{name}", attn_implementation="santa", dtype=torch.float64, tp_plan="auto"
    )
    model.generation_config.eos_token_id = None
    santa_hf.configure(model, santa)
    tokens = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    total = santa_hf.stats(model).total
    result[name] = [tokens.tolist(), total.samples, sum(total.fallbacks.values())]
rank = torch.distributed.get_rank()
with open(f"{directory}/{rank}.json", "w") as file:
    json.dump(result, file)
torch.distributed.destroy_process_group()
"""


def test_two_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    batch = tiny.left_padded(tiny.prompts(150, 90))
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "rank.py").write_text(RANK)
    expected = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="santa")
        model = model.double().eval()
        model.generation_config.eos_token_id = None
        model.save_pretrained(tmp_path / name)
        santa_hf.configure(model, SANTA)
        tokens = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        expected[name] = tokens.tolist(), santa_hf.stats(model).total.samples
        santa_hf.configure(model, {**SANTA, "seed": 1})
        other = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert not torch.equal(tokens, other), "the draws do not matter to these tokens"

    arguments = [str(tmp_path), json.dumps(SANTA), str(NEW_TOKENS), json.dumps(list(CONFIGS))]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launch, str(tmp_path / "rank.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, (tokens, samples) in expected.items():
            assert result[name][0] == tokens, (name, rank)
            # Half of the heads each, or all of them where attention is replicated.
            assert result[name][1:] == [samples // (1 if name == "deepseek_v3" else 2), 0]


def test_heads_sharded_in_an_unknown_way_are_exact() -> None:
    layer = tiny.build("llama").model.layers[1].self_attn
    from santa_hf.integration.attention import _head_offset

    assert _head_offset(layer, tiny.HEADS) == 0
    assert _head_offset(layer, tiny.HEADS // 2) is None
