"""A checkpoint is whole or absent, damage is noticed, and the last good one always remains."""

import json
import os
import shutil

import pytest
import torch
from transformers import BertTokenizer

from bert_ln import BertLnConfig, BertLnForMaskedLM
from recipes import checkpointing
from recipes.checkpointing import (
    NotWritten,
    TrainState,
    damage_of,
    find_checkpoint,
    is_complete,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from recipes.errors import UserError


@pytest.fixture
def save(tmp_path):
    config = BertLnConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertLnForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmno"]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(names)})

    def do(step):
        model(
            input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([[2, step % 15 + 5, 3]])
        ).loss.backward()
        optimizer.step()
        return save_checkpoint(tmp_path, TrainState(step=step), model, tokenizer, optimizer, {"options": {}})

    do.model, do.optimizer = model, optimizer
    return do


def test_what_was_saved_is_loaded(save):
    folder = save(7)
    saved = {name: p.clone() for name, p in save.model.state_dict().items()}
    moments = save.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    save(8)
    state = load_checkpoint(folder, save.model, save.optimizer)
    assert state == TrainState(step=7)
    for name, p in save.model.state_dict().items():
        assert torch.equal(p, saved[name]), name
    assert torch.equal(save.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    # Weights and embedding stay tied.
    assert save.model.cls.predictions.decoder.weight is save.model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "trainer/optimizer.pt", "complete.json"]
)
def test_damage_is_found_and_the_one_before_is_taken(save, tmp_path, file):
    good, bad = save(1), save(2)
    content = bytearray((bad / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bad / file).write_bytes(bytes(content))
    assert damage_of(good) is None
    found, passed_over = find_checkpoint(tmp_path, None)
    assert found == good
    assert len(passed_over) == 1
    assert "checkpoint-2" in passed_over[0]
    with pytest.raises(UserError, match="resume_from_checkpoint"):
        find_checkpoint(tmp_path, str(bad))
    with pytest.raises(UserError, match="a run is always continued"):
        find_checkpoint(tmp_path, False)


def test_without_its_marker_a_folder_does_not_exist(save, tmp_path):
    good, torn = save(1), save(2)
    (torn / "complete.json").unlink()
    assert find_checkpoint(tmp_path, True)[0] == good
    # And the same step can be saved again over it.
    assert is_complete(save(2))


def test_steps_are_numbers(save, tmp_path):
    for step in (9, 10, 100):
        save(step)
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(tmp_path, None)[0].name == "checkpoint-100"


def test_pruning_keeps_the_newest_complete_ones(save, tmp_path):
    for step in (1, 2, 3, 4):
        save(step)
    (tmp_path / "checkpoint-4" / "complete.json").unlink()
    prune(tmp_path, None, newest=4)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4
    prune(tmp_path, 2, newest=4)
    kept = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_pruning_never_takes_the_one_just_saved(save, tmp_path):
    """A later checkpoint was found damaged, and the run went back to an earlier one."""
    damaged, good = save(12), save(10)
    (damaged / "model.safetensors").write_bytes(b"")
    prune(tmp_path, 1, newest=10)
    assert find_checkpoint(tmp_path, None)[0] == good


def test_saving_a_step_again_replaces_it(save, tmp_path):
    first = save(3)
    before = (first / "model.safetensors").read_bytes()
    assert (save(3) / "model.safetensors").read_bytes() != before
    assert damage_of(first) is None
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("function", ["torch.save", "write_model", "write_json", "sync_tree", "os.replace"])
def test_a_save_that_fails_leaves_the_last_one(save, tmp_path, monkeypatch, function):
    good = save(1)

    def fail(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        owner, _, name = function.rpartition(".")
        target = {"torch": torch, "os": os, "": checkpointing}[owner]
        patch.setattr(target, name, fail)
        with pytest.raises(NotWritten, match="OSError: no space"):
            save(2)
        assert not list(tmp_path.glob(".checkpoint*"))
    assert find_checkpoint(tmp_path, None) == (good, [])
    assert is_complete(save(2))
    assert not list(tmp_path.glob(".checkpoint*"))


def test_the_marker_is_the_last_file(save, monkeypatch):
    """Whatever is there when the folder gets its name is covered by the marker."""
    seen = {}
    replace = os.replace

    def spy(source, target):
        if source.is_dir():
            marker = json.loads((source / "complete.json").read_text())
            files = {f.relative_to(source).as_posix() for f in source.rglob("*") if f.is_file()}
            seen["uncovered"] = files - set(marker["files"])
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    save(1)
    assert seen["uncovered"] == {"complete.json"}


def test_other_formats_are_refused(save, tmp_path):
    folder = save(1)
    marker = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps(marker | {"format": 99}))
    assert "format 99" in damage_of(folder)
    assert find_checkpoint(tmp_path, None)[0] is None
    shutil.rmtree(folder)
    assert damage_of(folder) == "no such folder"
