"""Multi-head latent attention of one decode step, on one GPU: expanded, absorbed, sampled.

    python -m eval bench mla --out eval/bench/results

The attention of DeepSeek-V2-Lite (16 heads) and V3 (128 heads) over latents of 512 + 64 columns. Timing
is that of `bench kernels`: CUDA graphs over copies of the cache larger together than three L2 caches. A
row of the CSV is one implementation on one shape, with its share of two floors measured in the same run:
one read of the latents, and the products of absorbed dense attention at the rate of a large matrix
product. "expanded" is what Transformers runs (its own `expand_kv`, then SDPA); "with W" adds to an
absorbed kernel the two products with the up-projection, which "expanded" contains.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import triton
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from santa_hf import reference, santa_decode
from santa_hf.integration import mla

from .. import provenance
from ..cli import CommandError
from .kernels import _read, time_graph

__all__ = ["main"]

RANK, ROTARY, NOPE, VALUE = 512, 64, 128, 128
SCALING = (NOPE + ROTARY) ** -0.5
MODELS = {"DeepSeek-V3": 128, "DeepSeek-V2-Lite": 16}
BATCHES = (1, 8, 32)
CONTEXTS = (32768, 4096)
SAMPLES = (128, 512)
REPLAYS = 40
SECONDS = 0.5  # one implementation on one shape is timed for no longer, but five replays at least


class Inputs(NamedTuple):
    """One layer's decode step: the cache in one run of memory, and the query before absorption."""

    cache: torch.Tensor  # latents, then rotary keys
    query: torch.Tensor  # (B, H, 1, NOPE + ROTARY)
    absorbed: torch.Tensor  # (B, H, 1, RANK + ROTARY)
    latent: torch.Tensor  # (B, 1, N, RANK)
    rotary_key: torch.Tensor  # (B, 1, N, ROTARY)


@dataclass
class Row:
    """One line of the CSV; `speedup` is over "expanded", `peer_speedup` over the fastest other
    absorbed dense implementation."""

    gpu: str
    torch: str
    triton: str
    transformers: str
    flashinfer: str
    commit: str
    model: str
    heads: int
    batch: int
    context: int
    implementation: str
    samples: int | None
    value_rows: int | None
    us_p20: float
    us_p50: float
    us_p80: float
    terabytes_per_second: float
    share_of_byte_floor: float
    share_of_flop_floor: float
    speedup: float | None = None
    peer_speedup: float | None = None


def _inputs(heads: int, batch: int, context: int) -> list[Inputs]:
    """At least two copies that fill three L2 caches; scores have about unit variance."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16)

    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    tokens = batch * context
    copies = max(2, -(-3 * l2 // (tokens * (RANK + ROTARY) * 2)))
    inputs = []
    for _ in range(copies):
        cache = normal(tokens * (RANK + ROTARY))
        latent = cache[: tokens * RANK].view(batch, 1, context, RANK)
        rotary_key = cache[tokens * RANK :].view(batch, 1, context, ROTARY)
        absorbed = normal(batch, heads, 1, RANK + ROTARY) * (NOPE / RANK) ** 0.5
        query = normal(batch, heads, 1, NOPE + ROTARY)
        inputs.append(Inputs(cache, query, absorbed, latent, rotary_key))
    return inputs


def _module(heads: int) -> Any:
    """The attention layer of Transformers, of which `expand_kv` and its weight are used."""
    config = transformers.DeepseekV3Config(
        hidden_size=64,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=32,
        kv_lora_rank=RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROTARY,
        v_head_dim=VALUE,
    )
    config._attn_implementation = "sdpa"
    return DeepseekV3Attention(config, 0).requires_grad_(False).eval()


@cache
def _flashinfer_package() -> Any | None:
    """FlashInfer with its latent attention; None if it is not installed."""
    try:
        import flashinfer  # type: ignore[import-not-found]
        import flashinfer.mla  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flashinfer


def _flashinfer(package: Any, heads: int, batch: int, context: int) -> Callable[[Inputs], object]:
    """FlashInfer's MLA decode over pages of 64 tokens; the first call plans, and may compile."""
    page = 64

    @cache
    def planned() -> Any:
        pages = context // page
        wrapper = package.mla.BatchMLAPagedAttentionWrapper(
            torch.empty(512 << 20, dtype=torch.uint8, device="cuda"), backend="auto"
        )
        wrapper.plan(
            torch.arange(batch + 1, dtype=torch.int32, device="cuda"),
            torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages,
            torch.arange(batch * pages, dtype=torch.int32, device="cuda"),
            torch.full((batch,), context, dtype=torch.int32, device="cuda"),
            heads,
            RANK,
            ROTARY,
            page,
            False,
            SCALING,
            torch.bfloat16,
            torch.bfloat16,
        )
        return wrapper

    def call(one: Inputs) -> torch.Tensor:
        query = one.absorbed[:, :, 0]
        out: torch.Tensor = planned().run(
            query[..., :RANK],
            query[..., RANK:],
            one.latent.view(-1, page, RANK),
            one.rotary_key.view(-1, page, ROTARY),
        )
        return out.unsqueeze(2)

    return call


def _with_weights(
    module: Any, call: Callable[[Inputs], torch.Tensor]
) -> Callable[[Inputs], torch.Tensor]:
    """An absorbed implementation with the two products by which a layer is absorbed."""

    def step(one: Inputs) -> torch.Tensor:
        return mla.project(module, call(one._replace(absorbed=mla.absorb(module, one.query))))

    return step


def _expanded(module: Any) -> Callable[[Inputs], torch.Tensor]:
    """What Transformers runs."""

    def call(one: Inputs) -> torch.Tensor:
        key, value = module.expand_kv(one.latent, one.rotary_key)
        out, _ = sdpa_attention_forward(module, one.query, key, value, None, scaling=SCALING)
        return out

    return call


def _matmul(one: Inputs) -> torch.Tensor:
    """Absorbed dense attention as plain PyTorch writes it."""
    query, latent = one.absorbed[:, :, 0], one.latent[:, 0]
    scores = query[..., :RANK] @ latent.transpose(1, 2)
    scores = torch.baddbmm(scores, query[..., RANK:], one.rotary_key[:, 0].transpose(1, 2))
    weight = (scores * SCALING).softmax(-1, dtype=torch.float32).to(latent.dtype)
    return (weight @ latent).unsqueeze(2)


def _implementations(
    heads: int, batch: int, context: int
) -> Iterator[tuple[str, str, int | None, Callable[[Any], Any]]]:
    """(kind, name, samples, call) of everything that is timed."""
    position = torch.full((batch,), context - 1, device="cuda")
    visible = torch.ones(batch, 1, 1, context, dtype=torch.bool, device="cuda")

    def santa(
        estimator: str, samples: int = 1, mask: torch.Tensor | None = None
    ) -> Callable[[Inputs], torch.Tensor]:
        def call(one: Inputs) -> torch.Tensor:
            return santa_decode(
                one.absorbed,
                one.latent,
                one.latent,
                rotary_key=one.rotary_key,
                scaling=SCALING,
                estimator=estimator,
                samples=samples,
                mask=mask,
                position=position,
                kernel="prop",
            )

        return call

    module = _module(heads).to("cuda", torch.bfloat16)
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    yield "floor", "read latents", None, lambda one: _read(one.cache, out)
    yield "ours", "dense", None, santa("dense")
    package = _flashinfer_package()
    if package is not None:
        yield "peer", "flashinfer mla", None, _flashinfer(package, heads, batch, context)
    yield "peer", "matmul", None, _matmul
    for samples in SAMPLES:
        yield "ours", "prop systematic", samples, santa("systematic", samples)
    yield "ours", "dense (mask)", None, santa("dense", mask=visible)
    yield "ours", "dense, with W", None, _with_weights(module, santa("dense"))
    yield "expanded", "expanded sdpa", None, _expanded(module)


def _value_rows(one: Inputs, samples: int | None) -> int | None:
    """Distinct latents that the draws read, summed over the batch."""
    if samples is None:
        return None
    rows = 0
    for query, latent, rotary_key in zip(
        one.absorbed.split(1), one.latent.split(1), one.rotary_key.split(1), strict=True
    ):
        draws = reference.draw(
            query,
            latent,
            rotary_key=rotary_key,
            samples=samples,
            estimator="systematic",
            scaling=SCALING,
            mask=None,
            seed=0,
            layer=0,
            position=None,
        )
        rows += int(draws.rows_read(latent.shape[2]))
    return rows


def _products_per_second() -> float:
    """bfloat16 operations a second of a large matrix product."""
    inputs = [torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    times = time_graph(lambda one: one[0] @ one[1], inputs, 10)
    return 2 * 8192**3 / (statistics.median(times) * 1e-6)


def _time(call: Callable[[Any], Any], inputs: Sequence[Inputs], replays: int) -> list[float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call(inputs[0])
    start.record()
    call(inputs[1])
    end.record()
    end.synchronize()
    calls = max(len(inputs), 8)
    affordable = int(SECONDS * 1e3 / (start.elapsed_time(end) * calls))
    return time_graph(call, inputs, max(5, min(replays, affordable)))


def measure(
    model: str, batch: int, context: int, replays: int, rate: float, revision: str
) -> list[Row]:
    """Time every implementation on one shape."""
    heads = MODELS[model]
    inputs = _inputs(heads, batch, context)
    size = inputs[0].cache.numel() * 2
    flop_us = 2 * batch * heads * context * (2 * RANK + ROTARY) / rate * 1e6
    package = _flashinfer_package()
    rows: list[Row] = []
    kinds: dict[str, list[float]] = {}
    for kind, name, samples, call in _implementations(heads, batch, context):
        try:
            times = _time(call, inputs, replays)
        # Out of memory, a shape not taken, or a peer that was not built for this machine.
        except (OSError, RuntimeError, ValueError) as error:
            shape = f"{model} {batch}x{context}"
            print(f"  no row of {name}, {shape}: {error!r}"[:300], file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
            continue
        p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
        kinds.setdefault(kind, []).append(p50)
        rows.append(
            Row(
                gpu=torch.cuda.get_device_name(),
                torch=torch.__version__,
                triton=triton.__version__,
                transformers=transformers.__version__,
                flashinfer="" if package is None else package.__version__,
                commit=revision,
                model=model,
                heads=heads,
                batch=batch,
                context=context,
                implementation=name,
                samples=samples,
                value_rows=_value_rows(inputs[0], samples),
                us_p20=round(p20, 2),
                us_p50=round(p50, 2),
                us_p80=round(p80, 2),
                terabytes_per_second=round(size / p50 / 1e6, 3),
                share_of_byte_floor=round(kinds["floor"][0] / p50, 3),
                share_of_flop_floor=round(flop_us / p50, 3),
            )
        )
    for row in rows:
        if "expanded" in kinds:
            row.speedup = round(kinds["expanded"][0] / row.us_p50, 3)
        if "peer" in kinds:
            row.peer_speedup = round(min(kinds["peer"]) / row.us_p50, 3)
    return rows


def _print(rows: Sequence[Row]) -> None:
    first = rows[0]
    print(f"{first.model} H={first.heads} B={first.batch} N={first.context}")
    for row in rows:
        name = row.implementation + (f" S={row.samples}" if row.samples else "")
        print(
            f"  {name:24} {row.us_p50:9.1f} us [{row.us_p20:.1f}, {row.us_p80:.1f}] "
            f"{row.terabytes_per_second:6.2f} TB/s  bytes {row.share_of_byte_floor:5.2f}  "
            f"flops {row.share_of_flop_floor:5.2f}  {row.speedup or 0:7.1f}x expanded  "
            f"{row.peer_speedup or 0:5.2f}x peer  rows {row.value_rows}",
            flush=True,
        )


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Time over one read of the latents, a panel for each model, a line for each implementation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = plt.subplots(
        1, len(models), figsize=(4 + 3 * len(models), 4.5), sharey=True, squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        here = [row for row in rows if row.model == model]
        cases = sorted({(row.context, row.batch) for row in here})
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in here:
            label = row.implementation + (f", S={row.samples}" if row.samples else "")
            at = cases.index((row.context, row.batch))
            lines.setdefault(label, []).append((at, 1 / row.share_of_byte_floor))
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
        axes.set(yscale="log", title=f"{model}, {here[0].heads} heads")
        axes.set_xticks(range(len(cases)), [f"{n // 1024}k\nB={b}" for n, b in cases])
    panels[0][0].set_ylabel("time / one read of the latents")
    panels[0][0].legend(fontsize=7, loc="center right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(prog: str, argv: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for mla.csv and mla.png")
    parser.add_argument("--replays", type=int, default=REPLAYS)
    parser.add_argument("--commit", default=provenance.commit() or "", help="of the code that runs")
    parser.add_argument("--only", help="shapes whose 'model BxN' contains this text")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise CommandError("this benchmark needs a CUDA GPU")
    rate = _products_per_second()
    print(f"{torch.cuda.get_device_name()}: large matrix product {rate / 1e12:.0f} TFLOP/s")
    rows: list[Row] = []
    for model in MODELS:
        for context in CONTEXTS:
            for batch in BATCHES:
                if arguments.only and arguments.only not in f"{model} {batch}x{context}":
                    continue
                case = measure(model, batch, context, arguments.replays, rate, arguments.commit)
                _print(case)
                rows += case
                if arguments.out is not None:
                    _write(rows, arguments.out / "mla.csv")
                torch.cuda.empty_cache()
    if rows and arguments.out is not None:
        _plot(rows, arguments.out / "mla.png")
    if not rows:
        raise CommandError(f"--only {arguments.only!r} leaves no shape")


def _write(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
