"""A LoRA adapter with which SmolLM2-135M answers RULER-style questions over 32k tokens.

A decode method can only be judged at 32k tokens on a model that dense decoding makes answer there, and
this one trains in minutes on one GPU. The training data are those of `eval.synthetic`; the score of the
result says nothing about SmolLM2, the difference between dense and sampled decoding is what it is for.

The base is loaded with a larger `rope_theta`, which the adapter is trained for; wherever it is used,
the model's config needs the same changes before the weights are loaded: model_config.json, beside
the adapter, holds them, and `python -m eval run --adapter` makes them.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, PreTrainedModel

from . import provenance, smollm2, synthetic
from .cli import CommandError
from .data import local_data
from .models import CONFIG_FILE, load
from .results import write_json

__all__ = ["DIRECTORY", "MODEL_CONFIG", "main", "train"]

DIRECTORY = Path(__file__).parent / "checkpoints/smollm2-135m-32k"
# 32,768 tokens of RULER, its answer, and what RULER's own count of tokens leaves out.
MODEL_CONFIG = {
    "max_position_embeddings": 33792,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

RANK, ALPHA = 32, 64
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
# The rate stays at its highest for a while, since the longest sequences come last, and falls linearly.
LEARNING_RATE, WARM_UP_STEPS, DECAY, FINAL_SHARE = 6e-4, 20, 0.5, 0.05
CLIP = 1.0
TOKENS_PER_STEP = 32768
# Share of each task among the sequences: needles are eight tasks, common words take longest to learn.
MIXTURE = {"needles": 0.45, "variables": 0.15, "common_words": 0.25, "frequent_words": 0.15}
# Lengths of the sequences, in quarters of the training: short ones teach more in a second.
LENGTHS = ((2048, 4096), (4096, 8192, 16384), (8192, 16384, 32768), (16384, 32768, 32768))
_PACKAGES = ("transformers", "peft", "lm-eval", "wonderwords")


class Sequences(IterableDataset):
    """Batches of one length, drawn from the mixture, without end.

    A batch is (each row's place in `MIXTURE` (rows,), token_ids (rows, length) padded on the right, row
    and position of each target (n,), the tokens that are right there (n, most) padded with -1).
    """

    def __init__(self, tokenizer: Any, prose: Sequence[str], length: int, rows: int, seed: int):
        self.tokenizer, self.prose = tokenizer, prose
        self.length, self.rows, self.seed = length, rows, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        worker = torch.utils.data.get_worker_info()
        seed = f"{self.seed}/{self.length}/{worker.id if worker else 0}"
        source = synthetic.Source(self.tokenizer, self.prose, seed)
        tasks = random.Random(seed)
        while True:
            drawn = tasks.choices(range(len(MIXTURE)), [*MIXTURE.values()], k=self.rows)
            examples = [synthetic.draw(source, [*MIXTURE][task], self.length) for task in drawn]
            padding = self.tokenizer.eos_token_id
            yield torch.tensor(drawn), *collate(examples, self.length, padding)


def collate(
    examples: Sequence[synthetic.Example], length: int, padding: int
) -> tuple[torch.Tensor, ...]:
    """Examples as one batch (see `Sequences`), without their tasks."""
    token_ids = torch.full((len(examples), length), padding)
    for row, example in enumerate(examples):
        token_ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
    places = [(row, t) for row, example in enumerate(examples) for t in example.targets]
    right = torch.full((len(places), max(len(t.tokens) for _, t in places)), -1)
    for i, (_, target) in enumerate(places):
        right[i, : len(target.tokens)] = torch.tensor(target.tokens)
    rows = torch.tensor([row for row, _ in places])
    return token_ids, rows, torch.tensor([t.position for _, t in places]), right


def losses(model: PreTrainedModel, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Negative log-probability of the right tokens, averaged over each row's targets: (rows,).

    The hidden states of the targets are gathered before the LM head, which would otherwise make
    (tokens, vocabulary) logits.

    Args:
        model: a causal language model.
        batch: what `collate` returns.
    """
    token_ids, rows, positions, right = batch
    # Padding follows the text, so a causal model needs no mask; without one, SDPA is at its fastest.
    hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[rows, positions]).float()
    logits_of_right = logits.gather(1, right.clamp(min=0)).masked_fill(right < 0, -math.inf)
    loss = logits.logsumexp(1) - logits_of_right.logsumexp(1)
    count = torch.zeros(len(token_ids), device=loss.device)
    count.index_add_(0, rows, torch.ones_like(loss))
    return torch.zeros_like(count).index_add_(0, rows, loss) / count


def train(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    prose: Sequence[str],
    *,
    seconds: float,
    initial: str | os.PathLike[str] | None = None,
    learning_rate: float = LEARNING_RATE,
    longest: int = 32768,
    workers: int = 1,
    seed: int = 0,
    device: str = "cuda",
) -> dict[str, Any]:
    """Train an adapter and write it to `out`, about once a minute.

    Args:
        base: directory of SmolLM2-135M-Instruct.
        out: directory of the adapter, in PEFT's format, with `training.json` beside it.
        prose: sentences for haystacks.
        seconds: how long to train; the learning rate and the lengths follow the clock.
        initial: an adapter to go on from, instead of a new one.
        learning_rate: the highest; it rises over the first steps and falls in the second half.
        longest: tokens of the longest sequences.
        workers: processes that draw sequences, for each length.
        seed: of the sequences and the new adapter.
        device: where to train.

    Returns:
        What training.json holds: settings, steps, the loss over time.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = load(base, dtype=torch.bfloat16, model_config=MODEL_CONFIG)
    model.to(device)
    peft_model: Any
    if initial is None:
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, task_type="CAUSAL_LM")
        peft_model = get_peft_model(model, lora)
    else:
        peft_model = PeftModel.from_pretrained(model, initial, is_trainable=True)
    weights = [weight for weight in peft_model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, learning_rate, (0.9, 0.95), weight_decay=0.0)
    phases = [[min(length, longest) for length in lengths] for lengths in LENGTHS]
    batches = {
        length: iter(
            DataLoader(
                Sequences(
                    tokenizer, prose, length, max(1, min(longest, TOKENS_PER_STEP) // length), seed
                ),
                batch_size=None,
                num_workers=workers,
                pin_memory=device != "cpu",
            )
        )
        for length in {length for phase in phases for length in phase}
    }
    rng = random.Random(seed)
    record: dict[str, Any] = {
        "seconds": seconds,
        "seed": seed,
        "initial": None if initial is None else str(initial),
        "learning_rate": learning_rate,
        "mixture": MIXTURE,
        "lengths": LENGTHS,
        "longest": longest,
        "device": torch.cuda.get_device_name() if device != "cpu" else provenance.cpu_model(),
        "versions": provenance.versions(_PACKAGES),
        "commit": provenance.commit(),
        "tokens": 0,
        "loss": [],
    }
    # The workers start with the first batch of each length: not on the clock.
    waiting = {length: next(batch) for length, batch in batches.items()}
    started = saved = time.monotonic()
    step, recent = 0, []
    while (elapsed := time.monotonic() - started) < seconds:
        progress = elapsed / seconds
        length = rng.choice(phases[int(progress * len(phases))])
        tasks, *batch = (part.to(device, non_blocking=True) for part in waiting.pop(length))
        rate = FINAL_SHARE + (1 - FINAL_SHARE) * min(1.0, (1 - progress) / DECAY)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate * min(1.0, (step + 1) / WARM_UP_STEPS)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = losses(model, batch)
        loss.mean().backward()
        # A gradient that overflowed would end the training: its step is left out.
        if torch.nn.utils.clip_grad_norm_(weights, CLIP).isfinite():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        waiting[length] = next(batches[length])
        step += 1
        record["tokens"] += batch[0].numel()
        recent.append((tasks, loss.detach()))
        if step % 20 == 0:
            entry = {"seconds": round(elapsed, 1), "step": step} | _by_task(recent)
            record["loss"].append(entry)
            print(*(f"{name} {value}" for name, value in entry.items()), flush=True)
            recent.clear()
        if time.monotonic() - saved > 60:
            save(peft_model, out, record | {"steps": step})
            saved = time.monotonic()
    record["steps"] = step
    save(peft_model, out, record)
    return record


def _by_task(rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Mean loss of the rows of each task."""
    tasks, loss = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return {
        name: round(loss[tasks == i].mean().item(), 4)
        for i, name in enumerate(MIXTURE)
        if (tasks == i).any()
    }


def save(model: Any, out: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write the adapter in bfloat16, its configuration, model_config.json and training.json.

    Each file appears complete or not at all.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    state = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in get_peft_model_state_dict(model).items()
    }
    unfinished = out / ".adapter_model.safetensors"
    save_file(state, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)
    unfinished.rename(out / "adapter_model.safetensors")
    lora = model.peft_config["default"]
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": smollm2.HUB_ID,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "bias": lora.bias,
        "target_modules": sorted(lora.target_modules),
        "inference_mode": True,
    }
    write_json(out / "adapter_config.json", values)
    write_json(out / CONFIG_FILE, MODEL_CONFIG)
    write_json(out / "training.json", record)


def sentences(texts: Sequence[str]) -> list[str]:
    """Texts split into sentences, on one line each."""
    return [
        sentence for text in texts for sentence in re.split(r"(?<=[.?!]) ", " ".join(text.split()))
    ]


def _prose() -> list[str]:
    """The questions of GSM8K's training set, from the hub or SANTA_HF_DATA."""
    import datasets

    with local_data():
        return sentences(datasets.load_dataset("openai/gsm8k", "main", split="train")["question"])


def _arguments(prog: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--model-dir", type=Path, default=smollm2.DIRECTORY, help="made if missing")
    parser.add_argument(
        "--out", type=Path, default=Path("results/adapter"), help="default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=520, help="of training; default: %(default)s"
    )
    parser.add_argument("--initial", type=Path, help="an adapter to go on from")
    parser.add_argument(
        "--learning-rate", type=float, default=LEARNING_RATE, help="highest; default: %(default)s"
    )
    parser.add_argument("--longest", type=int, default=32768, help="tokens; default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=1, help="for each length; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    for name in ("seconds", "learning_rate"):
        if not getattr(arguments, name) > 0:
            raise CommandError(f"--{name.replace('_', '-')} must be positive")
    if not 512 <= arguments.longest <= 32768:
        raise CommandError(f"--longest must be in [512, 32768], got {arguments.longest}")
    if arguments.initial and not (arguments.initial / "adapter_model.safetensors").is_file():
        raise CommandError(f"{arguments.initial} holds no adapter")
    return arguments


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval adapter`."""
    arguments = _arguments(prog, argv)
    record = train(
        smollm2.convert(arguments.model_dir),
        arguments.out,
        _prose(),
        seconds=arguments.seconds,
        initial=arguments.initial,
        learning_rate=arguments.learning_rate,
        longest=arguments.longest,
        workers=arguments.workers,
        seed=arguments.seed,
        device=arguments.device,
    )
    print(f"{record['steps']} steps, {record['tokens'] / 1e6:.1f} M tokens: {arguments.out}")
