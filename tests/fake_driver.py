"""Launches all kernels on a CUDA driver that runs nothing and records what it is asked for.

    python tests/fake_driver.py FOLDER [--time]

In FOLDER lies `fake_driver.c` compiled:

    gcc -shared -fPIC -I TRITON/backends/nvidia/include -Wl,-soname,libcuda.so.1 \\
        -o FOLDER/libcuda.so.1 tests/fake_driver.c

Triton compiles for compute capability 9.0 and launches as it does on a GPU; tensors lie in the memory of
the CPU. Each call goes through `Launcher` twice, with Triton's own dispatch between, and has to ask the
driver for the same each time: functions, grids, attributes, stream, scalars byte for byte, and pointers
in the same places, which have to be those of the tensors.
It prints a line for each call: its name, how many launches it made, and how many kernels were compiled;
with --time, how long each way takes the host, allocations and all.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1])
os.environ["TRITON_LIBCUDA_PATH"] = str(FOLDER)
os.environ["TRITON_CACHE_DIR"] = str(FOLDER / "cache")
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.setdlopenflags(os.RTLD_LAZY)  # what Triton links but does not call here may be missing
DRIVER = ctypes.CDLL(str(FOLDER / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402

from santa_hf.kernels import dense, flash, host, latent, launch, sample, scores  # noqa: E402
from santa_hf.kernels.launcher import Launcher  # noqa: E402

STREAM = 4096


class Driver(CudaDriver):  # type: ignore[misc]
    """Triton's driver on a machine whose torch knows no CUDA."""

    def __init__(self) -> None:
        torch._C._cuda_getCurrentRawStream = lambda device: STREAM  # type: ignore[assignment]
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = lambda device=0: (9, 0)


class OnGpu(Launcher):
    """A launcher that takes its tensors to lie on the GPU."""

    through_triton = False

    def __init__(self, kernel: Any, device: torch.device, **constants: Any) -> None:
        super().__init__(kernel, torch.device("cuda", 0), **constants)

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        before = len(launches)
        if self.through_triton:
            self._dispatch(grid, arguments)
        else:
            super().__call__(grid, *arguments)
        for *_, values in launches[before:]:
            asked = [x.data_ptr() for x in arguments[: self._pointers] if x is not None]
            told = [int.from_bytes(x, "little") for t, x in values if t.startswith("*")]
            assert told == asked, self.kernel


SIZES = {"i1": 1, "i8": 1, "i32": 4, "i64": 8, "fp32": 4}
compiled: dict[int, CompiledKernel] = {}
launches: list[tuple[Any, ...]] = []


def watch_compilations() -> None:
    load = CompiledKernel._init_handles

    def loaded(kernel: CompiledKernel) -> None:
        load(kernel)
        compiled[kernel.function] = kernel

    CompiledKernel._init_handles = loaded


@ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)
def record(function: int, shape: Any, parameters: Any, stream: int) -> None:
    kernel = compiled[function]
    types = [t for t in kernel.src.signature.values() if t != "constexpr"]
    values = [
        (t, ctypes.string_at(parameters[i], 8 if t.startswith("*") else SIZES[t]))
        for i, t in enumerate(types)
    ]
    launches.append((kernel.name, function, tuple(shape[:14]), stream, values))


def recorded(call: Callable[[], object]) -> list[tuple[Any, ...]]:
    """What `call` asks of the driver; a pointer counts as the how-manieth that is new."""
    launches.clear()
    call()
    names: dict[bytes, int] = {}
    return [
        (
            *launch[:-1],
            [names.setdefault(x, len(names)) if t.startswith("*") else x for t, x in launch[-1]],
        )
        for launch in launches
    ]


def states(*shape: int, offset: int = 0) -> torch.Tensor:
    """bf16 at an address that is `offset` elements behind a multiple of 16 bytes."""
    memory = torch.randn(torch.Size(shape).numel() + 16).to(torch.bfloat16)
    start = -memory.data_ptr() // 2 % 8 + offset
    return memory[start : start + torch.Size(shape).numel()].view(shape)


def calls() -> list[tuple[str, Callable[[], object]]]:
    step: dict[str, Any] = {
        "samples": 40, "estimator": "systematic", "scaling": 0.1, "mask": None, "seed": 3, "layer": 1,
        "position": torch.tensor([7]),
    }  # fmt: skip
    query, key, value = states(1, 8, 1, 64), states(1, 2, 300, 64), states(1, 2, 300, 64)
    longer = states(1, 2, 431, 64)
    odd = states(1, 2, 300, 64, offset=1)
    two, both = states(2, 8, 1, 64), states(2, 2, 300, 64)
    index = torch.empty(2, 8, 40, dtype=torch.int64)
    full = {
        **step, "samples": 600, "mask": torch.rand(1, 1, 1, 300) < 0.7, "seed": torch.tensor([5]),
        "softcap": 20.0, "sinks": torch.randn(8), "exact": torch.tensor([False]), "position": None,
    }  # fmt: skip
    rows = torch.randperm(300)[None]
    latents, rotary, absorbed = states(1, 1, 300, 128), states(1, 1, 300, 32), states(1, 16, 1, 160)
    many = states(1, 32, 1, 160)
    over_latents = {"rotary_key": rotary, "scaling": 0.1, "mask": None}
    seen = torch.rand(2, 1, 1, 300) < 0.7
    plain, positions = launch.Plain(two, both, both, seen), torch.tensor([7, 300])
    return [
        ("prop", lambda: launch.prop(query, key, value, **step)),
        ("prop, longer", lambda: launch.prop(query, longer, longer, **{**step, "layer": 9})),
        ("prop, odd addresses", lambda: launch.prop(query, odd, odd, **step)),
        ("prop, one odd address", lambda: launch.prop(query, odd, value, **step)),
        ("prop, everything", lambda: launch.prop(query, key, value, **full)),
        ("prop, rows", lambda: launch.prop(query, key, value, **step, rows=rows)),
        (
            "prop, rows of 32 bits",
            lambda: launch.prop(query, key, value, **step, rows=rows.int()),
        ),
        (
            "prop, two rows",
            lambda: launch.prop(two, both, both, **{**step, "mask": full["mask"]}, index=index),
        ),
        ("prop, again", lambda: launch.prop(query, key, value, **step)),
        ("dense", lambda: launch.fused(query, key, value, **{**step, "estimator": "dense"})),
        ("flash", lambda: launch.fused(query, key, value, **step)),
        (
            "prop, short way",
            lambda: plain.prop(two, both, both, seen, positions, 40, "systematic", 0.1, 3, 1, 0),
        ),
        ("dense, short way", lambda: plain.dense(two, both, both, seen, 0.1)),
        ("latent dense", lambda: latent.dense(absorbed, latents, latents, **over_latents)),
        ("latent dense, 32 heads", lambda: latent.dense(many, latents, latents, **over_latents)),
        ("latent prop", lambda: latent.prop(absorbed, latents, latents, **step, rotary_key=rotary)),
    ]


def microseconds(call: Callable[[], object]) -> float:
    """Host time of one call, the least of nine runs of 200."""
    runs = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(200):
            call()
        runs.append((time.perf_counter() - start) / 200 * 1e6)
    return min(runs)


def main() -> None:
    torch.manual_seed(0)
    triton.runtime.driver.set_active(Driver())
    torch.cuda.current_device = lambda: 0
    DRIVER.call_at_launches(record)
    watch_compilations()
    for module in (host, scores, sample, dense, flash, latent):
        module.Launcher = OnGpu  # type: ignore[attr-defined]
    host.dependent = lambda device: {"PDL": True, "launch_pdl": True}  # type: ignore[assignment]
    host.processors = lambda device: 132  # type: ignore[assignment]
    host.shared_memory = lambda device: 211 * 1024  # type: ignore[assignment]
    for name, call in calls():
        before = len(compiled)
        found = []
        for OnGpu.through_triton in (False, True, False):
            found.append(recorded(call))
        assert found[0], f"{name} launched nothing"
        assert found[0] == found[1] == found[2], f"{name} differs:\n" + "\n".join(map(str, found))
        print(f"{name}: {len(found[0])} launches, {len(compiled) - before} compiled", flush=True)
    if "--time" in sys.argv:
        torch.set_num_threads(1)
        DRIVER.call_at_launches(None)
        print(f"Triton {triton.__version__}, microseconds through Triton and through Launcher")
        for name, call in calls():
            us = []
            for OnGpu.through_triton in (True, False):
                call()
                us.append(f"{microseconds(call):.1f}")
            print(f"{name}: {us[0]}, {us[1]}", flush=True)


if __name__ == "__main__":
    main()
