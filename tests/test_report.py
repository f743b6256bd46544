"""The report: self-contained, complete, escaped, and legible in a browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import charts, fidelity, report
from eval.cli import CommandError
from eval.compare import compare, points
from eval.results import load_header, result_path, write_json
from tests import runs

ARMS = [
    runs.santa(128, estimator="systematic", kernel="auto"),
    runs.santa(8, estimator="systematic", kernel="auto"),
    dataclasses.replace(runs.santa(8, estimator="multinomial"), name="multinomial-8"),
    runs.top_k(32),
]
IN_ORDER = ["santa-8", "santa-128", "multinomial-8", "top-32"]
LOSSES = {"santa-8": 0.1, "santa-128": 0.002, "multinomial-8": 0.2, "top-32": 0.3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = [
        (runs.task(name, group="ruler"), runs.flipped(200, accuracy, LOSSES, seed=i))
        for i, (name, accuracy) in enumerate(
            {"niah_single_1": 1.0, "ruler_vt": 0.8, "ruler_qa_squad": 0.1}.items()
        )
    ]
    header, results = runs.finished(tasks, ARMS)
    directory = runs.save(tmp_path_factory.mktemp("runs") / "ruler-32k", header, results)
    for arm in header.arms.values():
        samples = {"dense": 0}.get(arm.name, (arm.config or {}).get("samples", 32))
        rng = np.random.default_rng(samples)
        passages = [
            fidelity.Passage(
                f"{i}",
                (rng.random(64) / samples if samples else np.zeros(64)).tolist(),
                [True] * 64,
                [2.0] * 64,
            )
            for i in range(2)
        ]
        for seed in [0] if arm.deterministic else header.seeds:
            weights = {"model_sha256": "00"}
            one = fidelity.Fidelity(
                1, arm, seed, header.config_hash, "text", 32768, passages, weights
            )
            write_json(fidelity._path(directory, one), dataclasses.asdict(one))
    return directory


@pytest.fixture(scope="module")
def evaluation(run: Path) -> report.Evaluation:
    return report.read(run, margin=0.02, confidence=0.95)


class _Page(HTMLParser):
    """Checks nesting; keeps text, and every address that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href")]
        assert tag not in ("script", "link", "iframe", "img")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_needs_nothing_beside_itself(evaluation: report.Evaluation) -> None:
    page = report.html([evaluation])
    parsed = _Page(page)
    assert parsed.open == []
    assert parsed.addresses == []
    assert not re.search(r"https?://|url\(|@import", page)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S).lower().split("prov")[0]


def test_every_comparison_is_in_page_and_markdown(evaluation: report.Evaluation) -> None:
    page, markdown = _Page(report.html([evaluation])).text, report.markdown([evaluation])
    # Three tasks, their group, and the group above the floor; four arms on each.
    assert len(evaluation.comparisons) == 5 * 4
    for row in evaluation.comparisons:
        for text in (page, markdown):
            assert points(row.difference) in text
            assert row.title in text
    for text in (page, markdown):
        assert "no verdict: dense is near the floor on 1 of its 3 tasks" in text
        assert "KL(dense" in text
        assert evaluation.header.config_hash in text
        assert re.search(r"version: lm-eval( \| )?0\.4\.13", text)
    rows = [line for line in markdown.splitlines() if line.startswith("| santa-8 ")]
    assert len(rows) == 5 + 1 + 1  # scores, fidelity, arms
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("| santa-8 |")}
    heads = {line.count("|") for line in markdown.splitlines() if line.startswith("| arm |")}
    assert widths == heads


def test_settings_name_no_seed_beside_the_seeds(evaluation: report.Evaluation) -> None:
    arms = {**evaluation.header.arms, "santa-8": runs.santa(8, seed=7)}
    header = dataclasses.replace(evaluation.header, arms=arms)
    markdown = report.markdown([dataclasses.replace(evaluation, header=header)])
    assert "| santa-8 | santa | samples=8 | 0, 1, 2 |" in markdown


def test_a_card_leads_with_the_group(evaluation: report.Evaluation) -> None:
    cards = report.html([evaluation]).split('<div class="card">')[1:]
    for arm, card in zip(IN_ORDER, cards, strict=True):
        lines = [re.sub("<[^>]*>", "", line) for line in card.split("</p>")]
        assert lines[0].startswith(arm)
        groups = [r for r in evaluation.comparisons if r.arm == arm and len(r.tasks) > 1]
        assert len(groups) == 2
        for row, line in zip(groups, lines, strict=False):
            verdict = row.verdict if row.reason is None else "no verdict"
            assert row.task in line
            assert verdict in line
            assert (row.reason or "") in line
            assert points(row.difference) in line


def test_charts_hold_every_arm(evaluation: report.Evaluation) -> None:
    page = report.html([evaluation])
    figures = re.findall(r"<figure>(.*?)</figure>", page, flags=re.S)
    forests = [f for f in figures if "points against dense</text>" in f and "polyline" not in f]
    assert len(figures) == 4 + 5 + 5 + 2 + 2
    assert [re.search(r'class="title"[^>]*>([^<]*)', f)[1] for f in forests[:4]] == IN_ORDER  # type: ignore[index]
    for arm in ARMS:
        assert sum(f">{arm.name}:" in figure for figure in figures) == 5 + 5 + 2
        assert sum(f">{arm.name}, " in figure for figure in figures) == 2
    # Bars are the difference's interval around dense, as far as there are such scores.
    for row in evaluation.comparisons:
        ends = (row.dense + d for d in (row.difference.low, row.difference.high))
        low, high = (100 * min(max(end, 0), 1) for end in ends)
        shown = f"<title>{row.arm}: {100 * row.score:.4g} [{low:.4g}, {high:.4g}]</title>"
        assert page.count(shown) >= 2
    # One interval for each task in each arm's panel, coloured by its verdict.
    panels = [f for f in forests if 'class="band"' in f]
    assert [len(re.findall(r'class="bar"', panel)) for panel in panels] == [5] * 4
    verdicts = [row.verdict for row in evaluation.comparisons if row.arm == "top-32"]
    assert re.findall(r'<g class="([\w-]+)">', panels[3]) == verdicts
    # All on one axis: zero and the margin stand at the same place.
    for kind in ("zero", "reference"):
        assert len({re.findall(rf'class="{kind}" d="M([\d.]+)', panel)[0] for panel in panels}) == 1


def test_arms_stand_by_family_and_samples(run: Path, evaluation: report.Evaluation) -> None:
    # The suite's order is another.
    assert list(load_header(run).arms)[1:] == [arm.name for arm in ARMS]
    assert [arm.name for arm in ARMS] != IN_ORDER
    table = report.markdown([evaluation]).split("### Fidelity")[0]
    names = [line.split(" | ")[0][2:] for line in table.splitlines() if line.startswith("| ")]
    assert [name for name in names if name in IN_ORDER] == IN_ORDER * 5


def test_speed_is_that_of_the_decode_steps(run: Path, evaluation: report.Evaluation) -> None:
    speeds = {arm.name: 100.0 * (i + 2) for i, arm in enumerate(ARMS)} | {"dense": 8800.0}
    found = [
        dataclasses.replace(
            one, seconds=one.tokens / speeds[one.arm.name], batch_size=8 if one.seed else 40
        )
        for one in evaluation.results
    ]
    rows = compare(evaluation.header, found)
    changed = dataclasses.replace(evaluation, results=found, comparisons=rows)
    page, markdown = report.html([changed]), report.markdown([changed])
    for arm in ARMS:
        assert f"| {speeds[arm.name]:,.0f} (8,800) |" in markdown
        assert f">{arm.name}, {speeds[arm.name]:,.0f} tokens/s: " in page
    latency = [f for f in page.split("<figure>") if "tokens per second" in f]
    for figure in latency:
        assert ">dense, 8,800 tokens/s: 0 [0, 0]</title>" in figure
        labels = re.findall(
            r'class="tick" x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]*)', figure
        )
        assert "5,000" in [text for _, text in labels]
        for (x, text), (after, beside) in itertools.pairwise(labels):
            assert float(x) + 3 * len(text) < float(after) - 3 * len(beside)
    for text in (_Page(page).text, markdown):
        assert "tokens/s (dense)" in text
        assert "over batches of at most 8 to 40 documents" in text
        assert "Dense is the model's own SDPA" in text
        assert "steps/s" not in text


def test_fallbacks_are_in_page_and_markdown(evaluation: report.Evaluation) -> None:
    assert "| fallbacks to dense | none |" in report.markdown([evaluation])
    found = [
        dataclasses.replace(
            one, counters=dataclasses.replace(one.counters, fallbacks={"short context": i})
        )
        for i, one in enumerate(evaluation.results[:4])
    ]
    changed = dataclasses.replace(evaluation, results=found)
    assert "| fallbacks to dense | short context 6 |" in report.markdown([changed])
    assert 'fallbacks to dense</td><td class="">short context 6<' in report.html([changed])


def test_provenance_is_that_of_all_results(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = result_path(tmp_path / "run", "ruler_vt-32768", "santa-8", 2)
    values = json.loads(path.read_text())
    values["provenance"] |= {
        "device": "another",
        "commit": "4567",
        "versions": {"torch": "2.14.0", "lm-eval": "0.4.13"},
        "date": "2026-02-03T00:00:00+00:00",
    }
    path.write_text(json.dumps(values | {"processes": 2}))
    markdown = report.markdown([report.read(tmp_path / "run", margin=0.02, confidence=0.95)])
    for row in (
        "| device | a machine (32), another (1) results |",
        "| commit | 0123abcd (32), 4567 (1) results |",
        "| version: torch | 2.13.0 (32), 2.14.0 (1) results |",
        "| version: lm-eval | 0.4.13 |",
        "| processes | 1 (32), 2 (1) results |",
        "| documents decoded together, at most | 1 |",
        "| finished | 2026-01-01T00:00:00+00:00 to 2026-02-03T00:00:00+00:00 |",
    ):
        assert row in markdown
    assert "**Results were made with different devices a machine (32), another (1);" in markdown
    assert "a machine, another" in markdown.split("###")[0]


def test_tasks_and_their_limits_are_in_the_provenance(evaluation: report.Evaluation) -> None:
    settings = {"tasks": [{"task": "gsm8k", "limit": None}, {"task": "ruler_vt", "limit": 40}]}
    header = dataclasses.replace(evaluation.header, settings=settings)
    markdown = report.markdown([dataclasses.replace(evaluation, header=header)])
    assert "| task: gsm8k | all of its documents |" in markdown
    assert "| task: ruler_vt | limit 40 |" in markdown


def test_a_card_without_a_verdict_says_why(tmp_path: Path) -> None:
    runs.save(
        tmp_path, *runs.finished([(runs.task("gsm8k"), runs.flipped(100, 0.1, LOSSES))], ARMS[:1])
    )
    evaluation = report.read(tmp_path, margin=0.02, confidence=0.95)
    (row,) = evaluation.comparisons
    (card,) = report.html([evaluation]).split('<div class="card">')[1:]
    text = re.sub("<[^>]*>", "", card.split("</div>")[0])
    assert f"no verdict: {row.reason}" in text
    assert points(row.difference) in text


def test_scores_end_where_scores_end() -> None:
    drawn = [charts.Point(8, 100.0, 90.0, 104.0, "a"), charts.Point(16, 98.0, 91.0, 100.0, "b")]
    svg = charts.lines(
        "t", [charts.Series("s", 0, drawn)], x_label="x", y_label="y", y_limits=(0.0, 100.0)
    )
    ticks = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert max(map(float, ticks)) == 100
    top = min(float(y) for _, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg))
    bars = re.findall(r'd="M[\d.]+ ([\d.]+)V([\d.]+)" opacity', svg)
    assert min(float(end) for bar in bars for end in bar) == top


def test_logarithmic_axes_show_their_points() -> None:
    drawn = [charts.Point(8.2, 0.4, 0.3, 0.5, "a"), charts.Point(61.0, 0.003, 0.002, 0.004, "b")]
    svg = charts.lines(
        "t", [charts.Series("s", 0, drawn)], x_label="x", y_label="y", log_y=True, round_x=True
    )
    for y in re.findall(r'<circle cx="[\d.]+" cy="(-?[\d.]+)"', svg):
        assert 30 <= float(y) <= 208
    assert re.findall(r'text-anchor="middle">(\d+)<', svg) == ["10", "20", "50"]
    assert charts._round_values(1.1, 8.9) == [2, 3, 4, 5, 6, 8]
    assert charts._round_values(8200, 8900) == [8200, 8400, 8600, 8800]


def test_an_axis_places_values_in_order() -> None:
    drawn = [
        charts.Point(x, y, y - 1, y + 1, f"{x}") for x, y in ((8, 50.0), (32, 70.0), (128, 90.0))
    ]
    svg = charts.lines(
        "t", [charts.Series("s", 0, drawn)], x_label="x", y_label="y", reference=("dense", 95.0)
    )
    spots = [tuple(map(float, p)) for p in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert [x for x, _ in spots] == sorted(x for x, _ in spots)
    assert [y for _, y in spots] == sorted((y for _, y in spots), reverse=True)
    # Equal factors are equal distances; equal differences, too.
    assert spots[1][0] - spots[0][0] == pytest.approx(spots[2][0] - spots[1][0], abs=0.2)
    assert spots[0][1] - spots[1][1] == pytest.approx(spots[1][1] - spots[2][1], abs=0.2)
    reference = float(re.findall(r'class="reference" d="M\d+ ([\d.]+)H', svg)[0])
    assert reference < spots[2][1]
    assert charts._ticks(-0.3, 11.0) == [0.0, 2.5, 5.0, 7.5, 10.0]
    assert charts._log_ticks(-4.2, -1.9) == pytest.approx([1e-4, 1e-3, 1e-2])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_charts_of_one_point_have_an_axis(value: float) -> None:
    series = [charts.Series("s", 0, [charts.Point(8, value, value, value, "only")])]
    assert "<circle" in charts.lines("t", series, x_label="x", y_label="y")


def test_names_are_escaped(run: Path, evaluation: report.Evaluation) -> None:
    header = dataclasses.replace(evaluation.header, model={"name": "<b>&model</b>|x"})
    page = report.html([dataclasses.replace(evaluation, header=header)])
    assert "&lt;b&gt;&amp;model" in page
    assert "<b>&model" not in page
    assert "\\|x" in report.markdown([dataclasses.replace(evaluation, header=header)])


def test_subjects_of_a_large_group_fold(tmp_path: Path) -> None:
    tasks = [
        (
            runs.task(f"mmlu_{i}", group="mmlu", length=None, chance=0.25),
            runs.flipped(20, 0.6, LOSSES),
        )
        for i in range(25)
    ]
    runs.save(tmp_path, *runs.finished(tasks, ARMS[:1]))
    page = report.html([report.read(tmp_path, margin=0.02, confidence=0.95)])
    assert "25 tasks one by one" in page
    assert len(re.findall("<figure>", page)) == 1 + 1 + 1 + 1


def test_fidelity_alone_makes_a_report(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "run.json", tmp_path)
    with pytest.raises(CommandError, match="no result is finished"):
        report.main("report", [str(tmp_path)])
    shutil.copytree(run / "fidelity", tmp_path / "fidelity")
    report.main("report", [str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall("<figure>", page)) == 2
    assert "Scores" not in page
    assert "older version" not in page
    assert "| top-32 |" in (tmp_path / "report.md").read_text()
    path = tmp_path / "fidelity/dense-seed-0.json"
    write_json(path, json.loads(path.read_text()) | {"weights": {}})
    said = "1 of 11 results on text are of an older version, which does not say what weights"
    assert said in " ".join(report.read(tmp_path, margin=0.02, confidence=0.95).remarks)


def test_command_writes_both_files_and_says_what_is_missing(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(run, copied)
    result_path(copied, "ruler_vt-32768", "santa-8", 2).unlink()
    with pytest.raises(CommandError, match="without 1 result "):
        report.main("report", [str(copied)])
    out = tmp_path / "out"
    report.main("report", [str(run), str(copied), "--out", str(out), "--unfinished"])
    assert str(out / "report.html") in capsys.readouterr().out
    for name in ("report.html", "report.md"):
        text = (out / name).read_text()
        assert "Unfinished: without 1 result (ruler_vt-32768/santa-8/seed-2)." in text
        assert text.count("ruler-32768, above the floor") >= 2
    # A full disk leaves the whole pages that were there.
    whole = (out / "report.html").read_text()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CommandError, match=r"report\.html cannot be written: No space left"):
        report.main("report", [str(run), "--out", str(out)])
    assert (out / "report.html").read_text() == whole
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CommandError, match=str(blocked)):
        report.main("report", [str(run), "--out", str(blocked)])


# In a browser


def _browser() -> str:
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot_has_the_colours_and_fits(
    evaluation: report.Evaluation, tmp_path: Path, scheme: str
) -> None:
    image = pytest.importorskip("PIL.Image")
    browser = _browser()
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    # The browser writes what it laid out into the title, which it prints with the page.
    probe = """<script>addEventListener("load", () => {
      const root = document.documentElement;
      const charts = [...document.querySelectorAll("svg.chart")].map(c => c.getBoundingClientRect());
      const texts = [...document.querySelectorAll("svg.chart text")].filter(t => {
        const a = t.getBoundingClientRect(), b = t.closest("svg").getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1
          || a.top < b.top - 1 || a.bottom > b.bottom + 1;
      });
      document.title = [root.scrollWidth - root.clientWidth, charts.length,
        Math.round(Math.min(...charts.map(c => c.height))), texts.length].join(" ");
    })</script>"""
    page.write_text(report.html([evaluation]).replace("</body>", f"{probe}</body>"))

    def browse(*options: str) -> str:
        settings = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        settings += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
        done = subprocess.run(
            [browser, *settings, "--window-size=1240,3000", *options, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "HOME": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    title = re.search(r"<title>(.*?)</title>", browse("--dump-dom"))
    assert title is not None
    overflow, drawn, smallest, clipped = map(int, title[1].split())
    assert overflow == 0
    assert drawn == 18
    assert smallest > 100
    assert clipped == 0

    browse(f"--screenshot={shot}")
    pixels = np.asarray(image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (3000, 1240, 3)
    corner = pixels[5, 5]
    assert (corner.min() > 240) if scheme == "light" else (corner.max() < 40)
    # Each line's colour is on the page, as the style sheet has it for this scheme.
    style = report._STYLE.read_text()
    block = style.split("@media")[0 if scheme == "light" else 1]
    for name in ("c0", "c1", "c2", "good", "bad"):
        colour = re.search(rf"--{name}: #(\w{{6}})", block)
        assert colour is not None
        wanted = [int(colour[1][i : i + 2], 16) for i in (0, 2, 4)]
        assert (np.abs(pixels - wanted).max(axis=2) <= 3).sum() > 20, name


def _luminance(colour: str) -> Any:
    parts = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def test_text_has_the_contrast_that_the_web_guidelines_ask_for() -> None:
    blocks = report._STYLE.read_text().split("@media")
    for block in blocks[:2]:
        colours = dict(re.findall(r"--(\w+): #(\w{6})", block))
        for name in ("ink", "muted", "good", "bad", "open"):
            for ground in ("page", "card"):
                light, dark = sorted(map(_luminance, (colours[name], colours[ground])))[::-1]
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)
