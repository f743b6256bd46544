"""Runs the tests of kernels on the CPU, in processes whose Triton interprets its kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import santa_hf

# Parts of one file, by words in the names of its tests; the last part is whatever the others leave.
PARTS = ["draws_and_output or any_case", "fixed_budget or grid or unbiased"]
PARTS += [" and ".join(f"not ({part})" for part in PARTS)]
RUNS = [("test_kernels.py", part) for part in PARTS] + [("test_latent_kernels.py", "")]
RUNS.append(("test_continuous_batching.py", "copy_no_keys or would_be_gathered"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU itself")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.timeout(900)  # each takes one to three minutes of a core of its own
@pytest.mark.parametrize(("file", "part"), RUNS)
def test_kernels_in_the_interpreter(file: str, part: str) -> None:
    # Triton decides when it is imported, and this process may have imported it.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(file))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_an_explicit_kernel_never_falls_back() -> None:
    x = torch.randn(1, 2, 1, 32), torch.randn(1, 1, 9, 32), torch.randn(1, 1, 9, 32)
    for kernel in ("prop", "flash"):
        with pytest.raises(NotImplementedError, match=r"cpu|not installed"):
            santa_hf.santa_decode(*x, kernel=kernel)
