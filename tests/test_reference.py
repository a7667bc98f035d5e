"""Reference curves: small, faithful, and strict about what compares."""

import json

import numpy as np
import pytest

from recipes.errors import UserError
from recipes.intervals import prediction_interval
from recipes.reference import compare_with_reference, draw_verdict, read_reference, write_reference
from recipes.study_results import read_run, read_runs
from tests.study_fixtures import FINGERPRINTS, UNIGRAM, curve, write_run


@pytest.fixture
def reference(tmp_path):
    """Two placements of three seeds that end at 4.0, 4.1, 4.2 and 3.0, 3.1, 3.2."""
    runs = [
        write_run(tmp_path / f"{p}{s}", s, curve(end + s / 10), norm_placement=p, learning_rate=1e-3)
        for p, end in (("post", 4.0), ("pre", 3.0))
        for s in range(3)
    ]
    return read_reference(write_reference(read_runs(runs), tmp_path / "made_up.json", "python this"))


@pytest.fixture
def run(tmp_path):
    def make(name, losses, seed=9, **options):
        options = {"norm_placement": "pre", "learning_rate": 1e-3} | options
        return read_run(write_run(tmp_path / name, seed, losses, **options))

    return make


def test_what_was_measured_is_kept(reference):
    assert reference["name"] == "made_up"
    assert reference["unigram_cross_entropy"] == UNIGRAM
    assert {key: reference[key] for key in FINGERPRINTS} == FINGERPRINTS
    post = reference["arms"][0]
    assert post["options"] == {"norm_placement": "post", "learning_rate": 1e-3}
    second = post["runs"][1]
    assert second["seed"] == 1
    assert second["validation_loss"] == pytest.approx(curve(4.1), abs=1e-5)
    assert second["step"][:2] == [100, 200]
    assert second["tokens_seen"][:2] == [102_400, 204_800]
    assert second["grad_norm"][:2] == [1.6, 1.7]


def test_a_large_study_is_a_small_file(tmp_path):
    rng = np.random.default_rng(0)
    runs = [
        write_run(
            tmp_path / f"{p}{r}{w}{s}",
            s,
            rng.normal(4, 1, 16),
            norm_placement=p,
            learning_rate=r,
            warmup_steps=w,
        )
        for p in ("post", "pre")
        for r in (1e-4, 3e-4, 1e-3)
        for w in (0, 100)
        for s in range(3)
    ]
    assert write_reference(read_runs(runs), tmp_path / "large.json").stat().st_size < 60_000


def test_every_run_of_a_long_reference_is_inside_its_own_band(tmp_path, run):
    # Convex early on, where all that the seeds differ by is less than a chord lies above the curve.
    early = 4 + 4 * np.exp(-np.arange(1, 201) / 4)
    runs = [run(f"r{seed}", early + seed / 1000, seed=seed) for seed in range(3)]
    reference = read_reference(write_reference(read_runs([r.folder for r in runs]), tmp_path / "r.json"))
    for one in runs:
        (band,) = compare_with_reference(reference, one).bands
        assert len(band.steps) == 200
        assert band.inside.all()


def test_a_run_is_compared_with_the_arm_of_its_options(reference, run):
    verdict = compare_with_reference(reference, run("own", curve(3.15)))
    assert verdict.matched
    (band,) = verdict.bands
    assert band.label.startswith("pre")
    assert band.inside.all()
    assert "inside the 95 % prediction interval of one new run at 10 of 10 validations" in "".join(
        verdict.lines
    )
    _, low, high = prediction_interval([3.0, 3.1, 3.2])
    assert f"3.1500 at update 1,000 is inside [{low:.4f}, {high:.4f}]" in verdict.lines[-1]


def test_a_run_that_ends_elsewhere_is_outside(reference, run):
    # Like the reference for half of its updates.
    verdict = compare_with_reference(reference, run("far", [*curve(3.1)[:5], 5.5, 5.4, 5.3, 5.2, None]))
    assert verdict.bands[0].inside.tolist() == [True] * 5 + [False] * 5
    assert "no number at update 1,000 is outside" in verdict.lines[-1]


def test_a_run_is_judged_only_at_updates_at_which_the_reference_was_validated(tmp_path, run):
    one = run("whole", [4.0, 3.0], seed=0)
    other = run("whole2", [4.2, 3.2], seed=1)
    reference = read_reference(write_reference(read_runs([one.folder, other.folder]), tmp_path / "r.json"))
    mine = run("mine", [3.5])

    def verdict(*steps):
        lines = [json.dumps({"step": step, "validation_loss": 3.5}) for step in steps]
        (mine.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return compare_with_reference(reference, read_run(mine.folder))

    some = verdict(50, 100, 150, 200, 250)
    assert some.bands[0].steps.tolist() == [100, 200]
    assert some.bands[0].mean == pytest.approx([4.1, 3.1])
    assert "  left out: 3 at updates at which the reference was not" in some.lines
    assert not any("left out" in line for line in verdict(100, 200).lines)
    with pytest.raises(UserError, match=r"no validation at an update .* \(100, 200\)"):
        verdict(50, 150)


def test_a_repeated_run_is_inside_despite_rounding(tmp_path, run):
    exact = [5 + 1 / 3, 4 + 2 / 3]  # rounded down, and up
    runs = [run(f"r{seed}", exact, seed=seed) for seed in range(2)]
    reference = read_reference(write_reference(read_runs([r.folder for r in runs]), tmp_path / "r.json"))
    assert compare_with_reference(reference, runs[0]).bands[0].inside.all()


def test_other_options_are_told(reference, run):
    verdict = compare_with_reference(reference, run("decay", curve(3.1), weight_decay=0.1, logging_steps=7))
    assert verdict.bands[0].differences == ["weight_decay is 0.1, the reference has 0.01"]


def test_a_run_like_no_arm_is_compared_with_all(reference, run):
    verdict = compare_with_reference(reference, run("rate", curve(3.1), learning_rate=5e-4))
    assert not verdict.matched
    assert len(verdict.bands) == 2
    assert "learning_rate is 0.0005, the reference has 0.001" in verdict.bands[1].differences


def test_one_seed_is_no_band_and_diverged_seeds_are_left_out(tmp_path, run):
    good, bad = run("good", curve(4), seed=0), run("bad", [9.0, None], seed=1, diagnosis="diverged")
    bad = bad.folder
    reference = read_reference(write_reference(read_runs([good.folder, bad]), tmp_path / "r.json"))
    verdict = compare_with_reference(reference, run("mine", curve(4)))
    assert "2 seeds, 1 diverged" in verdict.lines[1]
    assert "one seed, so there is no band" in verdict.lines[-1]
    only_bad = read_reference(write_reference(read_runs([bad]), tmp_path / "r2.json"))
    assert (
        "every seed of the reference diverged"
        in compare_with_reference(only_bad, run("x", curve(4))).lines[-1]
    )


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("corpus_fingerprints", "other corpora"),
        ("tokenizer_fingerprint", "other tokenizer"),
        ("mask_fingerprint", "other validation masks"),
    ],
)
def test_a_run_on_other_data_is_refused(reference, run, key, word):
    other = run("other", curve(3.1), fingerprints=FINGERPRINTS | {key: "other"})
    with pytest.raises(UserError, match=word):
        compare_with_reference(reference, other)


def test_a_run_that_is_not_yet_there_is_refused(reference, run):
    with pytest.raises(UserError, match="no validation at an update"):
        compare_with_reference(reference, run("young", [], finished=False))


def test_a_figure_shows_the_run_on_the_band(reference, run, tmp_path):
    verdict = compare_with_reference(reference, run("own", curve(3.15)))
    png = draw_verdict(verdict, tmp_path / "figure")
    assert png.read_bytes().startswith(b"\x89PNG")
    svg = png.with_suffix(".svg").read_text()
    assert "this run (own, seed 9)" in svg
    assert verdict.bands[0].label in svg
    other = compare_with_reference(reference, run("other", curve(3.15)))
    assert draw_verdict(other, tmp_path / "figure").name == "against_made_up_other.png"
    assert png.name == "against_made_up_own.png"


def test_no_reference(tmp_path, run):
    with pytest.raises(UserError, match="no such reference"):
        read_reference("compare_nothing")
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"format": 1}')
    with pytest.raises(UserError, match="not a reference"):
        read_reference(damaged)
    with pytest.raises(UserError, match=r"no run of .* is finished"):
        write_reference(read_runs([run("begun", [5.0], finished=False).folder]), tmp_path / "r.json")
    assert np.isnan(read_run(run("null", [None]).folder).losses).all()
