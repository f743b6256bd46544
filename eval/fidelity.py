"""Teacher-forced fidelity: how far an arm's next-token distributions are from dense on real text.

A context is prefilled once, densely; then the text's own next tokens are fed one at a time through the
decode path of every arm and seed. No answer can be right by luck or wrong by a detour, every token
counts, and a small model measures as well as a large one: the sensitive measure where scores are low.

It belongs to a run (`python -m eval run`), whose run.json says which model, arms and seeds; results are
written beside the run's own:

    fidelity/<arm name>-seed-<n>.json       one finished (arm, seed): a `Fidelity`
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from . import provenance
from .arms import DENSE, check_device, use_arm
from .cli import CommandError
from .data import VARIABLE, local_data
from .decode import Prefix, has_plain_cache
from .models import dense_attention, load
from .results import (
    WEIGHTS,
    Arm,
    Header,
    check_weights,
    load_header,
    read_json,
    write_json,
    writing,
)
from .statistics import Estimate, bootstrap

__all__ = ["Fidelity", "Passage", "Summary", "load_fidelity", "main", "measure", "summarise"]

FORMAT = 1
FOLDER = "fidelity"
# Tokens that are resampled together: neighbours in a text are not independent.
BLOCK = 32


@dataclass(frozen=True)
class Passage:
    """One arm on the continuation of one context, token by token.

    Attributes:
        sha256: of the token ids of context and continuation.
        kl: KL(dense || arm) of the next-token distributions, in nats.
        agrees: whether the likeliest token is dense's.
        nll: negative log-likelihood of the text's own token, in nats.
    """

    sha256: str
    kl: list[float]
    agrees: list[bool]
    nll: list[float]


@dataclass(frozen=True)
class Fidelity:
    """One finished (arm, seed).

    Attributes:
        format: version of this format, 1.
        arm, seed: what decoded.
        config_hash: that of the run.
        text: where the text came from.
        context: tokens prefilled before each continuation.
        passages: in order of the text.
        weights: which answered, as a result's provenance has them: "model_sha256", "adapter_sha256",
            "model_revision"; empty in older files.
    """

    format: int
    arm: Arm
    seed: int
    config_hash: str
    text: str
    context: int
    passages: list[Passage]
    weights: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """An arm over its seeds.

    Attributes:
        arm: its name.
        seeds: its seeds.
        context: tokens before each continuation.
        tokens: tokens measured for each seed.
        kl: nats per token.
        agreement: share of tokens.
        perplexity, dense_perplexity: of the text.
        dense_kl: nats per token by which dense differs from itself when it decodes the text again.
    """

    arm: str
    seeds: list[int]
    context: int
    tokens: int
    kl: Estimate
    agreement: Estimate
    perplexity: float
    dense_perplexity: float
    dense_kl: float


@torch.inference_mode()
def measure(
    model: Any,
    passages: Sequence[Sequence[int]],
    context: int,
    arms: Sequence[tuple[Arm, int]],
    *,
    dense: str,
) -> Iterator[list[Passage]]:
    """Feed passages through the decode path of every arm, one after another.

    Args:
        model: a causal language model on its device.
        passages: token ids, all of one length; decoded together.
        context: tokens of each that are prefilled; the others are fed one at a time, the first of them
            to predict the second.
        arms: (arm, seed) each.
        dense: attention implementation of the dense arm.

    Yields:
        For each arm, the passages, with a value for each token fed.
    """
    tokens = torch.tensor([list(passage) for passage in passages], device=model.device)
    fed, expected = tokens[:, context:-1], tokens[:, context + 1 :]
    hashes = [hashlib.sha256(repr(list(passage)).encode()).hexdigest() for passage in passages]
    use_arm(model, DENSE, 0, dense)
    prefix = Prefix(model, tokens[:, :context].tolist(), fed.shape[1])
    start = prefix.snapshot()

    reference = [prefix.step(model, step) for step in fed.T]
    for arm, seed in arms:
        use_arm(model, arm, seed, dense)
        kl, agrees, nll = [], [], []
        prefix.restore(start)
        for t, step in enumerate(fed.T):
            logits = prefix.step(model, step)
            truth, log_probs = (x.double().log_softmax(-1) for x in (reference[t], logits))
            kl.append((truth.exp() * (truth - log_probs)).sum(-1).clamp(min=0.0))
            agrees.append(log_probs.argmax(-1) == truth.argmax(-1))
            nll.append(-log_probs.gather(1, expected[:, t, None])[:, 0])
        columns = [torch.stack(values, 1).tolist() for values in (kl, agrees, nll)]
        yield [
            Passage(sha256, [_rounded(x) for x in k], a, [_rounded(x) for x in n])
            for sha256, k, a, n in zip(hashes, *columns, strict=True)
        ]


def _rounded(value: float) -> float:
    """Six significant digits, which keeps files small."""
    return float(f"{value:.6g}")


def cut(tokens: Sequence[int], context: int, length: int, passages: int) -> list[list[int]]:
    """Passages of `context` + `length` tokens, evenly spaced, whose last `length` do not overlap.

    Raises:
        CommandError: the text is too short for that.
    """
    span = context + length
    room = len(tokens) - span
    if room < (passages - 1) * length:
        raise CommandError(
            f"the text has {len(tokens)} tokens; {passages} passages of {context} + {length} need "
            f"{span + (passages - 1) * length}"
        )
    starts = np.linspace(0, room, passages).astype(int)
    return [list(tokens[start : start + span]) for start in starts.tolist()]


def summarise(results: Sequence[Fidelity]) -> list[Summary]:
    """Every arm but dense over its seeds, in the order given, with 95% intervals.

    Blocks of consecutive tokens are resampled, and seeds.

    Raises:
        CommandError: there is no dense result, or an arm was measured on other text.
    """
    by_arm: dict[str, list[Fidelity]] = {}
    for result in results:
        by_arm.setdefault(result.arm.name, []).append(result)
    if results and DENSE.name not in by_arm:
        raise CommandError("fidelity: no result of dense to compare with")
    summaries = []
    for name, arm in by_arm.items():
        (dense,) = by_arm[DENSE.name]
        for result in arm:
            if [p.sha256 for p in result.passages] != [p.sha256 for p in dense.passages]:
                raise CommandError(f"fidelity of {name}: not on the passages of dense")
        if name != DENSE.name:
            kl, agreement = (
                bootstrap([np.stack([_blocks(r, what) for r in arm], axis=1)], bound=None)
                for what in ("kl", "agrees")
            )
            summaries.append(
                Summary(
                    name,
                    [result.seed for result in arm],
                    dense.context,
                    sum(len(passage.kl) for passage in dense.passages),
                    kl,
                    agreement,
                    _perplexity(arm),
                    _perplexity([dense]),
                    float(np.mean(_blocks(dense, "kl"))),
                )
            )
    return summaries


def _blocks(result: Fidelity, what: str) -> np.ndarray:
    """Means over blocks of consecutive tokens; a passage's last tokens join its last block."""
    means = []
    for passage in result.passages:
        values = np.asarray(getattr(passage, what), dtype=float)
        count = max(1, len(values) // BLOCK)
        means += [block.mean() for block in np.array_split(values, count)]
    return np.array(means)


def _perplexity(results: Sequence[Fidelity]) -> float:
    return math.exp(np.mean([np.concatenate([p.nll for p in r.passages]) for r in results]))


def load_fidelity(run: Path, header: Header) -> list[Fidelity]:
    """The fidelity results of a run, arms in its header's order; none if it was not measured.

    Raises:
        CommandError: a file is corrupt, of another run or of other weights; the message names it.
    """
    found = []
    # Of weights that neither the run nor an earlier file says, a file's own are the first to be known.
    known = {name: header.provenance[name] for name in WEIGHTS if name in header.provenance}
    for path in sorted((run / FOLDER).glob("*-seed-*.json")):
        result: Fidelity = read_json(Fidelity, path)
        if result.format != FORMAT:
            raise CommandError(f"{path}: format {result.format}; this version reads {FORMAT}")
        if result.config_hash != header.config_hash:
            raise CommandError(f"{path}: a result of another configuration")
        if header.arms.get(result.arm.name) != result.arm or path != _path(run, result):
            raise CommandError(f"{path}: arm {result.arm.name!r} is not that of run.json")
        for name, value in result.weights.items():
            if known.setdefault(name, value) != value:
                raise CommandError(
                    f"{path}: {name} is {value}, elsewhere in the run {known[name]}: the weights "
                    "changed between them"
                )
        found.append(result)
    order = list(header.arms)
    return sorted(found, key=lambda result: (order.index(result.arm.name), result.seed))


def _path(run: Path, result: Fidelity) -> Path:
    return run / FOLDER / f"{result.arm.name}-seed-{result.seed}.json"


def table(summaries: Sequence[Summary]) -> str:
    """Summaries as text, one line each."""
    head = ["arm", "seeds", "tokens", "KL, nats per token [95%]", "same top token", "perplexity"]
    lines = [head]
    for s in summaries:
        kl = f"{decimal(s.kl.value)} [{decimal(s.kl.low)}, {decimal(s.kl.high)}]"
        lines.append(
            [
                s.arm,
                str(len(s.seeds)),
                str(s.tokens),
                kl,
                f"{s.agreement.value:.2%}",
                f"{s.perplexity:.3f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    if summaries:
        text.append(
            f"dense: perplexity {summaries[0].dense_perplexity:.3f}; decoded again, KL "
            f"{decimal(summaries[0].dense_kl)}"
        )
    return "\n".join(text)


def decimal(value: float) -> str:
    """A number in plain decimals, to three significant digits but no more than seven places."""
    if abs(value) < 5e-8:
        return "0"
    places = min(7, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{places}f}"


def _text(path: Path | None) -> tuple[str, str]:
    """The text to follow, and what it is."""
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{path}: {error}") from error
        return text, f"{path.name}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    import datasets

    try:
        with local_data():
            essays = datasets.load_dataset("baber/paul_graham_essays", split="train")["text"]
    except (OSError, ValueError) as error:
        raise CommandError(
            f"the essays of RULER's haystacks cannot be loaded: {error}; give another text by --text, "
            f"or a directory of copies by {VARIABLE}"
        ) from error
    text = "\n\n".join(essays)
    return text, f"RULER's essays, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _arguments(prog: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", type=Path, help="directory of a run; its run.json names model, arms and seeds")
    add("--text", type=Path, help="UTF-8 file; default: the essays of RULER's haystacks")
    add("--context", type=int, default=4096, help="tokens prefilled, default: %(default)s")
    add("--tokens", type=int, default=256, help="measured in each passage, default: %(default)s")
    add("--passages", type=int, default=8, help="default: %(default)s")
    add("--batch-size", type=int, default=4, help="passages decoded together, default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    for name in ("context", "tokens", "passages", "batch_size"):
        if getattr(arguments, name) < 1:
            raise CommandError(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval fidelity`."""
    arguments = _arguments(prog, argv)
    run = arguments.run
    header = load_header(run)
    done = load_fidelity(run, header)
    text, source = _text(arguments.text)
    wanted = [
        (arm, seed)
        for arm in header.arms.values()
        for seed in ([0] if arm.deterministic else header.seeds)
    ]
    finished = {(result.arm.name, result.seed) for result in done}
    missing = [(arm, seed) for arm, seed in wanted if (arm.name, seed) not in finished]
    other = next((r for r in done if (r.text, r.context) != (source, arguments.context)), None)
    if other is not None:
        raise CommandError(
            f"{_path(run, other)}: measured on {other.text} after {other.context} tokens; remove "
            f"{run / FOLDER} to measure on another text"
        )
    if missing:
        _check_device(arguments.device, [arm for arm, _ in missing])
        with writing(run / FOLDER):
            (run / FOLDER).mkdir(exist_ok=True)
        weights = next((result.weights for result in done if result.weights), {})
        header = replace(header, provenance=weights | header.provenance)
        _measure_all(arguments, header, text, source, missing)
    print(table(summarise(load_fidelity(run, header))))


def _check_device(device: str, arms: Sequence[Arm]) -> None:
    """Refuse a device, or an arm that cannot run on it, before a model is loaded."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise CommandError(f"--device {device} cannot be used: {error}") from error
    for arm in arms:
        try:
            check_device(arm, device)
        except ValueError as error:
            raise CommandError(str(error)) from error


def _revision(header: Header) -> dict[str, Any]:
    return {"revision": header.model["revision"]} if header.model.get("revision") else {}


def _load(header: Header, device: str) -> Any:
    """The model of a run on a device, its adapter merged."""
    dtype = header.model.get("dtype") or "auto"
    try:
        model: Any = load(
            header.model["name"],
            header.model.get("adapter"),
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            model_config=header.model.get("model_config"),
            **_revision(header),
        )
    except (OSError, ValueError) as error:
        raise CommandError(f"{header.model['name']} cannot be loaded: {error}") from error
    return model.to(device).eval()


def _measure_all(
    arguments: argparse.Namespace,
    header: Header,
    text: str,
    source: str,
    missing: Sequence[tuple[Arm, int]],
) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(header.model["name"], **_revision(header))
    except (OSError, ValueError) as error:
        raise CommandError(f"{header.model['name']} has no tokenizer: {error}") from error
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    # One more token is fed than is measured: it predicts the first of those.
    passages = cut(tokens, arguments.context, arguments.tokens + 1, arguments.passages)
    weights = provenance.weights(header.model)
    check_weights(arguments.run, header, weights)
    model = _load(header, arguments.device)
    weights["model_revision"] = getattr(model.config, "_commit_hash", None)
    check_weights(arguments.run, header, weights)
    dense = dense_attention(model)
    # Layers that keep a window or a state of their own take one passage at a time.
    size = arguments.batch_size if has_plain_cache(model) else 1
    parts = [passages[i : i + size] for i in range(0, len(passages), size)]
    found: list[list[Passage]] = [[] for _ in missing]
    with tqdm(total=len(parts) * len(missing), unit="arm", disable=arguments.quiet) as bar:
        for part in parts:
            measured = measure(model, part, arguments.context, missing, dense=dense)
            for (arm, seed), whole, new in zip(missing, found, measured, strict=True):
                whole += new
                if part is parts[-1]:
                    result = Fidelity(
                        format=FORMAT,
                        arm=arm,
                        seed=seed,
                        config_hash=header.config_hash,
                        text=source,
                        context=arguments.context,
                        passages=whole,
                        weights=weights,
                    )
                    path = _path(arguments.run, result)
                    with writing(path):
                        write_json(path, asdict(result))
                bar.update()
