"""Launches, told to a CUDA driver that runs nothing: what a GPU would be asked, without one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

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
    assert len(compiled) == 11
    assert compiled["prop, everything"] == (5, 5)  # span, scores, sample, dense, combine
    assert all(launches >= 2 for launches, _ in compiled.values())


def test_lengths_compile_nothing_and_other_addresses_do(
    compiled: dict[str, tuple[int, int]],
) -> None:
    assert compiled["prop"] == (2, 2)
    assert compiled["prop, longer"] == (2, 0)
    assert compiled["prop, odd addresses"] == (2, 2)
    assert compiled["prop, rows"] == compiled["prop, rows of 32 bits"] == (2, 2)
    assert compiled["prop, again"] == (2, 0)
