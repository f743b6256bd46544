"""lm-eval's own command line with attn_implementation=santa, offline, without importing santa_hf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import santa_hf

PROMPT = "Here is a list of colours: red, green, blue, yellow, orange, purple, black, white, brown,"
TOKENS = 16
TASK = f"""
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: DATA}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{do_sample: false, max_gen_toks: {TOKENS}, until: []}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.model
def test_lm_eval_decodes_by_sampling_without_an_import(smollm2: Path, tmp_path: Path) -> None:
    # One draw per head: the answer is then the draws' own, and no other attention gives it.
    config = santa_hf.SantaConfig(samples=1, seed=5, strict=True)
    config.to_yaml(tmp_path / "santa.yaml")
    (tmp_path / "data.json").write_text(json.dumps([{"text": PROMPT, "target": "grey"}]))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/colours.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.json")))
    command = f"""-m lm_eval --model hf --tasks colours --include_path {tmp_path / "tasks"}
        --model_args pretrained={smollm2},attn_implementation=santa --device cpu
        --batch_size 1 --output_path {tmp_path / "out"} --log_samples"""
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=tmp_path,
        env={
            **os.environ,
            "SANTA_HF_CONFIG": str(tmp_path / "santa.yaml"),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("samples_colours_*.jsonl")
    (answer,) = json.loads(samples.read_text().splitlines()[0])["resps"][0]

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, attn_implementation="santa"
    )
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def generate() -> str:
        out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return str(tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))

    santa_hf.configure(model, config)
    assert answer == generate()
    model.set_attn_implementation("sdpa")
    assert answer != generate()
