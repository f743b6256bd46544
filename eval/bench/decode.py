"""Milliseconds per token of `generate`, on a model of Llama-3.1-8B's shape with random weights.

    python -m eval bench decode --out eval/bench/results

Caches are filled with random keys and values instead of a prefill, so that scores are nearly flat: the
worst case for sampling. A step is timed as its user sees it, from one call of the stopping criteria to
the next, at lengths that the process has not decoded at before: cuDNN's attention, which SDPA takes on
Hopper where it has the choice, prepares anew for each. The default cache is therefore measured without
it too. A step is then taken apart by the GPU time of its kernels: products with weights, attention
(with the copies that a kernel needs, such as repeated heads), writing and copying the cache, and the
rest; `idle` is what is left of the step. Floors are the bytes that a step cannot avoid over the
bandwidth of one plain read, measured in the same run.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import gc
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
)
from transformers.utils.import_utils import is_flash_attn_2_available

import santa_hf

from .. import provenance
from ..cli import CommandError

__all__ = ["ARMS", "Arm", "Row", "main", "measure"]

LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
TINY = LLAMA | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CASES = (
    (32768, 1),
    (32768, 4),
    (32768, 8),
    (8192, 1),
    (65536, 1),
    (8192, 4),
    (65536, 4),
    (8192, 8),
)
SAMPLES = 128
FLOOR_CONTEXT = 128  # of the launch floor: a step in which attention has next to nothing to do
WARM_UP, PROFILED = 8, 4
HEAD_ROOM = 256  # slots of a static cache that stay empty


@dataclass(frozen=True)
class Arm:
    """A way to decode: the attention, what santa does, the cache, and whether SDPA may take cuDNN's."""

    attention: str
    estimator: str | None
    static: bool
    compiled: bool
    cudnn: bool = True

    @property
    def name(self) -> str:
        """For example "santa S=128, static compiled"."""
        method = {None: "", "dense": " dense"}.get(self.estimator, f" S={SAMPLES}")
        cache = "dynamic" if not self.static else "static compiled" if self.compiled else "static"
        return f"{self.attention}{method}, {cache}{'' if self.cudnn else ', no cuDNN'}"


SDPA_NO_CUDNN = Arm("sdpa", None, False, False, cudnn=False)
ARMS = (
    Arm("sdpa", None, False, False),
    SDPA_NO_CUDNN,
    Arm("santa", "dense", False, False),
    Arm("santa", "systematic", False, False),
    Arm("santa", "systematic", True, True),
    Arm("santa", "dense", True, True),
    Arm("sdpa", None, True, True),
    Arm("sdpa", None, True, False),
    Arm("flash_attention_2", None, False, False),
)
LAUNCH_FLOOR = "launch floor"
OTHER_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DEFERRED = ", deferred stop"  # a compiled arm under `santa_hf.deferred_stopping`

# Classes of kernels by their names; the first match counts.
KERNELS = {
    "attention": (
        "scores_kernel", "sample_kernel", "dense_kernel", "combine_kernel", "span_kernel", "latent",
        "flash", "fmha", "attention", "softmax", "sdpa",
    ),
    "cache": ("CatArray", "index_copy", "index_put", "copy_kernel", "direct_copy", "memcpy"),
    "weights": (
        "gemm", "gemv", "cutlass", "nvjet", "cublas", "splitk", "xmma", "_mm_", "triton_tem",
    ),
}  # fmt: skip


@dataclass
class Row:
    """One line of the CSV: one arm at one context and batch.

    Attributes:
        ms_p20, ms_p50, ms_p80: percentiles of the time of a step, one token of every sequence.
        peak_gb: most memory allocated while decoding, weights and cache included.
        floor_ms, dense_floor_ms: weights and K, and weights, K and V, read once.
        ms_weights, ms_attention, ms_cache, ms_other, ms_idle: the parts of a step.
        error: why there are no figures.
    """

    gpu: str
    torch: str
    transformers: str
    triton: str
    commit: str
    layers: int
    context: int
    batch: int
    arm: str
    steps: int
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    peak_gb: float | None = None
    floor_ms: float | None = None
    dense_floor_ms: float | None = None
    ms_weights: float | None = None
    ms_attention: float | None = None
    ms_cache: float | None = None
    ms_other: float | None = None
    ms_idle: float | None = None
    error: str = ""


class Turns:
    """Lets processes that share a GPU prepare at the same time, and measure one at a time.

    Each holds a lock on one file: shared while it uses the GPU, its own while it measures, none while it
    compiles, which takes longer than all else and needs the GPU for moments only.
    """

    def __init__(self, path: Path | None) -> None:
        self.file = path.open("w") if path else None

    def take(self, operation: int) -> None:
        """Wait for a lock of `fcntl`: LOCK_SH, LOCK_EX or LOCK_UN."""
        if self.file:
            fcntl.flock(self.file, operation)


class _Clock(StoppingCriteria):
    """Notes the time after every step, and profiles the last ones."""

    def __init__(self, steps: int, cuda: bool, turns: Turns) -> None:
        self.times: list[float] = []
        self.steps = steps
        self.turns = turns
        self.profile = profile(activities=[ProfilerActivity.CUDA]) if cuda else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        # The second call is after the step that compiled; nothing compiles later.
        turn = {1: fcntl.LOCK_UN, 2: fcntl.LOCK_SH, WARM_UP: fcntl.LOCK_EX}.get(len(self.times) + 1)
        if turn is not None:
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            self.turns.take(turn)
        self.times.append(time.perf_counter())
        if self.profile is not None:
            if len(self.times) == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
            elif len(self.times) == WARM_UP + self.steps + 1:
                torch.cuda.synchronize()
                self.profile.start()
            elif len(self.times) == WARM_UP + self.steps + 1 + PROFILED:
                torch.cuda.synchronize()
                self.profile.stop()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def milliseconds(self) -> list[float]:
        """Time of each step after the warm-up."""
        times = self.times[WARM_UP - 1 :][: self.steps + 1]
        return [(b - a) * 1e3 for a, b in pairwise(times)]

    def parts(self) -> dict[str, float]:
        """Milliseconds of GPU time per step by class of kernel.

        A kernel that was launched early and waits for the one before it counts from that one's end.
        """
        parts = dict.fromkeys((*KERNELS, "other"), 0.0)
        if self.profile is not None:
            results: Any = self.profile.profiler
            events = [
                (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
                for event in results.kineto_results.events()
                if event.device_type().name == "CUDA"
            ]
            done = 0
            for start, stop, name in sorted(events):
                parts[_class_of(name)] += max(0, stop - max(start, done)) / 1e6 / PROFILED
                done = max(done, stop)
        return parts


def _class_of(kernel: str) -> str:
    name = kernel.lower()
    for kind, words in KERNELS.items():
        if any(word.lower() in name for word in words):
            return kind
    return "other"


@dataclass
class Measured:
    """Steps of one arm.

    Attributes:
        times: milliseconds of each step, of all rounds.
        parts: milliseconds of GPU time per step by class of kernel in the last round, if any.
        peak: most bytes allocated on the GPU in the last round.
    """

    times: list[float]
    parts: dict[str, float] | None
    peak: int

    def fields(self) -> dict[str, Any]:
        """The fields of `Row` that are measured."""
        p20, p50, p80 = (statistics.quantiles(self.times, n=10)[i] for i in (1, 4, 7))
        fields: dict[str, Any] = {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80}
        if self.parts is not None:
            fields |= {f"ms_{kind}": spent for kind, spent in self.parts.items()}
            fields["ms_idle"] = max(0.0, p50 - sum(self.parts.values()))
            fields["peak_gb"] = self.peak / 1e9
        return {name: round(value, 3) for name, value in fields.items()} | {
            "steps": len(self.times)
        }


class _OwnCache(StaticCache):
    """Counts as generate's own, not as one to return: nothing here stops early and is undone."""

    _is_user_defined = property(lambda self: False, lambda self, value: None)


def build(shape: dict[str, Any], device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape with random weights, made on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.to(device).eval()


@torch.no_grad()
def _filled(model: PreTrainedModel, static: bool, batch: int, context: int) -> Cache:
    """A cache that holds `context` random tokens in every layer."""
    config = model.config
    cache = (
        _OwnCache(config=config, max_cache_len=context + HEAD_ROOM)
        if static
        else DynamicCache(config=config)
    )
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, context, head_dim)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        cache.update(key, value, layer)
    return cache


def _settle(model: PreTrainedModel, turns: Turns) -> None:
    """Decode until steps no longer get faster: the first seconds of a process load libraries."""
    times = [float("inf")]
    for _ in range(6):
        times.append(
            statistics.median(measure(model, SDPA_NO_CUDNN, 1, FLOOR_CONTEXT, 8, turns)[0].times)
        )
        if times[-1] > 0.97 * min(times[:-1]):
            break


def _free(model: PreTrainedModel) -> None:
    """Give back what the last arm held, its graphs included."""
    model.__dict__.pop("_compiled_call", None)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    model: Any, arm: Arm, batch: int, context: int, steps: int, turns: Turns | None = None
) -> list[Measured]:
    """Steps of one arm; of a compiled one a second time, under a deferred stop.

    Args:
        model: as made by `build`; its attention is set here.
        arm: how to decode.
        batch: sequences.
        context: tokens in the cache before the first step.
        steps: timed steps, at least 2.
        turns: with the other processes on this GPU, if there are any.
    """
    turns = turns or Turns(None)
    turns.take(fcntl.LOCK_SH)
    _free(model)
    model.set_attn_implementation(arm.attention)
    if arm.estimator is not None:
        santa_hf.configure(model, {"estimator": arm.estimator, "samples": SAMPLES})
    cuda = model.device.type == "cuda"
    cache = _filled(model, arm.static, batch, context)
    tokens = torch.randint(model.config.vocab_size, (batch, context + 1), device=model.device)
    measured = []
    for deferred in (False, True) if arm.compiled else (False,):
        clock = _Clock(steps, cuda, turns)
        with (
            nullcontext() if arm.cudnn else sdpa_kernel(OTHER_SDPA),
            santa_hf.deferred_stopping() if deferred else nullcontext(),
        ):
            tokens = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                max_new_tokens=WARM_UP + steps + 2 + PROFILED,
                do_sample=False,
                disable_compile=not arm.compiled,
                stopping_criteria=[clock],
            )
        parts = clock.parts() if cuda else None
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        measured.append(Measured(clock.milliseconds(), parts, peak))
    turns.take(fcntl.LOCK_UN)
    return measured


def _bandwidth() -> float:
    """Bytes per second of one plain read on the GPU."""
    from .kernels import _read, time_graph

    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    buffers = [torch.ones(2**28, dtype=torch.int32, device="cuda") for _ in range(2)]
    microseconds = statistics.median(time_graph(lambda x: _read(x, out), buffers, 10))
    return 2**30 / microseconds * 1e6


def _floors(model: Any, batch: int, context: int, bandwidth: float) -> tuple[float, float]:
    """Milliseconds to read weights and K once, and weights, K and V."""
    config = model.config
    size = model.dtype.itemsize
    weights = (
        sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    )
    key_width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    keys = config.num_hidden_layers * batch * context * key_width
    return tuple(1e3 * size * n / bandwidth for n in (weights + keys, weights + 2 * keys))  # type: ignore[return-value]


def _needed_bytes(model: PreTrainedModel, batch: int, context: int) -> float:
    """Weights, the cache with the head room of one that grows, and what a step needs beside them."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) * model.dtype.itemsize
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    layer = 2 * batch * context * width * model.dtype.itemsize
    return weights + layer * (config.num_hidden_layers * 1.125 + 2)


def _arms(
    cases: Sequence[tuple[int, int]], patterns: Sequence[str]
) -> Iterator[tuple[int, int, str, Arm]]:
    """(context, batch, name, arm) in the order in which they are measured: eager ones first, since
    compiling takes longer than all else."""

    def wanted(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    for context, batch in cases:
        for arm in ARMS:
            if wanted(arm.name) and not arm.compiled:
                yield context, batch, arm.name, arm
        if wanted(LAUNCH_FLOOR):
            yield FLOOR_CONTEXT, batch, LAUNCH_FLOOR, SDPA_NO_CUDNN
    for arm in ARMS:
        if wanted(arm.name) and arm.compiled:
            for context, batch in cases:
                yield context, batch, arm.name, arm


def _write(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of ms per token, a group for each context and batch, with the floors as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in rows if row.ms_p50 is not None and row.arm != LAUNCH_FLOOR]
    if not done:
        return
    cases = sorted({(row.context, row.batch) for row in done})
    names = [
        name
        for arm in ARMS
        for name in (arm.name, arm.name + DEFERRED)
        if any(row.arm == name for row in done)
    ]
    width = 0.85 / len(names)
    figure, axes = plt.subplots(figsize=(1.8 + 1.5 * len(cases), 4.5))
    for i, name in enumerate(names):
        bars = [(cases.index((r.context, r.batch)), r.ms_p50 or 0.0) for r in done if r.arm == name]
        axes.bar([c + i * width for c, _ in bars], [ms for _, ms in bars], width, label=name)
    for c, case in enumerate(cases):
        floor = next(r.floor_ms for r in done if (r.context, r.batch) == case)
        if floor is not None:
            ends = [c - width / 2, c + 0.85 - width / 2]
            axes.plot(ends, [floor] * 2, color="black", linewidth=1)
    axes.set_xticks([c + 0.4 for c in range(len(cases))])
    axes.set_xticklabels([f"{context // 1024}k\nB={batch}" for context, batch in cases])
    axes.set(yscale="log", ylabel="ms per token")
    axes.set_title(
        f"generate, Llama-3.1-8B shape, {rows[0].gpu}; line: weights + K once", fontsize=9
    )
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run, so that a run may measure a part only."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            values: dict[str, Any] = {}
            for f in fields(Row):
                text = line.get(f.name, "")
                if str(f.type).startswith("float"):
                    values[f.name] = float(text) if text else None
                else:
                    values[f.name] = int(text) if f.type == "int" else text
            rows.append(Row(**values))
    return rows


def _report(row: Row) -> None:
    line = f"{row.context:6} x {row.batch}  {row.arm:28}"
    if row.error:
        line += f"  {row.error}"
    else:
        line += f"  {row.ms_p50:8.2f} ms [{row.ms_p20:.2f}, {row.ms_p80:.2f}]"
    if row.peak_gb is not None:
        line += (
            f"  weights {row.ms_weights}  attention {row.ms_attention}  cache {row.ms_cache}"
            f"  other {row.ms_other}  idle {row.ms_idle}  floor {row.floor_ms}  {row.peak_gb} GB"
        )
    print(line, flush=True)


def summary(rows: Sequence[Row]) -> list[str]:
    """What the figures say, a line each: the gain of the cache and the mask path (dense, without
    santa and with it), the gain of sampling over that, and the distance to the floors."""
    lines = []
    for context, batch in sorted({(r.context, r.batch) for r in rows if r.arm != LAUNCH_FLOOR}):
        here = [r for r in rows if (r.context, r.batch) == (context, batch)]
        ms = {r.arm: r.ms_p50 for r in here if r.ms_p50}
        floor = next((r.floor_ms for r in here if r.floor_ms), None)
        launch = [r.ms_p50 for r in rows if r.arm == LAUNCH_FLOOR and r.batch == batch]
        for cache in ("dynamic", "static compiled", "static compiled" + DEFERRED):
            names = [f"{m}, {cache}" for m in ("sdpa", "santa dense", f"santa S={SAMPLES}")]
            if not all(name in ms for name in names):
                continue
            sdpa, dense, sampled = (ms[name] for name in names)
            line = (
                f"{context} x {batch}, {cache}: sdpa {sdpa:.1f} ms, {sdpa / dense:.2f}x by cache and "
                f"mask ({dense:.1f}), {dense / sampled:.2f}x by sampling ({sampled:.1f}), together "
                f"{sdpa / sampled:.2f}x"
            )
            if cache == "dynamic" and launch and launch[0]:
                line += f"; {sampled / launch[0]:.2f}x a step at {FLOOR_CONTEXT} tokens"
            elif floor:
                line += f"; {sampled / floor:.2f}x the floor ({floor:.1f})"
            lines.append(line)
    return lines


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval bench decode`."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for decode.csv, which may hold other rows")
    parser.add_argument("--cases", nargs="+", metavar="CONTEXTxBATCH", type=_case, default=CASES)
    parser.add_argument(
        "--arms", nargs="+", metavar="PATTERN", default=["*"], help='for example "santa*, static*"'
    )
    parser.add_argument("--steps", type=int, default=24, help="timed steps, default %(default)s")
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="turns of every eager arm, apart in time since hosts drift, default %(default)s",
    )
    parser.add_argument("--seconds", type=float, help="start no arm after this time")
    parser.add_argument(
        "--turns", type=Path, help="a file by which processes on one GPU take turns"
    )
    parser.add_argument("--commit", default=provenance.commit() or "", help="of the code that runs")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, also without a GPU")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error("--steps must be at least 2")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    cuda = torch.cuda.is_available()
    if not (cuda or arguments.tiny):
        raise CommandError("the model of this benchmark needs a GPU; --tiny runs without one")
    started = time.perf_counter()
    shape, dtype = (TINY, torch.float32) if arguments.tiny else (LLAMA, torch.bfloat16)
    turns = Turns(arguments.turns)
    turns.take(fcntl.LOCK_SH)
    model = build(shape, "cuda" if cuda else "cpu", dtype)
    turns.take(fcntl.LOCK_EX)
    bandwidth = _bandwidth() if cuda else None
    turns.take(fcntl.LOCK_UN)
    versions = provenance.versions(("transformers", "triton"))
    path = arguments.out / "decode.csv" if arguments.out else None
    rows = _read_rows(path) if path else []
    if bandwidth:
        print(
            f"{torch.cuda.get_device_name()}: one read at {bandwidth / 1e12:.2f} TB/s", flush=True
        )
    times: dict[tuple[int, int, str], list[float]] = {}
    plan = list(dict.fromkeys(_arms(arguments.cases, arguments.arms)))
    eager = [case for case in plan if not case[-1].compiled]
    plan = eager * (arguments.rounds - 1) + plan
    done: dict[tuple[int, int, str], int] = {}  # tokens by which the next round begins later
    if cuda and not all(arm.compiled for *_, arm in plan):
        _settle(model, turns)
    for context, batch, name, arm in plan:
        if arguments.seconds and time.perf_counter() - started > arguments.seconds:
            print(f"no time left at {context} x {batch}, {name}", file=sys.stderr)
            break
        if arm.attention == "flash_attention_2" and not is_flash_attn_2_available():
            continue
        if arm.compiled and not cuda:
            continue  # generate does not compile on a CPU
        row = Row(
            gpu=torch.cuda.get_device_name() if cuda else provenance.cpu_model(),
            torch=torch.__version__,
            transformers=versions.get("transformers", ""),
            triton=versions.get("triton", ""),
            commit=arguments.commit,
            layers=model.config.num_hidden_layers,
            context=context,
            batch=batch,
            arm=name,
            steps=arguments.steps,
        )
        if bandwidth:
            floors = _floors(model, batch, context, bandwidth)
            row.floor_ms, row.dense_floor_ms = (round(floor, 3) for floor in floors)
        found: list[Measured | None] = [None]
        if cuda and _needed_bytes(model, batch, context) > torch.cuda.mem_get_info()[1]:
            row.error = "does not fit"
        else:
            later = done.get((context, batch, name), 0)
            done[context, batch, name] = later + WARM_UP + arguments.steps + 2 + PROFILED
            try:
                found = [*measure(model, arm, batch, context + later, arguments.steps, turns)]
            except torch.OutOfMemoryError as error:
                row.error = f"out of memory: {str(error).splitlines()[0][:80]}"
        for measured, suffix in zip(found, ("", DEFERRED), strict=False):
            key = (context, batch, name + suffix)
            one = replace(row, arm=name + suffix)
            if measured is not None:
                measured.times = times[key] = times.get(key, []) + measured.times
                one = replace(one, **measured.fields())
            _report(one)
            if measured is None and key in times:
                continue  # an earlier round has figures
            rows = [r for r in rows if (r.context, r.batch, r.arm) != key] + [one]
        if path:
            _write(rows, path)
    print(*summary(rows), sep="\n")
    if path and rows:
        _plot(rows, path.with_suffix(".png"))


def _case(text: str) -> tuple[int, int]:
    context, _, batch = text.partition("x")
    if not (context.isdigit() and batch.isdigit() and int(context) and int(batch)):
        raise argparse.ArgumentTypeError(f"must be CONTEXTxBATCH, such as 32768x4, got {text!r}")
    return int(context), int(batch)
