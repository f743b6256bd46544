"""The PyTorch path on a CPU against SDPA, on the attention of one Llama-3.1-8B decode step.

    python -m eval bench reference --out eval/bench/results

Three implementations of one query per head over N keys: santa (systematic, S draws), SDPA on queries
grouped by KV head (the fastest dense form in PyTorch), and SDPA with enable_gqa=True (the call that
Transformers makes). They take turns, call by call, on copies of K and V that no cache holds together,
so a change in the load of the machine falls on all three. Inputs are random normal: a nearly flat
softmax, the worst case for sampling. Extra memory is what PyTorch allocates at most at one time during
a call.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from santa_hf import santa_decode

from .. import provenance

__all__ = ["Row", "main", "measure"]

HEADS, KV_HEADS, DIM = 32, 8, 128
LENGTHS = (8192, 32768)
DTYPES = ("float32", "bfloat16")
# santa over each, at the longest context.
TARGETS = {"sdpa grouped": 1.3, "sdpa enable_gqa": 5.0}
_COPIES_BYTES = 2**29

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Row:
    """One line of the CSV: one implementation on one shape.

    Attributes:
        ms_p20, ms_p50, ms_p80: percentiles of the time of a call.
        extra_megabytes: peak memory beyond the inputs.
        speedup_of_santa: its median time over santa's.
    """

    cpu: str
    threads: int
    torch: str
    santa_hf: str
    heads: int
    kv_heads: int
    dim: int
    context: int
    dtype: str
    implementation: str
    samples: int | None
    calls: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    extra_megabytes: float
    speedup_of_santa: float


def _inputs(length: int, dtype: torch.dtype) -> list[Inputs]:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, DIM, generator=generator).to(dtype)

    size = 2 * KV_HEADS * length * DIM * dtype.itemsize
    copies = max(2, -(-_COPIES_BYTES // size))
    return [
        (normal(HEADS, 1), normal(KV_HEADS, length), normal(KV_HEADS, length))
        for _ in range(copies)
    ]


def _implementations(samples: int) -> dict[str, Callable[..., torch.Tensor]]:
    def santa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return santa_decode(query, key, value, samples=samples, kernel="reference")

    def grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows = query.view(1, KV_HEADS, HEADS // KV_HEADS, DIM)
        return scaled_dot_product_attention(rows, key, value).view(1, HEADS, 1, DIM)

    def enable_gqa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return {"santa": santa, "sdpa grouped": grouped, "sdpa enable_gqa": enable_gqa}


def _extra_bytes(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@torch.inference_mode()
def measure(length: int, dtype: str, samples: int, calls: int) -> list[Row]:
    """Time the three implementations in turns at one context length and dtype.

    Args:
        length: number of keys.
        dtype: "float32" or "bfloat16".
        samples: draws per query head.
        calls: timed calls of each implementation, after two untimed ones; at least 2.
    """
    inputs = _inputs(length, getattr(torch, dtype))
    implementations = _implementations(samples)
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    turns = cycle(inputs)  # no call finds what the one before it has just read
    for i in range(calls + 2):
        for name, call in implementations.items():
            started = time.perf_counter()
            call(*next(turns))
            elapsed = time.perf_counter() - started
            if i >= 2:
                seconds[name].append(elapsed)
    rows = []
    for name, call in implementations.items():
        p20, _, _, p80 = statistics.quantiles(seconds[name], n=5)
        p50 = statistics.median(seconds[name])
        rows.append(
            Row(
                cpu=provenance.cpu_model(),
                threads=torch.get_num_threads(),
                torch=torch.__version__,
                santa_hf=provenance.commit() or "",
                heads=HEADS,
                kv_heads=KV_HEADS,
                dim=DIM,
                context=length,
                dtype=dtype,
                implementation=name,
                samples=samples if name == "santa" else None,
                calls=calls,
                ms_p20=round(p20 * 1e3, 3),
                ms_p50=round(p50 * 1e3, 3),
                ms_p80=round(p80 * 1e3, 3),
                extra_megabytes=round(_extra_bytes(lambda: call(*inputs[0])) / 1e6, 3),  # noqa: B023
                speedup_of_santa=round(p50 / statistics.median(seconds["santa"]), 2),
            )
        )
    return rows


def _print(rows: Sequence[Row]) -> None:
    first = rows[0]
    print(f"N={first.context} {first.dtype}, {first.threads} threads, {first.cpu}")
    for row in rows:
        name = row.implementation + (f" S={row.samples}" if row.samples else "")
        line = (
            f"  {name:16} {row.ms_p50:8.2f} ms [{row.ms_p20:.2f}, {row.ms_p80:.2f}]"
            f"  extra {row.extra_megabytes:6.2f} MB"
        )
        if row.implementation in TARGETS:
            line += f"  santa is {row.speedup_of_santa:.2f}x as fast"
            if row.context == max(LENGTHS):
                target = TARGETS[row.implementation]
                verdict = "met" if row.speedup_of_santa >= target else "missed"
                line += f" (target {target}x: {verdict})"
        print(line, flush=True)


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval bench reference`."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for reference.csv")
    parser.add_argument("--samples", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--calls", type=int, default=30, help="timed calls of each, at least 2")
    arguments = parser.parse_args(argv)
    if arguments.calls < 2:
        parser.error("--calls must be at least 2")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its own start
    rows: list[Row] = []
    for length in arguments.lengths:
        for dtype in DTYPES:
            measured = measure(length, dtype, arguments.samples, arguments.calls)
            _print(measured)
            rows += measured
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "reference.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
