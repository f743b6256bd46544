"""The Triton kernels against every dense decode kernel at hand, on one GPU.

    python -m eval bench kernels --out eval/bench/results

Every implementation is captured in a CUDA graph that walks over copies of K and V larger together than
three L2 caches, so that each call reads from memory as a decode step does. A row of the CSV is one
implementation on one shape: time per call over the replays (20th, 50th and 80th percentile), the bytes
it cannot avoid, its share of the floor (one read of K alone, measured in the same run), and the
speed-up over the fastest dense implementation of the run.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from santa_hf import reference, santa_decode
from santa_hf.kernels import launch

from .. import provenance
from ..cli import CommandError

__all__ = ["main"]


@dataclass(frozen=True)
class Shape:
    """Attention of one decode step."""

    model: str
    heads: int
    kv_heads: int
    dim: int
    batch: int
    context: int


LLAMA = ("Llama-3.1-8B", 32, 8, 128)
SHAPES = (
    Shape(*LLAMA, 1, 8192),
    Shape(*LLAMA, 1, 32768),
    Shape(*LLAMA, 1, 131072),
    Shape(*LLAMA, 4, 32768),
    Shape(*LLAMA, 16, 32768),
    Shape(*LLAMA, 64, 8192),
    Shape("Qwen2-7B", 28, 4, 128, 1, 32768),
    Shape("Qwen2-7B", 28, 4, 128, 16, 32768),
    Shape("SmolLM2-135M", 9, 3, 64, 1, 8192),
    Shape("SmolLM2-135M", 9, 3, 64, 16, 8192),
    Shape("MHA", 32, 32, 128, 1, 32768),
)
SCALING_CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
SAMPLES = (128, 1024)
FLASH_SAMPLES = 2048
REPLAYS = 60


@dataclass
class Row:
    """One line of the CSV."""

    gpu: str
    torch: str
    triton: str
    cudnn: str
    flashinfer: str
    commit: str
    model: str
    heads: int
    kv_heads: int
    dim: int
    batch: int
    context: int
    dtype: str
    scores: str
    implementation: str
    samples: int | None
    value_rows: int | None
    us_p20: float
    us_p50: float
    us_p80: float
    megabytes: float
    terabytes_per_second: float
    share_of_floor: float | None = None
    speedup: float | None = None


@triton.jit(do_not_specialize=["elements"])
def _read_kernel(p_x, p_out, elements: tl.int64, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Read a buffer of int32 and do as little as possible with it."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    b_any = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(BLOCKS):
        o = start + i * BLOCK + tl.arange(0, BLOCK)
        b_any = b_any | tl.load(p_x + o, mask=o < elements, other=0)
    if tl.max(b_any, axis=0) == 123456789:  # never, but the compiler cannot know
        tl.store(p_out, 1)


def _read(key: torch.Tensor, out: torch.Tensor) -> None:
    words = key.view(-1).view(torch.int32)
    block, blocks = 4096, 2
    _read_kernel[(triton.cdiv(words.numel(), block * blocks),)](
        words, out, words.numel(), BLOCK=block, BLOCKS=blocks, num_warps=8
    )


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _inputs(shape: Shape, scores: str, dtype: torch.dtype, copies: int) -> list[Inputs]:
    """Copies of (query, key, value): scores of unit variance, a nearly flat softmax ("normal"), or
    scores of twice that spread and a first key with about half of the mass ("peaked")."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda", dtype=dtype)

    inputs = []
    for _ in range(copies):
        query = normal(shape.batch, shape.heads, 1, shape.dim)
        key = normal(shape.batch, shape.kv_heads, shape.context, shape.dim)
        value = normal(shape.batch, shape.kv_heads, shape.context, shape.dim)
        if scores == "peaked":
            query *= 2.0
            # The mass of the others is N exp(2**2 / 2); the sink's score is its logarithm.
            middle = query.view(shape.batch, shape.kv_heads, -1, shape.dim).float().mean(2)
            score = middle.square().sum(-1, keepdim=True) * shape.dim**-0.5
            key[:, :, 0] = (middle * (math.log(shape.context) + 2.0) / score).to(dtype)
        inputs.append((query, key, value))
    return inputs


def _copies(shape: Shape, dtype: torch.dtype) -> int:
    """Copies of K (every implementation reads it) that fill three L2 caches, at least two."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    size = shape.batch * shape.kv_heads * shape.context * shape.dim * dtype.itemsize
    return max(2, -(-3 * l2 // size))


def time_graph(call: Callable[[Any], object], inputs: Sequence[Any], replays: int) -> list[float]:
    """Microseconds per call, one figure per replay of a graph that calls every input in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    repeats = max(1, 8 // len(inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for one in inputs:
                call(one)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (repeats * len(inputs)))
    return times


def _sdpa(backend: SDPBackend) -> Callable[[Inputs], torch.Tensor]:
    def call(inputs: Inputs) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*inputs, enable_gqa=True)

    return call


def _flashinfer(inputs: list[Inputs]) -> Callable[[Inputs], object]:
    """FlashInfer's paged decode with tensor cores; it may compile at the first call."""
    import flashinfer  # type: ignore[import-not-found]

    query, key, _ = inputs[0]
    batch, kv_heads, context, dim = key.shape
    page = 16
    pages = context // page

    @cache
    def planned() -> Any:
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(
            torch.arange(batch + 1, dtype=torch.int32) * pages,
            torch.arange(batch * pages, dtype=torch.int32, device="cuda"),
            torch.full((batch,), page, dtype=torch.int32),
            query.shape[1],
            kv_heads,
            dim,
            page,
            q_data_type=query.dtype,
            kv_data_type=key.dtype,
        )
        return wrapper

    # Random keys are random in any layout: the same memory is read as pages of (page, KVH, D).
    shape = (batch * pages, page, kv_heads, dim)

    def call(one: Inputs) -> object:
        return planned().run(one[0][:, :, 0], (one[1].view(shape), one[2].view(shape)))

    return call


def _implementations(
    shape: Shape, inputs: list[Inputs]
) -> Iterator[tuple[str, str, int | None, Callable[[Any], object]]]:
    """(kind, name, samples, call) of everything that is timed."""

    position = torch.full((shape.batch,), shape.context - 1, device="cuda")

    def santa(
        samples: int, kernel: str, estimator: str, mask: torch.Tensor | None = None
    ) -> Callable[[Inputs], torch.Tensor]:
        def call(one: Inputs) -> torch.Tensor:
            return santa_decode(
                *one,
                samples=samples,
                kernel=kernel,
                estimator=estimator,
                mask=mask,
                position=position,
            )

        return call

    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    yield "floor", "read K", None, lambda one: _read(one[1], out)
    yield "dense", "sdpa cudnn", None, _sdpa(SDPBackend.CUDNN_ATTENTION)
    yield "dense", "sdpa flash", None, _sdpa(SDPBackend.FLASH_ATTENTION)
    if importlib.util.find_spec("flashinfer"):
        yield "dense", "flashinfer paged", None, _flashinfer(inputs)
    yield "ours", "dense", None, santa(1, "prop", "dense")
    for samples in SAMPLES:
        yield "ours", "prop systematic", samples, santa(samples, "prop", "systematic")
    visible = torch.ones(shape.batch, 1, 1, shape.context, dtype=torch.bool, device="cuda")
    masked = santa(SAMPLES[0], "prop", "systematic", visible)
    yield "ours", "prop systematic (mask)", SAMPLES[0], masked
    yield "ours", "dense (mask)", None, santa(1, "prop", "dense", visible)
    yield "ours", "prop stratified", SAMPLES[0], santa(SAMPLES[0], "prop", "stratified")
    yield "ours", "prop multinomial", SAMPLES[0], santa(SAMPLES[0], "prop", "multinomial")
    if shape.context >= 32768:
        for kernel in ("flash", "prop"):
            call = santa(FLASH_SAMPLES, kernel, "systematic")
            yield "ours", f"{kernel} systematic", FLASH_SAMPLES, call


def _value_rows(inputs: Inputs, name: str, samples: int | None) -> int:
    """Distinct value rows that a call reads, summed over batch and KV heads."""
    query, key, _ = inputs
    if samples is None:
        return key.shape[0] * key.shape[1] * key.shape[2]
    kernel, estimator = name.split()[:2]
    rows = 0
    for one_query, one_key in zip(query.split(1), key.split(1), strict=True):
        draws = reference.draw(
            one_query,
            one_key,
            samples=samples,
            estimator=estimator,
            scaling=query.shape[-1] ** -0.5,
            mask=None,
            seed=0,
            layer=0,
            position=None,
            allocation="tile" if kernel == "flash" else "global",
        )
        rows += int(draws.rows_read(key.shape[2]))
    return rows


def measure(shape: Shape, scores: str, dtype: torch.dtype, replays: int, commit: str) -> list[Row]:
    """Time every implementation on one shape."""
    inputs = _inputs(shape, scores, dtype, _copies(shape, dtype))
    row_bytes = shape.dim * dtype.itemsize
    key_rows = shape.batch * shape.kv_heads * shape.context
    rows, kinds = [], []
    for kind, name, samples, call in _implementations(shape, inputs):
        try:
            times = time_graph(call, inputs, replays)
        except RuntimeError as error:  # a backend that does not take this shape
            print(f"  {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        value_rows = 0 if kind == "floor" else _value_rows(inputs[0], name, samples)
        size = (key_rows + value_rows) * row_bytes
        if name.startswith("prop"):
            # A 16-bit weight for every key and query head, with many draws a 32-bit sum of every 16.
            parts = samples is not None and samples > launch.MANY_DRAWS
            size += (9 if parts else 8) * shape.batch * shape.heads * shape.context // 4
        p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
        rows.append(
            Row(
                gpu=torch.cuda.get_device_name(),
                torch=torch.__version__,
                triton=triton.__version__,
                cudnn=str(torch.backends.cudnn.version()),
                flashinfer=provenance.versions(("flashinfer-python",)).get("flashinfer-python", ""),
                commit=commit,
                **asdict(shape),
                dtype=str(dtype).removeprefix("torch."),
                scores=scores,
                implementation=name,
                samples=samples,
                value_rows=value_rows,
                us_p20=round(p20, 2),
                us_p50=round(p50, 2),
                us_p80=round(p80, 2),
                megabytes=round(size / 1e6, 2),
                terabytes_per_second=round(size / p50 / 1e6, 3),
            )
        )
        kinds.append(kind)
    floor = next(
        (row.us_p50 for row, kind in zip(rows, kinds, strict=True) if kind == "floor"), None
    )
    dense = [row.us_p50 for row, kind in zip(rows, kinds, strict=True) if kind == "dense"]
    for row in rows:
        row.share_of_floor = round(floor / row.us_p50, 3) if floor else None
        row.speedup = round(min(dense) / row.us_p50, 3) if dense else None
    return rows


def _write(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Latency against context, one line per implementation: ours solid, dotted under a mask, the others
    dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        label = row.implementation + (f", S={row.samples}" if row.samples else "")
        lines.setdefault(label, []).append((row.context, row.us_p50))
    figure, axes = plt.subplots(figsize=(9, 4.5))
    colours = [
        plt.colormaps[name](i)
        for name, count in (("tab10", 10), ("Dark2", 8))
        for i in range(count)
    ]
    axes.set_prop_cycle(color=colours)
    for label, points in lines.items():
        ours = label.startswith(("prop", "flash sys", "dense"))
        style = ":" if "(mask)" in label else "-" if ours else "--"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="context (keys)", ylabel="microseconds per call")
    axes.set_xscale("log", base=2)
    axes.set_title(f"{rows[0].model} heads, batch {rows[0].batch}, {rows[0].gpu}", fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _print(rows: Sequence[Row]) -> None:
    first = rows[0]
    print(
        f"{first.model} H={first.heads}/{first.kv_heads} D={first.dim} B={first.batch} "
        f"N={first.context} {first.dtype} {first.scores}"
    )
    for row in rows:
        name = row.implementation + (f" S={row.samples}" if row.samples else "")
        print(
            f"  {name:26} {row.us_p50:8.1f} us [{row.us_p20:.1f}, {row.us_p80:.1f}] "
            f"{row.terabytes_per_second:6.2f} TB/s  floor {row.share_of_floor or 0:5.2f}  "
            f"{row.speedup or 0:5.2f}x  V rows {row.value_rows}",
            flush=True,
        )


def main(prog: str, argv: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for kernels.csv and the plot")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--replays", type=int, default=REPLAYS)
    parser.add_argument("--only", help="shapes whose 'model BxN' contains this text")
    parser.add_argument("--no-scaling", action="store_true", help="skip latency against context")
    parser.add_argument("--commit", default=provenance.commit() or "", help="of the code that runs")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise CommandError("this benchmark needs a CUDA GPU")
    dtype = getattr(torch, arguments.dtype)
    rows: list[Row] = []
    cases = [(shape, "normal") for shape in SHAPES]
    cases += [(shape, "peaked") for shape in SHAPES if shape.model == LLAMA[0] and shape.batch == 1]
    if not arguments.no_scaling:
        known = {(shape.batch, shape.context) for shape in SHAPES if shape.model == LLAMA[0]}
        cases += [(Shape(*LLAMA, 1, n), "normal") for n in SCALING_CONTEXTS if (1, n) not in known]
    for shape, scores in cases:
        if arguments.only and arguments.only not in f"{shape.model} {shape.batch}x{shape.context}":
            continue
        measured = measure(shape, scores, dtype, arguments.replays, arguments.commit)
        _print(measured)
        rows += measured
        if arguments.out:
            _write(rows, arguments.out / "kernels.csv")
    if arguments.out and not arguments.no_scaling:
        line = [r for r in rows if r.model == LLAMA[0] and r.batch == 1 and r.scores == "normal"]
        if line:
            _plot(line, arguments.out / "kernels.png")
