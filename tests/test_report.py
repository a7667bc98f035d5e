"""The report of a comparison, as a browser shows it, whatever became of the runs."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from recipes.figures import arm_styles, draw_best, draw_learning_rates, draw_loss
from recipes.findings import short_answer
from recipes.report import write_report
from recipes.study_results import read_runs, read_study_curves
from tests.study_fixtures import UNIGRAM, curve, make_study, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FIGURES = ("validation_loss", "best_arms", "learning_rates", "training")
ARMS = {
    f"{placement}, learning_rate {rate:g}": {"norm_placement": placement, "learning_rate": rate}
    for placement in ("post", "pre")
    for rate in (1e-4, 3e-4, 1e-3)
}
BEST = ["post, learning_rate 0.0001", "pre, learning_rate 0.0003"]
# What a figure must show of the arms: their labels, or what these are made of.
DRAWN = {
    "validation_loss": list(ARMS),
    "best_arms": BEST,
    "learning_rates": ["Post-LN", "Pre-LN", "0.0001", "0.0003", "0.001"],
    "training": list(ARMS),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Six arms of two seeds: one diverged, one at the unigram level, one unfinished, one not there."""
    folder = tmp_path_factory.mktemp("study")
    study = make_study(folder, ARMS, [0, 1])
    for arm in study.arms[:-1]:
        for seed in study.seeds:
            rate, placement = arm.options["learning_rate"], arm.options["norm_placement"]
            losses, more = curve(4.5 - 500 * rate - (placement == "pre") + seed / 50, 10, 8.0), {}
            if rate == 1e-3:
                losses, more = [8.0, 9.0, None], {"diagnosis": "diverged"}
            elif (placement, rate) == ("post", 3e-4):
                losses, more = np.full(10, 6.95), {"diagnosis": "plateau"}
            elif (placement, rate, seed) == ("pre", 1e-4, 1):
                losses, more = losses[:4], {"finished": False}
            write_run(study.folder(arm, seed), seed, losses, **arm.options, **more)
    write_report(read_study_curves(study), folder / "report")
    return folder / "report"


def browse(page, *flags):
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)


def test_a_browser_shows_every_arm_and_has_no_complaint(report):
    result = browse(report / "index.html", "--dump-dom", "--enable-logging=stderr")
    for label in ARMS:
        assert label in result.stdout
    assert len(re.findall('<svg role="img" aria-label="[^"]*pre, learning_rate', result.stdout)) == len(
        FIGURES
    )
    assert "CONSOLE" not in result.stderr
    for name, svg in zip(FIGURES, re.findall(r"<svg .*?</svg>", result.stdout, flags=re.DOTALL), strict=True):
        assert_shows(svg, DRAWN[name])


def assert_shows(svg, labels):
    """Each is the beginning of a text of the drawing, which what stands in its attributes is not."""
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    for label in labels:
        assert any(text.startswith(label) for text in texts), label


def test_a_browser_hears_of_a_broken_page(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<title>x</title><link rel="icon" href="data:,"><script>nonsense()</script>')
    assert "CONSOLE" in browse(page, "--dump-dom", "--enable-logging=stderr").stderr


def test_the_page_is_not_blank(report, tmp_path):
    file = tmp_path / "page.png"
    browse(report / "index.html", f"--screenshot={file}", "--window-size=1000,3000")
    grey = imread(file)[..., :3].mean(axis=2)
    bands = np.array_split(grey, 10)
    # Ink from top to bottom, not a line and a void.
    assert all(((band < 0.6).mean() > 0.003) for band in bands)


def test_the_page_needs_nothing_else(report):
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    resources = re.findall(r'(?:src|href)="([^"#][^"]*)"|url\(([^#)][^)]*)\)|@import', page)
    assert resources == [("data:,", "")]


def test_names_in_the_page_are_unique_and_there(report):
    page = (report / "index.html").read_text(encoding="utf-8")
    names = re.findall(r' id="([^"]*)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(names)


class Balance(HTMLParser):
    """Elements that are still open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_element_of_the_page_is_closed(report):
    balance = Balance()
    balance.feed((report / "index.html").read_text(encoding="utf-8"))
    assert balance.open == []


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_names_what_it_draws(report, name):
    assert_shows((report / f"{name}.svg").read_text(encoding="utf-8"), DRAWN[name])


def test_a_figure_is_described_by_the_arms_that_it_draws(report):
    text = (report / "report.md").read_text(encoding="utf-8")
    found = re.findall(r"!\[.*?, of the arms (.*)\]\((\w+)\.png\)", text)
    described = {name: labels.split("; ") for labels, name in found}
    there = list(ARMS)[:-1]  # the last arm has not begun
    assert described == {
        "validation_loss": there, "best_arms": BEST, "learning_rates": there, "training": there,
    }  # fmt: skip


def test_the_best_arms_have_a_band_against_updates_tokens_and_wall_time(tmp_path):
    runs = [
        write_run(tmp_path / f"{p}{s}", s, curve(4 + s / 10), norm_placement=p)
        for p in ("post", "pre")
        for s in range(2)
    ]
    figure = draw_best(read_runs(runs))
    assert [len(axes.collections) for axes in figure.axes] == [2] * 6
    tokens = figure.axes[1].collections[0].get_paths()[0].vertices
    at_end = tokens[np.isclose(tokens[:, 0], 1000 * 1024 / 1e6)]
    assert {*at_end[:, 1].round(6)} == {4.0, 4.1}


def test_the_same_curves_give_the_same_files(report, tmp_path):
    runs = [write_run(tmp_path / f"{p}", 0, curve(4), norm_placement=p) for p in ("post", "pre")]
    files = [write_report(read_runs(runs), tmp_path / name) for name in ("one", "two")]
    assert len(files[0]) == 2 + 2 * len(FIGURES)
    for first, second in zip(*files):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_markdown_has_the_figures_and_whole_tables(report):
    text = (report / "report.md").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f"]({name}.png)" in text
        assert (report / f"{name}.png").exists()
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1
    assert (
        "did not get below the loss of a model without context (plateau) in 2 of 2 runs, from update 1,000"
        in text
    )
    assert "diverged in 2 of 2 runs, by update 300" in text
    assert "10 of 12 runs" not in text
    assert "9 of 12 runs have ended" in text


def test_what_a_label_holds_is_no_markup(tmp_path):
    # Folder names are what users choose.
    run = write_run(tmp_path / "a<b>|c", 0, curve(4))
    page, markdown, *_ = write_report(read_runs([run]), tmp_path / "report")
    assert "a<b>" not in page.read_text()
    assert "a&lt;b&gt;|c" in page.read_text()
    assert r"a\<b>\|c" in markdown.read_text()


@pytest.mark.parametrize(
    "states",
    [
        [],
        [{"losses": [], "finished": False}],
        [{"losses": [8.0], "finished": False}],
        [{"losses": [None], "diagnosis": "diverged"}],
        [{"losses": [8.0]}],
        [{"losses": [5.0, 4.0]}, {"losses": [None], "diagnosis": "diverged"}],
    ],
    ids=["nothing", "begun", "one validation", "all diverged", "one finished", "one of each"],
)
def test_any_state_of_a_study_is_reported(tmp_path, states):
    study = make_study(tmp_path, dict(list(ARMS.items())[2:4]), [0])
    for arm, state in zip(study.arms, states):
        write_run(study.folder(arm, 0), 0, **state, **arm.options)
    page, *_ = write_report(read_study_curves(study), tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    for arm in study.arms:
        assert arm.label in text
    assert f"{sum(state.get('finished', True) for state in states)} of 2 runs" in text
    assert ("No run has been validated yet" in text) == (not any(state["losses"] for state in states))
    assert not re.search(r"\bnan\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))


def test_the_answer_says_how_sure_it_is(tmp_path):
    def answer(name, gap, seeds=3):
        runs = [
            write_run(
                tmp_path / f"{name}{p}{s}", s, curve(4 + (p == "post") * gap + s / 10), norm_placement=p
            )
            for p in ("post", "pre")
            for s in range(seeds)
        ]
        return " ".join(short_answer(read_runs(runs)))

    far = answer("far", 1.0)
    assert "Pre-LN ends 1.0000 nats below Post-LN; the two intervals do not overlap" in far
    assert (
        "the range of the resamples over 3 seeds lies above 1; with 3 seeds it leaves 1 out by chance" in far
    )
    assert "95 %" not in far
    assert "the 95 % interval over 6 seeds lies above 1" in answer("many", 1.0, seeds=6)
    near = answer("near", 0.0)
    assert "the two intervals overlap" in near
    assert "includes 0, so no difference is shown" in near
    assert "does not exclude 1" in near


def test_what_has_not_begun_is_no_denominator(tmp_path):
    study = make_study(tmp_path, dict(list(ARMS.items())[:2]), range(3))
    first, second = study.arms
    write_run(study.folder(first, 0), 0, np.full(4, 6.95), diagnosis="plateau", **first.options)
    write_run(study.folder(first, 1), 1, [6.9], finished=False, **first.options)
    write_run(study.folder(second, 0), 0, [8.0, None], diagnosis="diverged", **second.options)
    curves = read_study_curves(study)
    write_report(curves, tmp_path / "report")
    answer = " ".join(short_answer(curves))
    assert "(plateau) in 1 of 2 runs" in answer
    assert "With 1 finished seed of an arm" in answer
    svg = (tmp_path / "report/validation_loss.svg").read_text(encoding="utf-8")
    assert "(1 of 1 diverged)" in svg


def test_losses_that_all_lie_above_the_unigram_cross_entropy_are_shown(tmp_path):
    losses = curve(UNIGRAM + 1.5, start=10.0)
    runs = [write_run(tmp_path / p, losses=losses, norm_placement=p) for p in ("post", "pre")]
    curves = read_runs(runs)
    for draw in (draw_loss, draw_best, draw_learning_rates):
        for axes in draw(curves).axes:
            assert axes.get_ylim()[0] < UNIGRAM + 1.5 < axes.get_ylim()[1]


def test_rates_that_have_not_ended_are_not_called_tried(tmp_path):
    study = make_study(tmp_path, dict(list(ARMS.items())[:3]), [0])
    for arm, finished in zip(study.arms, (True, False, True)):
        write_run(study.folder(arm, 0), 0, curve(4), finished=finished, **arm.options)
    write_report(read_study_curves(study), tmp_path / "report")
    assert "| Post-LN | 0.0001, 0.001 | 0.0001 |" in (tmp_path / "report/report.md").read_text("utf-8")


def test_the_difference_is_that_of_common_seeds(tmp_path):
    # Post-LN has a hard seed more: its mean is higher, and it is better on the seed both have.
    ends = {("post", 0): 3.9, ("post", 1): 5.0, ("pre", 0): 4.0}
    runs = [write_run(tmp_path / f"{p}{s}", s, curve(end), norm_placement=p) for (p, s), end in ends.items()]
    assert "Post-LN ends 0.1000 nats below Pre-LN; with one seed in common" in " ".join(
        short_answer(read_runs(runs))
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "embedded corpus"),
        ({"train_file": "/home/somebody/data/corpus/"}, "data/corpus"),
        ({"train_file": "../text", "validation_file": "/a/b/c.txt"}, "text, validated on b/c.txt"),
        ({"dataset_name": "Salesforce/wikitext", "dataset_config_name": "v1"}, "Salesforce/wikitext v1"),
        ({"corpora": [{"train_file": "/a/b/c"}, {"dataset_name": "d/e"}]}, "b/c and d/e"),
    ],
)
def test_the_text_is_named_and_the_machine_is_not(tmp_path, options, name):
    run = write_run(tmp_path / "run", 0, curve(4), **options)
    _, markdown, *_ = write_report(read_runs([run]), tmp_path / "report")
    text = markdown.read_text(encoding="utf-8")
    assert f"| text | {name} |" in text
    assert "somebody" not in text


def test_an_arm_of_the_same_other_options_has_the_same_colour_and_another_line(report, tmp_path):
    runs = [
        write_run(tmp_path / f"{p}{rate}", 0, curve(4), norm_placement=p, learning_rate=rate)
        for p in ("post", "pre")
        for rate in np.geomspace(1e-4, 1e-2, 9)
    ]
    curves = read_runs(runs)
    styles = arm_styles(curves)
    assert len({(s.color, str(s.linestyle), s.marker) for s in styles.values()}) == 18
    pairs = list(zip(curves.arms[:9], curves.arms[9:]))
    assert all(styles[a.name].color == styles[b.name].color for a, b in pairs)
    assert all(styles[a.name].linestyle != styles[b.name].linestyle for a, b in pairs)
