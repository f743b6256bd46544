"""Every kernel once on small, awkward shapes, for compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitizer.py
    compute-sanitizer --tool racecheck python tests/sanitizer.py

Without PyTorch's caching, each tensor is an allocation of its own, so that an access behind its
end is seen; so is here each part of a workspace. No test of pytest's: it needs a GPU and the tool.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from santa_hf import santa_decode
from santa_hf.functional import decode_valid
from santa_hf.kernels.launcher import Layout, Part


def apart(layout: Layout, device: torch.device) -> list[Part]:
    """`Layout.allocate`, with memory of its own for each part."""
    parts = []
    for _, shape, dtype in layout.places:
        memory = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device)
        parts.append(Part(memory, memory.data_ptr(), 0, shape, dtype))
    return parts


def main() -> None:
    """Run all kernels; a wrong access ends the tool with an error."""
    calls = 0
    Layout.allocate = apart  # type: ignore[method-assign]
    torch.manual_seed(0)
    kernels = [("dense", "auto", 1), ("systematic", "flash", 60)]
    kernels += [(name, "prop", 50) for name in ("systematic", "stratified", "multinomial")]
    kernels += [("systematic", "prop", 600)]
    for length, masked in itertools.product((1, 129, 700), (False, True)):
        batch, heads, kv_heads, dtype = 2, 6, 2, torch.bfloat16
        query = torch.randn(batch, heads, 1, 80, dtype=dtype, device="cuda")
        key = torch.randn(batch, kv_heads, length, 80, dtype=dtype, device="cuda")
        value = torch.randn(batch, kv_heads, length, 96, dtype=dtype, device="cuda")
        mask = torch.rand(batch, 1, 1, length, device="cuda") < 0.7 if masked else None
        scored = {"softcap": 20.0, "sinks": torch.randn(heads, device="cuda")} if masked else {}
        exact = torch.tensor([True, False], device="cuda") if masked else None
        rows = torch.stack([torch.randperm(length, device="cuda") for _ in range(batch)])
        latents = torch.randn(batch, 1, length, 128, dtype=dtype, device="cuda")
        rotary = torch.randn(batch, 1, length, 32, dtype=dtype, device="cuda")
        absorbed = torch.randn(batch, 16, 1, 160, dtype=dtype, device="cuda")
        for estimator, kernel, samples in kernels:
            step = {"samples": samples, "estimator": estimator, "kernel": kernel, "mask": mask}
            santa_decode(query, key, value, exact=exact, **step, **scored)
            decode_valid(query, key, value, exact=exact, rows=rows, **step, **scored)
            spoiled = key.clone()
            spoiled[:, :, 640:643] = torch.nan  # nothing may be drawn or read
            santa_decode(query, spoiled, value, exact=exact, **step, **scored)
            calls += 3
            if kernel != "flash":
                step["kernel"] = "prop"
                santa_decode(absorbed, latents, latents, rotary_key=rotary, **step)
                calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
