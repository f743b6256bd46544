"""Launches that pass by Triton's dispatch: what they depend on, and what they are given.

First compiled kernels are fakes that record; then it is the CUDA driver that does (`fake_driver.py`),
below Triton and its compiler. The kernels themselves run in test_kernels.py, on a GPU both ways.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import triton
import triton.language as tl

from santa_hf.kernels import common, dense, flash, host, latent, launch, launcher, sample, scores
from santa_hf.kernels.launcher import ALIGNMENT, Launcher, Layout

JIT = [
    common.span_kernel,
    scores.scores_kernel,
    sample.sample_kernel,
    dense.dense_kernel,
    flash.flash_kernel,
    dense.combine_kernel,
    latent.latent_kernel,
    latent.latent_scores_kernel,
]
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("kernel", JIT, ids=lambda kernel: kernel.fn.__name__)
def test_code_depends_on_constants_and_pointers_alone(kernel: Any) -> None:
    """As `Launcher` takes it: else a launch would run code made for other arguments."""
    if not hasattr(kernel, "params"):
        pytest.skip("the interpreter specialises on nothing")
    kinds = "".join(
        "c" if p.is_constexpr else "s" if p.annotation_type else "p" for p in kernel.params
    )
    assert kinds == "".join(sorted(kinds, key="psc".index))
    for p in kernel.params:
        assert not p.has_default
        if p.is_constexpr:
            continue
        if p.annotation_type:
            assert p.do_not_specialize or p.annotation_type.startswith("fp")
        else:
            assert p.name.startswith("p_")
            assert not any((p.annotation, p.do_not_specialize, p.do_not_specialize_on_alignment))
    made = Launcher(kernel, GPU)
    assert made._pointers == kinds.count("p")
    assert len(made._unread) == kinds.count("c")


class Pointer(NamedTuple):
    address: int
    dtype: torch.dtype = torch.float16

    def data_ptr(self) -> int:
        return self.address


class Compiled:
    """A kernel that Triton compiled, and what it was launched with."""

    function, packed_metadata = 41, (4, 1, 0)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.hooked: list[tuple[Any, ...]] = []

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        stream, function, metadata, *hooks = rest[:6]
        assert (function, metadata, hooks) == (41, (4, 1, 0), [None] * 3)
        self.launches.append(((x, y, z), *rest[6:], stream))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.hooked.append((grid[:3], *arguments))


class Kernel:
    """A kernel of two pointers, a scalar and a constant; Triton's dispatch of it records."""

    arg_names = ("p_x", "p_y", "N", "BLOCK")
    fn = SimpleNamespace(__annotations__={"N": tl.int32, "BLOCK": tl.constexpr})

    def __init__(self, result: Callable[[], Any] = Compiled) -> None:
        self.result = result
        self.dispatched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def dispatch(*arguments: Any, **constants: Any) -> Any:
            self.dispatched.append((grid, arguments, constants, current_device()))
            return self.result()

        return dispatch


def current_device() -> int:
    return torch.cuda.current_device()


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were some, of which 0 is current."""
    state = SimpleNamespace(index=0)

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, state.index = state.index, index
        yield
        state.index = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.index)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launcher, "CompiledKernel", Compiled)
    streams = SimpleNamespace(get_current_stream=lambda index: 1000 + index)
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=streams))


def compiled_of(made: Launcher) -> list[Any]:
    return list(made.compiled.values())


def test_the_first_launch_is_triton_s_and_later_ones_the_compiled_kernel_s() -> None:
    kernel = Kernel()
    made = Launcher(kernel, GPU, BLOCK=8, num_warps=2)
    x, y = Pointer(1024), Pointer(4096)
    made((5, 2), x, y, 77)
    assert kernel.dispatched == [((5, 2), (x, y, 77), {"BLOCK": 8, "num_warps": 2}, 0)]
    made((6, 3), Pointer(2048), y, 16)
    made((7,), x, y, 1)
    assert len(kernel.dispatched) == 1
    (compiled,) = compiled_of(made)
    # As Triton launches it: every parameter in its order, with anything in the place of a constant.
    assert compiled.launches == [
        ((6, 3, 1), 2048, 4096, 16, None, 1000),
        ((7, 1, 1), 1024, 4096, 1, None, 1000),
    ]
    assert not compiled.hooked


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_triton_see_every_launch(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Launcher(Kernel(), GPU, BLOCK=8)
    x, y = Pointer(1024), Pointer(4096)
    made((5,), x, y, 77)
    chain = type(getattr(triton.knobs.runtime, hook))()
    monkeypatch.setattr(triton.knobs.runtime, hook, chain)
    made((5,), x, y, 77)
    chain.add(print)
    made((5,), x, y, 77)
    monkeypatch.setattr(triton.knobs.runtime, hook, SimpleNamespace(calls=0))  # one of its own
    made((6,), x, y, 77)
    monkeypatch.setattr(triton.knobs.runtime, hook, None)
    made((5,), x, y, 77)
    (compiled,) = compiled_of(made)
    assert compiled.hooked == [((n, 1, 1), 1024, 4096, 77, None) for n in (5, 6)]
    assert len(compiled.launches) == 2


def test_parts_of_a_workspace_are_views_of_one_memory() -> None:
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((2, 3, 5), torch.float16), ((7,), torch.float32), ((1,), torch.int32), ((3, 0), torch.int64),
        ((2, 2), torch.int64),
    ]  # fmt: skip
    parts = Layout(*shapes).allocate(torch.device("cpu"))
    tensors = [part.tensor() for part in parts]
    for tensor in tensors:  # conftest.py fills memory that nobody wrote
        if tensor.is_floating_point():
            assert tensor.isnan().all()
        else:
            assert (tensor > 2**30).all()
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    for i, (part, tensor, (shape, dtype)) in enumerate(zip(parts, tensors, shapes, strict=True)):
        assert part.shape == tensor.shape == shape
        assert part.dtype == tensor.dtype == dtype
        assert tensor.is_contiguous()
        if tensor.numel():
            assert part.data_ptr() == tensor.data_ptr()
        assert (tensor.storage_offset() * dtype.itemsize) % ALIGNMENT == 0
        tensor.fill_(i)
    assert all((tensor == i).all() for i, tensor in enumerate(tensors))


def test_triton_is_given_the_tensors_of_parts() -> None:
    kernel = Kernel()
    made = Launcher(kernel, GPU, BLOCK=8)
    (part,) = Layout(((5,), torch.float32)).allocate(torch.device("cpu"))
    made((1,), part, None, 3)
    ((_, (tensor, *_), *_),) = kernel.dispatched
    assert isinstance(tensor, torch.Tensor)
    assert tensor.data_ptr() == part.data_ptr()
    made((1,), tensor, None, 3)  # a tensor or a part of the same kind: one kernel
    made((1,), part, None, 3)
    (compiled,) = compiled_of(made)
    assert compiled.launches == 2 * [((1, 1, 1), part.data_ptr(), None, 3, None, 1000)]


def test_what_a_pointer_is_compiled_for() -> None:
    kernel = Kernel()
    made = Launcher(kernel, GPU, BLOCK=8)
    kinds = [
        (Pointer(1024), Pointer(4096)),
        (Pointer(1024), Pointer(4096, torch.bfloat16)),
        (Pointer(1024, torch.bfloat16), Pointer(4096)),
        (Pointer(1024), Pointer(4104)),
        (Pointer(1032), Pointer(4096)),
        (Pointer(1024), None),
        (None, Pointer(4096)),
        (None, None),
    ]
    for _ in range(3):
        for pointers in kinds:
            made((1,), *pointers, 3)
    assert [arguments[:2] for _, arguments, *_ in kernel.dispatched] == kinds
    for pointers, compiled in zip(kinds, compiled_of(made), strict=True):
        addresses = tuple(None if p is None else p.address for p in pointers)
        assert compiled.launches == 2 * [((1, 1, 1), *addresses, 3, None, 1000)]
    # Neither a scalar nor another address of the same kind.
    for n, offset in ((1, 16), (16, 32), (2**31 - 1, 48)):
        made((1,), Pointer(1024 + offset), Pointer(4096 + offset), n)
    assert len(kernel.dispatched) == len(kinds)


def test_a_kernel_runs_on_the_device_of_its_launcher() -> None:
    kernel = Kernel()
    here, there = (Launcher(kernel, torch.device("cuda", i), BLOCK=8) for i in (0, 1))
    for _ in range(2):
        for made in (here, there):
            made((1,), Pointer(1024), None, 3)
    assert [device for *_, device in kernel.dispatched] == [0, 1]
    streams = [compiled.launches[0][-1] for (compiled,) in map(compiled_of, (here, there))]
    assert streams == [1000, 1001]
    assert current_device() == 0


@pytest.mark.parametrize("device", [GPU, torch.device("cpu")])
@pytest.mark.parametrize("result", [lambda: None, lambda: SimpleNamespace(result=Compiled)])
def test_what_is_not_compiled_yet_is_not_kept(
    device: torch.device, result: Callable[[], Any]
) -> None:
    """Of the interpreter, and of a Triton that compiles in the background."""
    kernel = Kernel(result)
    made = Launcher(kernel, device, BLOCK=8)
    for n in range(3):
        made((n,), Pointer(1024), None, n)
    assert [grid for grid, *_ in kernel.dispatched] == [(0,), (1,), (2,)]
    assert not made.compiled


def test_each_choice_of_constants_has_a_launcher() -> None:
    cpu, choices = torch.device("cpu"), (4, 64, 64, 1, False, False, False, False, False, 8, 8)
    made = {scores._scores_launcher(cpu, *choices)}
    for i, choice in enumerate(choices):
        other = [*choices]
        other[i] = not choice if isinstance(choice, bool) else 2 * choice
        made.add(scores._scores_launcher(cpu, *other))
    assert len(made) == len(choices) + 1
    assert len({tuple(one.constants.values()) for one in made}) == len(made)
    assert scores._scores_launcher(cpu, *choices) in made


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Kernels of which a launcher is made, which launches nothing."""
    kernels: list[Any] = []

    class Idle:
        def __init__(self, kernel: Any, device: torch.device, **constants: Any) -> None:
            self.constants = constants
            kernels.append(kernel)

        def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None: ...

    modules = (host, scores, sample, dense, flash, latent)
    caches = [
        function
        for module in modules
        for name, function in vars(module).items()
        if name.endswith(("_launcher", "_plan"))
    ]
    assert len(caches) == len(JIT) + 3
    for module in modules:
        monkeypatch.setattr(module, "Launcher", Idle)
    for cached in caches:
        cached.cache_clear()
    yield kernels
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("masked", [False, True])
def test_a_growing_context_makes_its_launchers_once(masked: bool, made: list[Any]) -> None:
    """Also where the cache is copied at every step, so that its strides grow with it."""
    query = torch.randn(2, 4, 1, 32, dtype=torch.float16)
    joined = torch.randn(2, 4, 1, 32 + 16, dtype=torch.float16)
    keywords: dict[str, Any] = {"scaling": 0.1, "mask": None}
    draws = {"samples": 40, "estimator": "systematic", "layer": 0, "position": None}
    for step, length in enumerate(range(250, 400)):
        key = torch.randn(2, 2, length, 32, dtype=torch.float16)
        latents, rotary_key = key[:, :1].contiguous(), key[:, :1, :, :16].contiguous()
        if masked:
            keywords["mask"] = torch.ones(2, 1, 1, length, dtype=torch.bool)
        drawn = {**keywords, **draws, "seed": step}
        launch.prop(query, key, key, **drawn)
        launch.fused(query, key, key, **drawn)
        launch.fused(query, key, key, **{**drawn, "estimator": "dense"})
        latent.prop(joined, latents, latents, rotary_key=rotary_key, **drawn)
        latent.dense(joined, latents, latents, rotary_key=rotary_key, **keywords)
        if step == 0:
            first = len(made)
            assert set(made) == {k for k in JIT if masked or k is not common.span_kernel}
    assert len(made) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_alignment_divides_every_start_of_a_head(dtype: torch.dtype) -> None:
    most = 16 // dtype.itemsize
    storage = torch.zeros(4096, dtype=dtype)
    for batch, heads in ((1, 1), (1, 3), (2, 1), (2, 3)):
        for strides in ((96, 32), (104, 36), (98, 32), (97, 32), (96, 33), (0, 32), (0, 0)):
            tensor = storage.as_strided((batch, heads, 4, 8), (*strides, 8, 1))
            starts = [b * strides[0] + h * strides[1] for b in range(batch) for h in range(heads)]
            expected = next(a for a in (8, 4, 2, 1) if a <= most and not any(s % a for s in starts))
            assert host.alignment(tensor) == expected


COMPILER = shutil.which("gcc") or shutil.which("cc")
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """By the name of a call: its launches, and how many kernels were compiled for it."""
    if COMPILER is None or not (INCLUDE / "cuda.h").exists():
        pytest.skip("needs a C compiler and the CUDA headers that come with Triton")
    folder, here = tmp_path_factory.mktemp("driver"), Path(__file__).parent
    library = folder / "libcuda.so.1"
    build = [COMPILER, "-shared", "-fPIC", f"-I{INCLUDE}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*build, "-o", library, here / "fake_driver.c"], check=True, timeout=60)
    run = subprocess.run(
        [sys.executable, here / "fake_driver.py", folder],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = re.findall(r"(.+): (\d+) launches, (\d+) compiled", run.stdout)
    return {name: (int(launches), int(kernels)) for name, launches, kernels in lines}


def test_every_kernel_compiles_and_is_launched_as_triton_would(
    compiled: dict[str, tuple[int, int]],
) -> None:
    """`fake_driver.py` fails at the first difference."""
    assert len(compiled) == 16
    assert compiled["prop, everything"] == (5, 5)  # span, scores, sample, dense, combine
    assert compiled["prop, short way"][0] == compiled["dense, short way"][0] == 3
    assert all(launches >= 2 for launches, _ in compiled.values())


def test_lengths_compile_nothing_and_other_addresses_do(
    compiled: dict[str, tuple[int, int]],
) -> None:
    assert compiled["prop"] == (2, 2)
    assert compiled["prop, longer"] == (2, 0)
    assert compiled["prop, odd addresses"] == (2, 2)
    assert compiled["prop, one odd address"] == (2, 0)
    assert compiled["prop, rows"] == compiled["prop, rows of 32 bits"] == (2, 2)
    assert compiled["prop, again"] == (2, 0)
