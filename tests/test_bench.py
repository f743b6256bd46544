"""The benchmark of decoding on a tiny model: every arm that runs without a GPU, resumed from its CSV;
and of that of latent attention, what needs none."""

from __future__ import annotations

import csv
import fcntl
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from eval.bench import decode
from eval.cli import CommandError

CPU_ARMS = [arm.name for arm in decode.ARMS if not arm.compiled and "flash" not in arm.name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has more arms")
def test_decode_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--tiny", "--steps", "3", "--out", str(tmp_path)]
    decode.main(
        "bench decode", [*arguments, "--cases", "150x2", "--arms", "santa*", "launch floor"]
    )
    decode.main(
        "bench decode", [*arguments, "--cases", "150x2", "--arms", "sdpa*", "--rounds", "2"]
    )
    rows = decode._read_rows(tmp_path / "decode.csv")
    assert sorted(row.arm for row in rows) == sorted([*CPU_ARMS, decode.LAUNCH_FLOOR])
    assert all(row.steps == (6 if row.arm.startswith("sdpa") else 3) for row in rows)
    assert all(row.ms_p20 <= row.ms_p50 <= row.ms_p80 for row in rows)  # type: ignore[operator]
    assert {row.context for row in rows} == {150, decode.FLOOR_CONTEXT}
    assert (tmp_path / "decode.png").stat().st_size > 1000
    ms = {row.arm: row.ms_p50 for row in rows}
    (line,) = decode.summary(rows)
    assert line.startswith("150 x 2, dynamic: sdpa ")
    gain = ms["sdpa, dynamic"] / ms["santa S=128, dynamic"]  # type: ignore[operator]
    assert f"together {gain:.2f}x" in line


def test_a_compiled_arm_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over one cache, with one compilation: as it is, and stopping late. (A CPU does not compile.)"""
    model = decode.build(decode.TINY, "cpu", torch.float32)
    arm = next(arm for arm in decode.ARMS if arm.compiled and arm.estimator)
    filled, make = [], decode._filled
    monkeypatch.setattr(decode, "_filled", lambda *args: filled.append(make(*args)) or filled[-1])
    waiting, deferred = decode.measure(model, arm, 2, 150, 3)
    assert waiting.fields().keys() == {"steps", "ms_p20", "ms_p50", "ms_p80"}
    assert waiting.times != deferred.times
    assert len(waiting.times) == len(deferred.times) == 3
    (cache,) = filled
    steps = decode.WARM_UP + 3 + 2 + decode.PROFILED
    assert cache.get_seq_length() == 150 + 2 * steps
    assert cache.get_seq_length() <= cache.layers[0].keys.shape[2]


def test_rounds_never_meet_a_length_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At which cuDNN has prepared for it."""
    measured: list[tuple[Any, ...]] = []
    generate = LlamaForCausalLM.generate

    def recorded(model: Any, tokens: torch.Tensor, **others: Any) -> Any:
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        measured.append((model.config._attn_implementation, cudnn, *tokens.shape))
        return generate(model, tokens, **others)

    monkeypatch.setattr(LlamaForCausalLM, "generate", recorded)
    arguments = ["--tiny", "--steps", "2", "--rounds", "3", "--cases", "150x2", "150x1"]
    decode.main("bench decode", [*arguments, "--arms", "santa dense, dynamic", "sdpa, dynamic*"])
    each = decode.WARM_UP + 2 + 2 + decode.PROFILED
    for batch in (1, 2):
        for arm in (("santa", True), ("sdpa", True), ("sdpa", False)):
            tokens = [n for *one, b, n in measured if (tuple(one), b) == (arm, batch)]
            assert tokens == [151, 151 + each, 151 + 2 * each]


def test_kernels_are_told_apart() -> None:
    for name, kind in {
        "scores_kernel": "attention",
        "dense_kernel": "attention",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy": "cache",
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "weights",
        "gemv2T_kernel_val": "weights",
        "triton_red_fused_add_mean_mul_pow_rsqrt_0": "other",
        "pytorch_flash::flash_fwd_splitkv_kernel": "attention",
    }.items():
        assert decode._class_of(name) == kind, name


def test_kernels_that_wait_are_not_counted_twice() -> None:
    """(name, start, stop) in ns: the second is launched early and waits for the first."""
    spans = [("sgemm", 0, 100), ("scores_kernel", 60, 140), ("index_copy_kernel", 200, 230)]
    events = [
        SimpleNamespace(
            name=lambda name=name: name,
            start_ns=lambda start=start: start,
            duration_ns=lambda length=stop - start: length,
            device_type=lambda: SimpleNamespace(name="CUDA"),
        )
        for name, start, stop in reversed(spans)
    ]
    clock = decode._Clock(2, cuda=False, turns=decode.Turns(None))
    results = SimpleNamespace(events=lambda: events)
    clock.profile = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))  # type: ignore[assignment]
    parts = {kind: ms * 1e6 * decode.PROFILED for kind, ms in clock.parts().items()}
    assert parts == pytest.approx({"weights": 100, "attention": 40, "cache": 30, "other": 0})


def test_processes_take_turns(tmp_path: Path) -> None:
    """One that measures waits for those that use the GPU, and they for it; compiling disturbs nobody."""
    lock = tmp_path / "turns"
    mine, other = decode.Turns(lock), decode.Turns(lock)
    now = fcntl.LOCK_NB
    other.take(fcntl.LOCK_SH)
    mine.take(fcntl.LOCK_SH | now)
    with pytest.raises(BlockingIOError):
        mine.take(fcntl.LOCK_EX | now)
    other.take(fcntl.LOCK_UN)
    mine.take(fcntl.LOCK_EX | now)
    with pytest.raises(BlockingIOError):
        other.take(fcntl.LOCK_SH | now)

    class Recorded(decode.Turns):
        def take(self, operation: int) -> None:
            taken.append((len(clock.times), operation))

    taken: list[tuple[int, int]] = []
    clock = decode._Clock(2, cuda=False, turns=Recorded(None))
    for _ in range(decode.WARM_UP + 3):
        clock(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))
    expected = [(0, fcntl.LOCK_UN), (1, fcntl.LOCK_SH), (decode.WARM_UP - 1, fcntl.LOCK_EX)]
    assert taken == expected


@pytest.mark.parametrize("case", ["32768", "0x1", "axb", "-1x2"])
def test_a_bad_case_is_refused(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decode.main("bench decode", [f"--cases={case}"])
    assert "must be CONTEXTxBATCH" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(CommandError, match="needs a GPU"):
        decode.main("bench decode", [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_latent_attention_needs_a_gpu() -> None:
    mla = pytest.importorskip("eval.bench.mla")
    with pytest.raises(CommandError, match="needs a CUDA GPU"):
        mla.main("bench mla", [])


def test_the_products_with_w_are_those_of_the_expansion() -> None:
    mla = pytest.importorskip("eval.bench.mla")
    module = mla._module(3)
    torch.nn.init.normal_(module.kv_b_proj.weight, std=0.05)
    latent, rotary_key = torch.randn(2, 1, 50, mla.RANK), torch.randn(2, 1, 50, mla.ROTARY)
    query = torch.randn(2, 3, 1, mla.NOPE + mla.ROTARY)
    one = mla.Inputs(torch.empty(0), query, torch.empty(0), latent, rotary_key)
    out = mla._with_weights(module, mla._matmul)(one).transpose(1, 2)
    expected = mla._expanded(module)(one)
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_latent_attention_are_written_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mla = pytest.importorskip("eval.bench.mla")
    columns = [field.name for field in fields(mla.Row)]
    shipped = Path(mla.__file__).parent / "results" / "mla.csv"
    with shipped.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == columns
    rows = []
    for line in lines:
        row = mla.Row(**line)
        row.batch, row.context = int(row.batch), int(row.context)
        row.share_of_byte_floor = float(row.share_of_byte_floor)
        rows.append(row)
    mla._write(rows, tmp_path / "mla.csv")
    with (tmp_path / "mla.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["implementation"] == lines[0]["implementation"]
    mla._plot(rows, tmp_path / "mla.png")
    assert (tmp_path / "mla.png").stat().st_size > 1000
