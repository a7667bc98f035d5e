"""The gallery: what is chosen and told from made-up runs, and what is measured of real ones."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from bert_ln import BertLnConfig, BertLnForMaskedLM
from recipes import gallery, gallery_costs
from recipes.errors import UserError
from recipes.gallery_costs import kept_bytes, measure, measure_all
from recipes.gallery_report import draw, report_blocks, summarise
from recipes.pretraining import pretrain
from recipes.study import read_study
from recipes.study_results import read_study_curves
from tests.conftest import TINY
from tests.study_fixtures import UNIGRAM, make_study, write_run

RATES = (5e-4, 1e-3, 2e-3)


def made_up(tmp_path, outcomes, seeds=(1, 2)):
    """The curves of a study with outcomes {(placement, norm, rate, warm-up): [loss or (loss, diagnosis)]}."""
    arms = {}
    for placement, norm, rate, warmup in outcomes:
        options = {"norm_placement": placement, "norm_type": norm}
        arms[f"{placement} {norm} {rate:g} {warmup}"] = options | {
            "learning_rate": rate,
            "warmup_steps": warmup,
        }
    study = make_study(tmp_path / "study", arms, seeds)
    for arm, ends in zip(study.arms, outcomes.values()):
        for seed, end in zip(seeds, ends):
            loss, diagnosis = end if isinstance(end, tuple) else (end, None)
            write_run(study.folder(arm, seed), seed, [6.9, loss], diagnosis=diagnosis, **arm.options)
    return read_study_curves(study)


def tuned(placement, norm, *ends):
    """Outcomes of a method at each of the rates, with warm-up."""
    return {(placement, norm, rate, 40): end for rate, end in zip(RATES, ends)}


PRE = tuned("pre", "layer_norm", [6.0, 6.2], [5.8, 6.0], [5.7, 6.3])


def blocks_of(summary):
    return report_blocks({"costs": []} | summary)


def rows_of(summary):
    """The lines of the first table."""
    return blocks_of(summary)[0].splitlines()


def method_of(summary, placement, norm):
    return next(m for m in summary["methods"] if (m["norm_placement"], m["norm_type"]) == (placement, norm))


def test_the_best_rate_has_the_lowest_mean_and_differences_are_paired_by_seed(tmp_path):
    norm = tuned("pre", "rms_norm", [6.4, 6.4], [5.9, 6.1], [5.6, 5.9])
    summary = summarise(made_up(tmp_path, PRE | norm))
    pre, rms = method_of(summary, "pre", "layer_norm"), method_of(summary, "pre", "rms_norm")
    assert (pre["best"]["learning_rate"], pre["best"]["mean"]) == (1e-3, pytest.approx(5.9))
    assert (rms["best"]["learning_rate"], rms["best"]["losses"]) == (2e-3, {1: 5.6, 2: 5.9})
    assert rms["difference"] == pytest.approx({1: -0.2, 2: -0.1})
    assert summary["median_spread"] == pytest.approx(0.1)
    assert [m["norm_type"] for m in summary["methods"]] == ["rms_norm", "layer_norm"]  # 5.75, 5.9
    assert pre["note"] == "" and "highest learning rate tried" in rms["note"]


def test_of_two_equally_good_rates_the_lower_is_taken(tmp_path):
    summary = summarise(made_up(tmp_path, tuned("pre", "layer_norm", [6.5, 6.5], [6.0, 6.2], [6.2, 6.0])))
    assert summary["methods"][0]["best"]["learning_rate"] == 1e-3


def test_a_rate_at_which_a_seed_diverged_is_not_chosen_and_a_plateau_is_told(tmp_path):
    post = tuned("post", "layer_norm", [6.5, 6.5], [(6.95, "plateau"), 6.1], [5.0, (None, "diverged")])
    summary = summarise(made_up(tmp_path, PRE | post))
    assert method_of(summary, "post", "layer_norm")["best"]["learning_rate"] == 5e-4
    assert rows_of(summary)[-1] == (
        "| post | 6.5000, 6.5000 | +0.6000 | **6.5000** | 6.5250, plateau in 1 of 2 "
        "| 5.0000, diverged in 1 of 2 |"
    )


def test_no_warm_up_is_compared_with_the_same_rate_and_not_with_the_best(tmp_path):
    cold = {("pre", "layer_norm", 2e-3, 0): [(6.1, "plateau"), (6.5, "plateau")]}
    summary = summarise(made_up(tmp_path, PRE | cold))
    (method,) = summary["methods"]
    assert method["lost_without_warmup"] == pytest.approx({1: 0.4, 2: 0.2})  # not 0.3 and 0.5
    assert method["best"]["learning_rate"] == 1e-3  # nor is it among the rates
    assert rows_of(summary)[-1].endswith(
        "| 5.8000, 6.0000 | +0.0000 | 6.1000 | **5.9000** | 6.0000 | 6.3000, plateau in 2 of 2 (+0.3000) |"
    )


def test_runs_that_have_not_ended_are_named_and_the_report_says_so(tmp_path):
    norm = tuned("pre", "frn", [6.4, 6.4], [5.9], [])
    curves = made_up(tmp_path, PRE | norm)
    summary = summarise(curves)
    missing = ["pre frn 0.001 40, seed 2", "pre frn 0.002 40, seed 1", "pre frn 0.002 40, seed 2"]
    assert summary["missing"] == [f"{run}: not started" for run in missing]
    first = blocks_of(summary)[0]
    assert first.startswith("**Unfinished") and "9 of 12 runs" in first
    assert all(run in first for run in missing)


def test_a_study_without_runs_is_told(tmp_path):
    blocks = blocks_of(summarise(made_up(tmp_path, tuned("post", "layer_norm", [], [], []))))
    assert "0 of 6 runs" in blocks[0]
    assert blocks[1].splitlines()[-1] == "| post | – | – | – | – | – |"


def test_the_figure_has_a_point_a_seed_and_what_is_far_above_lies_at_the_edge(tmp_path):
    cold = {("pre", "layer_norm", 2e-3, 0): [6.4, (None, "diverged")]}
    summary = summarise(made_up(tmp_path, PRE | cold | tuned("post", "layer_norm", [6.6, 6.5], [], [])))
    panel = draw(summary).axes[0]
    edge = UNIGRAM + 0.35 * (UNIGRAM - 5.8)
    points = [
        (line.get_marker(), *line.get_xydata()[0]) for line in panel.lines if line.get_marker() != "None"
    ]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["pre (0.001)", "post (0.0005)"]
    hollow = [("o", 6.4, 0), (">", pytest.approx(edge), 0)]
    assert points == [*hollow, ("o", 5.8, 0), ("o", 6.0, 0), ("o", 6.6, 1), ("o", 6.5, 1)]
    (unigram,) = [line for line in panel.lines if line.get_marker() == "None"]
    assert unigram.get_xdata() == [UNIGRAM, UNIGRAM]
    assert panel.get_ylim() == (1.5, -0.5)  # the best at the top


class Kept(nn.Module):
    """Keeps x for the scale, the scaled x and the weight for each other, y for exp and twice for y y."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(3, 5))

    def forward(self, x):
        y = ((x * self.scale) @ self.weight).exp()
        return SimpleNamespace(loss=(y * y).sum())


def test_kept_bytes_count_each_storage_once_and_no_parameter():
    assert kept_bytes(Kept(), {"x": torch.ones(7, 3)}, bf16=False) == 4 * (7 * 3 + 7 * 3 + 7 * 5)


def test_ratios_are_within_a_round(monkeypatch, tmp_path):
    """A machine that is half as fast in the second round changes no ratio."""

    class HereAndNow:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, function, record):
            return SimpleNamespace(result=lambda: function(record))

    measured = []

    def made_up_measure(record):
        norm = record["options"]["norm_type"]
        measured.append(norm)
        speed = {"layer_norm": 100.0, "frn": 80.0}[norm] / (1 if len(measured) <= 2 else 2)
        return {"tokens_per_second": speed, "kept_bytes": {"layer_norm": 10, "frn": 25}[norm]}

    monkeypatch.setattr(gallery_costs, "ProcessPoolExecutor", HereAndNow)
    monkeypatch.setattr(gallery_costs, "measure", made_up_measure)
    curves = made_up(tmp_path, PRE | tuned("pre", "frn", [6.4, 6.4], [], []))
    pre, frn = measure_all(curves, repeats=2)
    assert measured == ["layer_norm", "frn"] * 2
    assert pre["speed_ratios"] == [1.0, 1.0] and pre["memory_ratio"] == 1.0
    assert frn["speed_ratios"] == pytest.approx([0.8, 0.8]) and frn["memory_ratio"] == 2.5
    assert frn["tokens_per_second"] == [80.0, 40.0]


def test_without_the_reference_nothing_is_measured(tmp_path):
    curves = made_up(tmp_path, tuned("post", "layer_norm", [6.4, 6.4], [], []))
    with pytest.raises(UserError, match="pre, layer_norm"):
        measure_all(curves, repeats=1)


def run_gallery(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["recipes/gallery.py", *map(str, words)])
    return gallery.main()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["{study}", "--repeat", "2"], "--repeat: unknown option; did you mean repeats?"),
        (["{study}", "--repeats", "-1"], "repeats -1: must be at least 0"),
        (["{study}/elsewhere"], "elsewhere: holds no runs"),
        ([], "required: STUDY"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, tmp_path, capsys, words, error):
    (tmp_path / "runs").mkdir()
    assert run_gallery(monkeypatch, *(word.format(study=tmp_path) for word in words)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and error in message and message.count("\n") == 1


def test_a_study_from_its_runs_to_its_report(monkeypatch, tmp_path, corpus_dir, cache_dir):
    """Two real runs; each is measured in a process of its own, and the second report keeps what was found."""
    arms = {"norm_placement": ["pre", "sandwich"], "learning_rate": 1e-3, "warmup_steps": 2}
    base = TINY | {"train_file": str(corpus_dir), "cache_dir": str(cache_dir), "max_steps": 4}
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"base": base, "arms": [arms], "seeds": [1]}, sort_keys=False))
    study = read_study(config, {}, output_dir=tmp_path / "study")
    for arm in study.arms:
        pretrain(study.arguments(arm, 1))
    assert run_gallery(monkeypatch, tmp_path / "study", "--config", config, "--repeats", "1") == 0
    report = tmp_path / "study" / "report"
    summary = json.loads((report / "gallery.json").read_text())
    pre, sandwich = summary["costs"]
    for cost in (pre, sandwich):
        record = json.loads(
            next((tmp_path / "study/runs").glob(f"*{cost['norm_placement']}*/seed-1/run.json")).read_text()
        )
        model = BertLnForMaskedLM(BertLnConfig(**record["model_config"]))
        assert cost["parameters"] == model.num_parameters()
        assert cost["tokens_per_second"][0] > 0
        loss = f"{record['results']['validation_loss']:.4f}"
        assert f"| {cost['norm_placement']} | {loss} |" in (report / "gallery.md").read_text()
    assert pre["speed_ratios"] == [1.0]
    assert sandwich["kept_bytes"] > pre["kept_bytes"]  # two norms more a layer
    assert (report / "gallery.png").read_bytes().startswith(b"\x89PNG")
    assert "Unfinished" not in (report / "gallery.md").read_text()

    before = (report / "gallery.md").read_text()
    assert run_gallery(monkeypatch, tmp_path / "study", "--config", config, "--repeats", "0") == 0
    assert (report / "gallery.md").read_text() == before
    again = study.folder(study.arms[0], 1) / "run.json"
    assert measure(json.loads(again.read_text()), updates=2)["kept_bytes"] == pre["kept_bytes"]
