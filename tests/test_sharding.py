"""FSDP2: the same run as with DDP, of which each process holds a part; the same checkpoints."""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from recipes.errors import UserError
from recipes.pretraining import pretrain
from tests.conftest import ROOT, TINY, accelerate, metrics_of
from tests.sharded_runs import SAME
from tests.test_training import digest

CONFIG = ROOT / "recipes" / "configs" / "accelerate" / "fsdp2.yaml"
# With dropout, accumulation, and a last round of validation in which one process has no blocks.
OPTIONS = TINY | {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_eval_samples": 33,
    "per_device_eval_batch_size": 4,
}
COMMAND = [accelerate(), "launch", "--config_file", CONFIG, "--num_processes=2", "--main_process_port=0"]
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true"}
FIGURES = ("train_loss", "validation_loss", "grad_norm", "below_unigram_cross_entropy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus_dir, cache_dir):
    """What tests/sharded_runs.py leaves: starting two processes takes longer than its runs."""
    folder = tmp_path_factory.mktemp("runs")
    paths = {"train_file": corpus_dir, "cache_dir": cache_dir, "output_dir": folder}
    options = json.dumps(OPTIONS | {name: str(path) for name, path in paths.items()})
    done = subprocess.run(
        [*COMMAND, "-m", "tests.sharded_runs", options],
        env=os.environ | ENVIRONMENT, cwd=ROOT, text=True, capture_output=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def tensors(folder):
    """Weights and moments of a checkpoint."""
    moments = torch.load(folder / "trainer" / "optimizer.pt", weights_only=True)
    state = {f"{i} {name}": v for i, values in moments["state"].items() for name, v in values.items()}
    return load_file(folder / "model.safetensors") | state, moments["param_groups"]


def assert_same_lines(one, two, tolerance):
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            is_exact = name not in FIGURES or b[name] is None  # the norm of a skipped update
            expected = b[name] if is_exact else pytest.approx(b[name], rel=tolerance, abs=tolerance)
            assert a[name] == expected, (a["step"], name)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("", 1e-5), ("bf16_", 1e-3), ("radam_", 1e-5), ("muon_", 1e-3), ("skip_", 1e-5), ("rollback_", 1e-5)],
)
def test_metrics_weights_and_moments_are_those_of_ddp(runs, kind, tolerance):
    ddp, fsdp = runs / f"{kind}ddp", runs / f"{kind}fsdp"
    assert_same_lines(fsdp, ddp, tolerance)
    (expected, groups), (found, found_groups) = (tensors(run / "checkpoint-8") for run in (ddp, fsdp))
    assert list(found) == list(expected)
    assert found_groups == groups
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance, msg=name)
    assert (fsdp / "config.json").read_bytes() == (ddp / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["skip", "rollback"])
def test_what_is_not_finite_was_met(runs, kind):
    told = {"skip": "skipped", "rollback": "rolled_back_from"}[kind]
    assert len(metrics_of(runs / f"{kind}_fsdp", told)) == 1


def test_a_process_holds_half(runs):
    (first, whole), (second, _) = (json.loads((runs / "fsdp" / f"held-{i}.json").read_text()) for i in (0, 1))
    assert first + second == whole
    assert first == pytest.approx(whole / 2, rel=0.05)
    assert json.loads((runs / "ddp" / "held-1.json").read_text()) == [whole, whole]


def test_interrupted_twice_it_ends_bit_for_bit(runs):
    names = {folder.name for folder in (runs / "stopped").glob("checkpoint-*")}
    assert names == {"checkpoint-4", "checkpoint-8"}
    assert digest(runs / "stopped" / "checkpoint-8") == digest(runs / "fsdp" / "checkpoint-8")
    assert metrics_of(runs / "stopped") == metrics_of(runs / "fsdp")


def test_from_ddp_to_fsdp2_to_one_process(runs, tiny, tmp_path):
    """Three updates with DDP, four with FSDP2, the last here; against one process for all."""
    one = OPTIONS | {"per_device_train_batch_size": 8} | SAME
    pretrain(tiny(**one))
    pretrain(tiny(**one | {"output_dir": str(runs / "moved")}))
    assert_same_lines(runs / "moved", tmp_path / "run", 1e-5)
    (expected, groups), (found, found_groups) = (
        tensors(run / "checkpoint-8") for run in (tmp_path / "run", runs / "moved")
    )
    assert found_groups == groups
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=name)


def test_it_is_said_at_the_start(launch, tmp_path):
    """As a user starts it."""
    result = launch(launcher=COMMAND, env=ENVIRONMENT, output_dir=tmp_path / "run", max_steps=1)
    assert result.returncode == 0, result.stderr
    assert "each holds a part of the weights (FSDP2)" in result.stdout


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1: not supported; use --use_fsdp --fsdp_version 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "use_deepspeed: not supported; use --use_fsdp"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "fsdp_offload_params true: not supported; leave it out",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fsdp_activation_checkpointing true: not supported; give --gradient_checkpointing",
        ),
    ],
)
def test_what_the_launcher_may_not_ask_for(tiny, tmp_path, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        pretrain(tiny())
    assert not (tmp_path / "run").exists()
