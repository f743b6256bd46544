"""The processes that share a run, as `accelerate launch` or `torchrun` started them."""

from __future__ import annotations

import datetime

import torch
from accelerate import PartialState

__all__ = ["device_name", "processes"]

# The first processes to finish a result wait for the last, which may take longer than the default.
_PATIENCE = datetime.timedelta(days=7)


def device_name(device: str | None) -> str:
    """What to run on: `device` if given, else a GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def processes(device: str | None = None) -> PartialState:
    """The processes of this job, ranked over all its machines; one alone if nothing launched several.

    Has to be called before anything else of accelerate, which would take processes without a GPU for
    unrelated ones. Later calls give the same processes.
    """
    return PartialState(cpu=device_name(device) == "cpu", timeout=_PATIENCE)
