"""Tokenised tasks and their batches: every example once, in its place, with hardly any padding."""

import numpy as np
import pytest
import torch

from glue_eval.data import fingerprint, load_task
from glue_eval.encoding import collate, encode_task, evaluation_batches, load_split, training_batches
from glue_eval.tasks import TASKS
from tests.glue_made_up import small_tokenizer, write_task

LENGTHS = np.random.default_rng(0).integers(5, 128, size=1003)


@pytest.fixture
def encoded(tmp_path):
    def make(name="mrpc", max_length=64, token_types=True):
        examples = load_task(TASKS[name], str(write_task(tmp_path, name)), ["train", "validation"], True)
        tokenizer = small_tokenizer()
        folder = encode_task(
            examples, fingerprint(examples), tokenizer, max_length, token_types, tmp_path / "cache"
        )
        return examples["train"], load_split(folder, "train"), folder

    return make


@pytest.mark.parametrize("name", ["cola", "mrpc"])
@pytest.mark.parametrize("max_length", [24, 64])
def test_an_example_is_what_the_tokenizer_makes_of_it_alone(encoded, name, max_length):
    rows, split, _ = encoded(name, max_length)
    longer = 0
    for i in range(len(rows.labels)):
        pair = (rows.first[i], rows.second[i]) if rows.second else (rows.first[i],)
        alone = small_tokenizer()(*pair, truncation=True, max_length=max_length)
        piece = slice(split.starts[i], split.starts[i + 1])
        assert split.input_ids[piece].tolist() == alone["input_ids"]
        assert split.token_type_ids[piece].tolist() == alone["token_type_ids"]
        longer += len(small_tokenizer()(*pair)["input_ids"]) > max_length
    assert split.truncated == longer
    assert (longer > 0) == (max_length == 24)


@pytest.mark.parametrize("left", [False, True])
def test_a_batch_is_what_the_tokenizer_pads(encoded, left):
    rows, split, _ = encoded()
    chosen = np.array([3, 0, 7])
    texts = [[rows.first[i] for i in chosen], [rows.second[i] for i in chosen]]
    padded = small_tokenizer()(*texts, truncation=True, max_length=64, padding=True, return_tensors="pt",
                               padding_side="left" if left else "right")  # fmt: skip
    batch = collate(split, chosen, small_tokenizer().pad_token_id, left, torch.device("cpu"))
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
    for name, tensor in batch.items():
        assert torch.equal(tensor, padded[name])


def test_a_batch_of_equal_lengths_needs_no_mask(encoded):
    _, split, _ = encoded(token_types=False)
    batch = collate(split, np.array([5]), 0, False, torch.device("cpu"))
    assert set(batch) == {"input_ids"}


def test_a_task_is_tokenised_once(encoded, monkeypatch):
    _, _, folder = encoded()
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert encoded()[2] == folder
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert encoded(max_length=32)[2] != folder
    assert encoded(token_types=False)[2] != folder


@pytest.mark.parametrize("n", [1, 7, 32, 33, 1003])
@pytest.mark.parametrize("batch_size", [1, 16, 32])
def test_an_epoch_is_every_example_once(n, batch_size):
    batches = training_batches(LENGTHS[:n], batch_size, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    sizes = sorted(map(len, batches))
    assert len(batches) == -(-n // batch_size) and sizes[1:] == [batch_size] * (len(batches) - 1)


def test_epochs_and_seeds_differ_and_repeat():
    def epoch(seed, number):
        return [tuple(batch) for batch in training_batches(LENGTHS, 16, seed, number)]

    assert epoch(1, 0) == epoch(1, 0)
    for other in (epoch(1, 1), epoch(2, 0)):
        assert other != epoch(1, 0)
        assert set(map(frozenset, other)).isdisjoint(map(frozenset, epoch(1, 0)))


def test_hardly_anything_is_padding():
    def padding(batches):
        padded = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
        return 1 - LENGTHS.sum() / padded

    random = np.random.default_rng(1).permutation(len(LENGTHS))
    unsorted = [random[i : i + 16] for i in range(0, len(random), 16)]
    assert padding(unsorted) > 0.4
    assert padding(training_batches(LENGTHS, 16, 1, 0)) < 0.08


def test_long_and_short_batches_are_mixed():
    """Otherwise the learning rate would favour a length."""
    means = [LENGTHS[batch].mean() for batch in training_batches(LENGTHS, 16, 1, 0)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.4


@pytest.mark.parametrize("n", [1, 300, 1003])
def test_an_evaluation_is_every_example_once_in_batches_that_fit(n):
    batches = list(evaluation_batches(LENGTHS[:n]))
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert all(len(batch) * LENGTHS[batch].max() <= 16_384 for batch in batches)
    assert len(batches) <= 1 + LENGTHS[:n].sum() / 8_000
