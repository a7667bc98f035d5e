"""The validation loss: equal for every way of computing it, and equal to a plain reference."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from bert_ln import BertLnForMaskedLM
from recipes.batches import BlockReader
from recipes.masking import Masker
from recipes.preparation import prepare_data
from recipes.stages import build_stages
from recipes.validation import Validation


@pytest.fixture
def validation(tiny):
    def make(**options):
        args = tiny(**options)
        data = prepare_data(args, build_stages(args), Accelerator(cpu=True))
        reader = BlockReader(data.stores, "validation", Masker(data.tokenizer, args))
        return Validation(reader, args.max_seq_length, args.max_eval_samples)

    return make


def model(placement="post"):
    torch.manual_seed(1)
    config = BertLnForMaskedLM.config_class(
        vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        norm_placement=placement, sparse_prediction=True, initializer_range=0.3,
    )  # fmt: skip
    return BertLnForMaskedLM(config)


def test_equals_a_plain_reference_with_the_stock_class(validation):
    v = validation(max_eval_samples=17)
    ours = v(model(), Accelerator(cpu=True), 4)
    stock = BertForMaskedLM(
        BertConfig(
            vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    ).eval()
    stock.load_state_dict(model().state_dict())
    losses, hits = [], []
    for ids, positions, labels in zip(v.batch["input_ids"], v.batch["masked_positions"], v.batch["labels"]):
        used = labels != -100
        with torch.no_grad():
            logits = stock(ids[None]).logits[0][positions[used]]
        losses += F.cross_entropy(logits, labels[used], reduction="none").double().tolist()
        hits += (logits.argmax(-1) == labels[used]).tolist()
    assert ours["masked_tokens"] == len(losses) == v.masked_tokens
    assert ours["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert ours["validation_accuracy"] == pytest.approx(np.mean(hits))


def test_batch_size_does_not_matter_and_repetition_is_exact(validation):
    v, m, accelerator = validation(max_eval_samples=None), model("pre"), Accelerator(cpu=True)
    values = [v(m, accelerator, size)["validation_loss"] for size in (1, 3, 8, 1000)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)
    assert v(m, accelerator, 3)["validation_loss"] == values[1]
    assert m.training


def test_masks_are_frozen(validation):
    a, b = validation(seed=1), validation(seed=2)
    assert a.mask_fingerprint == b.mask_fingerprint
    assert all(torch.equal(a.batch[name], b.batch[name]) for name in a.batch)
    assert validation(mlm_probability=0.3).mask_fingerprint != a.mask_fingerprint
    assert validation(max_eval_samples=39).mask_fingerprint != a.mask_fingerprint


def test_samples_are_spread_over_the_validation_text(validation):
    few, all_blocks = validation(max_eval_samples=5), validation(max_eval_samples=None)
    assert few.blocks == 5
    assert torch.equal(few.batch["input_ids"][0], all_blocks.batch["input_ids"][0])
    assert torch.equal(few.batch["input_ids"][-1], all_blocks.batch["input_ids"][-1])


def test_an_untrained_model_is_as_lost_as_a_uniform_guess(validation):
    m = BertLnForMaskedLM(BertLnForMaskedLM.config_class(
        vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        sparse_prediction=True))  # fmt: skip
    loss = validation(max_eval_samples=None)(m, Accelerator(cpu=True), 16)["validation_loss"]
    assert 0.7 * 1000 < np.exp(loss) < 1.3 * 1000


def test_nothing_random_is_drawn(validation):
    v, m = validation(), model()
    before = torch.get_rng_state()
    v(m, Accelerator(cpu=True), 8)
    assert torch.equal(before, torch.get_rng_state())
