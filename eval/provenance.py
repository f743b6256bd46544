"""Where a figure comes from: machine, versions and commit, stored beside every result."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["WEIGHT_HASHES", "commit", "cpu_model", "versions", "weights"]

WEIGHT_HASHES = ("model_sha256", "adapter_sha256")  # what `weights` gives


def cpu_model() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python, PyTorch and the packages named; those not installed are left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout, with "+" if tracked files differ from it; None outside of one."""
    here = Path(__file__).parent
    try:
        head = ["git", "rev-parse", "HEAD"]
        name = subprocess.run(head, cwd=here, capture_output=True, text=True, check=True).stdout
        clean = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.strip() + ("" if clean else "+")


def weights(model: Mapping[str, Any]) -> dict[str, str | None]:
    """Hashes of the weights in the local directories that a run's `model` names."""
    hashes = (_weights_hash(model["name"]), _weights_hash(model.get("adapter")))
    return dict(zip(WEIGHT_HASHES, hashes, strict=True))


def _weights_hash(directory: str | None) -> str | None:
    """Hash of the weights in a local directory; None for a name on the hub."""
    if directory is None or not Path(directory).is_dir():
        return None
    files = sorted(Path(directory).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest() if files else None
