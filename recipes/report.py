"""The report of a comparison: one content, as a web page that needs nothing else and as Markdown."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from recipes.comparison import (
    MANY_SEEDS,
    Group,
    best_of_methods,
    chance_of_exclusion,
    final_loss,
    groups,
    steps_ratio,
)
from recipes.figures import (
    arm_styles,
    best_arms,
    draw_best,
    draw_learning_rates,
    draw_loss,
    draw_training,
    ended_arms,
    save_figure,
    trained_arms,
    validated_arms,
)
from recipes.findings import DASH, estimate_words, ratio_words, short_answer
from recipes.glue_results import Track, draw_tracks
from recipes.study import format_value
from recipes.study_results import FINGERPRINTS, LEARNING_RATE, ArmCurves, RunCurves, StudyCurves

TEMPLATES = Path(__file__).parent / "templates"
# What a web page does not need of an SVG file: the lines before its element, and names nothing refers to.
SVG_PROLOGUE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
SVG_ID = re.compile(r' id="([^"]*)"')

CHANCES = ", ".join(f"{chance_of_exclusion(n):.0%} with {n}" for n in range(2, MANY_SEEDS))
STEPS_RATIO = f"""
Steps ratio: the updates at which the slow arm reaches its own best validation loss (mean curve over seeds),
divided by the updates at which the fast arm reaches that same loss, linearly between validations. More than
1: the fast arm needs fewer updates. Where it never gets there, the ratio is less than the number given.
In brackets: 95 % percentile bootstrap over seeds, paired, since the same seed means the same data in the
same order. With fewer than {MANY_SEEDS} seeds it is the range of all resamples, which is no 95 % interval:
for equal arms it leaves out 1 by chance in about {CHANCES} seeds.
"""
TRAPS = """
Xiong et al. 2020 give 700k / 500k = 1.4 for BERT-base at validation loss 1.69. Their sentence as printed
evidently swaps the two names: it is Pre-LN that needs 500k updates and Post-LN that needs 700k.

With a handful of seeds a bootstrap interval is coarse and tends to be too narrow; with one seed there is
none.

The learning rate is not yet annealed where the fast arm passes the slow one's loss, whereas the slow arm
has mostly finished its schedule: a run planned for fewer updates would probably get there earlier still.

The learning rate of each setting was chosen on the validation set on which it is reported. That flatters
every setting, and most the one for which most learning rates were tried.
"""
EQUAL = """
All losses are over the same masked tokens of the same validation text, whatever the seed. Data order and
masks of training are functions of the seed and the position: arms with the same seed see the same batches
where their batches have the same size, and seeds differ in weights, order, masks and dropout at once.
"""
GLUE = """
Each checkpoint of a run, fine-tuned. Line: mean over the seeds of fine-tuning; band: its 95 % t-interval;
points: seeds, a cross where one class is predicted. Seeds of pre-training are lines of their own: the band
does not hold their spread.
"""
# Section, file, drawing, the arms that it draws, caption.
Arms = Callable[[StudyCurves], list[ArmCurves]]
FIGURES: tuple[tuple[str, str, Callable[[StudyCurves], Figure], Arms, str], ...] = (
    (
        "Validation loss against update",
        "validation_loss",
        draw_loss,
        validated_arms,
        """Line: mean over the seeds that ended without diverging (over those that have begun, while none
        has ended). Band: smallest and largest. Thin lines: runs that the mean leaves out, because they
        diverged or have not ended. Dashed grey: unigram cross-entropy, the loss of a model that knows word
        frequencies only; what lies far above it is cut off.""",
    ),
    (
        "The best of each setting",
        "best_arms",
        draw_best,
        best_arms,
        """For each placement and each setting of the other options, the learning rate with the lowest mean
        final loss; the best of each placement in bold. Band: smallest and largest seed. Tokens and wall time
        are means over the seeds; wall time is that of training, on the machine and beside the load that each
        run met.""",
    ),
    (
        "Final loss against learning rate",
        "learning_rates",
        draw_learning_rates,
        ended_arms,
        """Mean and 95 % t-interval over seeds, where there are at least two; in the colours of the arms,
        moved sideways a little. An interval that would dwarf the differences between the means is cut off.
        A cross at the upper edge: a seed diverged.""",
    ),
    (
        "Training loss, gradient norm and learning rate",
        "training",
        draw_training,
        trained_arms,
        """Means over seeds, as above. Training loss is the mean since the previous line; the gradient norm
        is that of one update, before clipping.""",
    ),
)
# Told elsewhere in the report, or too long.
NOT_CIRCUMSTANCES = {"options", "updates", "results", "model_config", "versions", "unigram_cross_entropy"}


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind = "text"


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    points: list[str]
    kind = "points"


@dataclass(frozen=True)
class Table:
    """Cells are text; `numbers` are the columns set flush right; `folded`: at first the caption only."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    numbers: tuple[int, ...] = ()
    folded: bool = False
    kind = "table"

    def is_number(self, column: int) -> bool:
        """Whether a column is set flush right."""
        return column in self.numbers


@dataclass(frozen=True)
class Picture:
    """A figure: files NAME.svg and NAME.png, and the SVG as it stands in the page."""

    name: str
    alt: str
    caption: str
    svg: Markup
    kind = "picture"


@dataclass(frozen=True)
class Section:
    """A title and what stands under it."""

    title: str
    blocks: list[Text | Points | Table | Picture]


def write_report(curves: StudyCurves, folder: Path, tracks: Sequence[Track] = ()) -> list[Path]:
    """Write index.html, report.md and the figures as SVG and PNG.

    Runs may be missing, unfinished or diverged; the report says so.

    Args:
        curves: What there is.
        folder: Made if need be; files of an earlier report are replaced.
        tracks: Fine-tuned scores of the runs' checkpoints, where there are any.

    Returns:
        The files, index.html first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures, files = _curve_sections(curves, folder)
    if tracks:
        glue, drawn = _glue_section(curves, tracks, folder)
        figures, files = [*figures, glue], files + drawn
    sections = [
        Section("The short answer", [Points(short_answer(curves))]),
        *figures,
        Section("Final losses", [_final_table(curves), _rates_table(curves)]),
        _ratio_section(curves),
        _equal_section(curves),
        Section("Runs", [_runs_table(curves, folder)]),
    ]
    content = {"title": f"Comparison: {curves.name}", "sections": sections}
    return [_render(name, content, folder) for name in ("index.html", "report.md")] + files


def _render(name: str, content: dict[str, object], folder: Path) -> Path:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _markdown
    file = folder / name
    text = environment.get_template(f"report{file.suffix}").render(content)
    file.write_text(text, encoding="utf-8")
    return file


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*|]|<(?=[A-Za-z/!?]))", r"\\\1", " ".join(str(text).split()))


def inline_svg(svg: str, alt: str) -> Markup:
    """An SVG file as an element of a page: named for who cannot see it, without names that could clash."""
    svg = SVG_PROLOGUE.sub("", svg, count=1)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = SVG_ID.sub(lambda match: match[0] if match[1] in used else "", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))


def _curve_sections(curves: StudyCurves, folder: Path) -> tuple[list[Section], list[Path]]:
    """The sections made of figures, and the files; none where nothing has been validated."""
    if not any(len(run.steps) for run in curves.runs):
        return [Section("Curves", [Text("No run has been validated yet.")])], []
    sections, files = [], []
    for title, name, draw, drawn, caption in FIGURES:
        files += save_figure(draw(curves), folder, name)
        labels = "; ".join(arm.label for arm in drawn(curves))
        alt = f"{title}, of the arms {labels}" if labels else f"{title}: no arm yet"
        svg = inline_svg((folder / f"{name}.svg").read_text(encoding="utf-8"), alt)
        sections.append(Section(title, [Picture(name, alt, _one_line(caption), svg)]))
    return sections, files


def _glue_section(curves: StudyCurves, tracks: Sequence[Track], folder: Path) -> tuple[Section, list[Path]]:
    """Fine-tuned scores against update: figure, table, and the figure's files."""
    of = {run.folder.resolve(): (arm, run) for arm in curves.arms for run in arm.runs}
    found = {track.run: of[Path(track.run).resolve()] for track in tracks}
    styles = {run: arm_styles(curves)[arm.name].line(marker="o") for run, (arm, _) in found.items()}
    labels = {run: f"{arm.label}, seed {curve.seed}" for run, (arm, curve) in found.items()}
    files = save_figure(draw_tracks(list(tracks), styles, labels), folder, "glue")
    title = "GLUE scores against update"
    tasks = ", ".join(dict.fromkeys(track.task for track in tracks))
    alt = f"{title}: {tasks}, of {'; '.join(labels.values())}"
    svg = inline_svg((folder / "glue.svg").read_text(encoding="utf-8"), alt)
    table = Table(
        "Score (mean of the task's metrics) at the first and the last checkpoint, mean and 95 % t-interval "
        "over the seeds of fine-tuning; whether the last interval lies above the first.",
        ["task", "run", "first", "score", "last", "score", "last against first"],
        [[track.task, labels[track.run], *_glue_row(track)] for track in tracks],
        numbers=(2, 4),
    )
    return Section(title, [Picture("glue", alt, _one_line(GLUE), svg), table]), files


def _glue_row(track: Track) -> list[str]:
    cells = []
    for i in (0, -1):
        low, high = track.interval("score")[i]
        interval = "" if np.isnan(low) else f" [{low:.4f}, {high:.4f}]"
        cells += [f"{track.steps[i]:,}", _number(track.mean("score")[i]) + interval]
    return [*cells, track.verdict]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _final_table(curves: StudyCurves) -> Table:
    return Table(
        "Validation loss at the end, in nats a masked token: mean over the n seeds that ended without "
        "diverging, with its 95 % t-interval.",
        ["arm", "mean", "95 % interval", "below unigram", "n", "diverged", "begun", "planned"],
        [_final_row(curves, arm) for arm in curves.arms],
        numbers=(1, 2, 3, 4, 5, 6, 7),
    )


def _final_row(curves: StudyCurves, arm: ArmCurves) -> list[str]:
    final = final_loss(arm)
    mean = _number(final.mean)
    below = _number(curves.unigram_cross_entropy - final.mean)
    interval = f"[{final.low:.4f}, {final.high:.4f}]" if final.n > 1 else DASH
    counts = [final.n, len(arm.diverged), len(arm.begun), len(arm.runs)]
    return [arm.label, mean, interval, below, *map(str, counts)]


def _rates_table(curves: StudyCurves) -> Table:
    return Table(
        "Best learning rate of each setting: the lowest mean final loss where no seed diverged, over the "
        "seeds that all its learning rates have finished. Tried: those of which a run has ended.",
        ["setting", "tried", "best", "final loss", "note"],
        [_rates_row(group) for group in groups(curves)],
    )


def _rates_row(group: Group) -> list[str]:
    tried = ", ".join(f"{arm.options[LEARNING_RATE]:g}" for arm in group.tried) or DASH
    best = group.best
    if best is None:
        return [group.label, tried, DASH, DASH, group.note]
    rate = f"{best.options[LEARNING_RATE]:g}"
    return [group.label, tried, rate, estimate_words(final_loss(best)), group.note]


def _ratio_section(curves: StudyCurves) -> Section:
    best = best_of_methods(curves)
    found = [group for group in groups(curves) if group.best]
    tables: list[Table | Text] = []
    if len(best) > 1:
        tables.append(_placement_ratios(best))
    if len(found) > max(len(best), 1):
        tables.append(_group_ratios(found))
    if not tables:
        tables.append(Text("There are not two settings with a best arm: there is no ratio."))
    traps = [_one_line(trap) for trap in TRAPS.split("\n\n")]
    return Section("Steps ratios", [Text(_one_line(STEPS_RATIO)), *tables, Points(traps)])


def _placement_ratios(best: dict[str, ArmCurves]) -> Table:
    return Table(
        "The best arm of each placement (and norm) against the others'. Not reached: share of the resamples.",
        ["fast", "slow", "best of slow", "its updates", "those of fast", "steps ratio", "not reached", "n"],
        [_placement_row(fast, slow) for fast, slow in permutations(best.values(), 2)],
        numbers=(2, 3, 4, 5, 6, 7),
    )


def _placement_row(fast: ArmCurves, slow: ArmCurves) -> list[str]:
    ratio = steps_ratio(fast, slow)
    if ratio is None:
        return [fast.label, slow.label, *[DASH] * 5, "0"]
    return [
        fast.label,
        slow.label,
        f"{ratio.target:.4f}",
        f"{ratio.slow_steps:,.0f}",
        DASH if ratio.fast_steps is None else f"{ratio.fast_steps:,.0f}",
        ratio_words(ratio),
        f"{ratio.not_reached:.0%}" if ratio.n > 1 else DASH,
        str(ratio.n),
    ]


def _group_ratios(found: list[Group]) -> Table:
    names = [f"{group.label}, at {group.best.options[LEARNING_RATE]:g}" for group in found]
    ratios = [
        [DASH if slow is fast else ratio_words(steps_ratio(fast.best, slow.best)) for fast in found]
        for slow in found
    ]
    return Table(
        "Steps ratios of all settings, each at its best learning rate. The row is the slow arm, whose best "
        "loss is to be reached, the column the fast one.",
        ["slow; fast to the right", *names],
        [[name, *row] for name, row in zip(names, ratios, strict=True)],
        numbers=tuple(range(1, len(found) + 1)),
    )


def _equal_section(curves: StudyCurves) -> Section:
    """What all runs share and what they ran on."""
    known = [
        (what, curves.fingerprints[key]) for key, what in FINGERPRINTS.items() if key in curves.fingerprints
    ]
    corpora = dict.fromkeys(_corpus(run.record["options"]) for run in curves.runs if run.record)
    facts = [
        ["text", "; ".join(corpora) or DASH],
        *([f"fingerprint of {what}", _words(value)] for what, value in known),
        ["unigram cross-entropy, nats", _number(curves.unigram_cross_entropy)],
        ["seeds", _words(curves.seeds)],
        *_circumstances(curves),
    ]
    options = [[name, _words(value)] for name, value in curves.common.items()]
    return Section(
        "What was held equal",
        [
            Text(_one_line(EQUAL)),
            Table("Data, seeds, versions; several values where runs differ.", ["what", "value"], facts),
            Table("Options that all runs share", ["option", "value"], options, folded=True),
        ],
    )


def _corpus(options: dict[str, Any]) -> str:
    """What the text of a run is called: the name of a dataset, or the end of a path."""
    corpora = options.get("corpora")
    if corpora:
        return " and ".join(map(_corpus, corpora))
    validation = options.get("validation_file")
    name = " ".join(filter(None, [options.get("dataset_name"), options.get("dataset_config_name")]))
    name = name or _end_of_path(options.get("train_file")) or "embedded corpus"
    return f"{name}, validated on {_end_of_path(validation)}" if validation else name


def _end_of_path(path: str | None) -> str:
    """The last two names of a path; empty where there is none."""
    names = [part for part in Path(path or "").parts if part not in ("/", "..", "~")]
    return "/".join(names[-2:])


def _circumstances(curves: StudyCurves) -> list[list[str]]:
    """Versions and whatever else run.json says about where and how runs ran; all values that occur."""
    found: dict[str, list[str]] = {}
    for run in curves.runs:
        told = NOT_CIRCUMSTANCES | FINGERPRINTS.keys()
        facts = {name: value for name, value in run.record.items() if name not in told}
        if run.record:
            facts["bf16"] = run.record["options"].get("bf16")  # what the hardware decided
        for name, value in (facts | run.record.get("versions", {})).items():
            values = found.setdefault(name, [])
            if (words := _words(value)) not in values:
                values.append(words)
    return [[name.replace("_", " "), "; ".join(values)] for name, values in found.items()]


def _number(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else DASH


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items()) or DASH
    return ", ".join(map(_words, value)) if isinstance(value, list) else format_value(value)


def _runs_table(curves: StudyCurves, folder: Path) -> Table:
    return Table(
        "Every run of the comparison.",
        ["arm", "seed", "status", "last validation loss", "minutes", "folder"],
        [_run_row(arm, run, folder) for arm in curves.arms for run in arm.runs],
        numbers=(1, 3, 4),
    )


def _run_row(arm: ArmCurves, run: RunCurves, folder: Path) -> list[str]:
    finite = run.losses[np.isfinite(run.losses)]
    loss = f"{finite[-1]:.4f}" if len(finite) else DASH
    times = [
        line["elapsed_seconds"]
        for line in [*run.lines, run.results]
        if line.get("elapsed_seconds") is not None
    ]
    minutes = f"{times[-1] / 60:.1f}" if times else DASH
    return [arm.label, str(run.seed), run.status, loss, minutes, _folder_words(run.folder, folder)]


def _folder_words(run: Path, report: Path) -> str:
    """Where a run lies, from the folder that holds the report: a report says nothing about the machine."""
    root = report.resolve().parent
    run = run.resolve()
    return str(run.relative_to(root)) if run.is_relative_to(root) else run.name
