"""Dropout on a CPU: what it drops, how often, and that nothing else changes."""

import math

import pytest
import torch
from model_fixtures import batch, ours, randomise
from test_fast_paths import loss_and_gradients, masked_batch
from torch import nn
from transformers import AutoModelForMaskedLM

from recipes.arguments import model_config
from recipes.command_line import build_arguments
from recipes.dropout import CHANCES, KERNEL, CheapDropout, attend, cheap_dropout, cheapen_dropout
from recipes.fast_paths import compile_regions
from recipes.pretraining import build_model

CPU = torch.device("cpu")
MANY = 2**20
MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 128}


@pytest.mark.parametrize("p", [1 / CHANCES, 0.1, 0.5, 0.9, 1 - 1 / CHANCES])
def test_it_drops_as_often_as_it_says_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropped = cheap_dropout(torch.ones(MANY), p, True) == 0
    rounded = round(p * CHANCES) / CHANCES
    assert abs(rounded - p) <= 0.5 / CHANCES
    deviation = math.sqrt(MANY * rounded * (1 - rounded))
    assert abs(int(dropped.sum()) - MANY * rounded) < 5 * deviation
    torch.testing.assert_close(
        cheap_dropout(torch.ones(MANY), p, True).unique(), torch.tensor([0, 1 / (1 - rounded)])
    )


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (cheap_dropout(torch.ones(MANY), 0.5, True) == 0).double()
    for lag in range(1, 9):  # four elements share a draw
        agreement = float((dropped[lag:] == dropped[:-lag]).double().mean())
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(MANY)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (2, 5, 4)])
def test_what_is_dropped_gets_no_gradient_and_what_is_kept_its_scale(dtype, shape):
    x = torch.rand(shape, dtype=dtype).add(1).requires_grad_()
    given = torch.rand(shape, dtype=dtype)
    y = cheap_dropout(x, 0.25, True)
    y.backward(given)
    kept = y.detach() != 0
    torch.testing.assert_close(y.detach(), x.detach() * kept / 0.75)
    torch.testing.assert_close(x.grad, given * kept / 0.75)


def test_a_transposed_tensor_is_as_good():
    x = torch.rand(6, 4).t()
    y = cheap_dropout(x, 0.5, True)
    torch.testing.assert_close(y, x * (y != 0) * 2)


def test_pytorch_finds_the_operator_well_made():
    x = torch.rand(5, 3, requires_grad=True)
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.bert_ln.dropout.default, (x, CHANCES // 4), test_utils=names)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (1e-6, True), (0.5, False)])
def test_where_nothing_is_dropped_nothing_is_done(p, training):
    x = torch.rand(3)
    assert cheap_dropout(x, p, training) is x


def test_all_may_be_dropped():
    assert not cheap_dropout(torch.ones(9), 1.0, True).any()


def test_the_seed_decides():
    def draw(seed):
        torch.manual_seed(seed)
        return cheap_dropout(torch.ones(1000), 0.5, True)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("mask", [None, torch.tensor([0, 0, float("-inf"), 0, 0]).double().expand(5, 5)])
def test_attention_is_that_of_the_model_without_dropout(mask):
    query, key, value = (torch.rand(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    found, weights = attend(nn.Identity(), query, key, value, mask, scaling=0.3, dropout=0.0)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))


def test_attention_drops_its_weights():
    query, key, value = (torch.rand(2, 3, 5, 8) for _ in range(3))
    _, plain = attend(nn.Identity(), query, key, value, None, scaling=0.3)
    found, weights = attend(nn.Identity(), query, key, value, None, scaling=0.3, dropout=0.5)
    kept = weights != 0
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(weights, plain * kept * 2)
    torch.testing.assert_close(found, (weights @ value).transpose(1, 2))


def cheap(placement="pre", **settings):
    settings = {"sparse_prediction": True, "attn_implementation": "eager"} | settings
    model = randomise(ours("ForMaskedLM", placement, **settings))
    cheapen_dropout(model, has_mask=False)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_a_model_goes_on_training_or_not_as_before(training):
    model = ours("ForMaskedLM").train(training)
    cheapen_dropout(model, has_mask=False)
    assert {module.training for module in model.modules()} == {training}


def test_a_model_that_is_not_training_is_the_same():
    plain = randomise(ours("ForMaskedLM", sparse_prediction=True, attn_implementation="eager"))
    model = cheap()
    assert model.config._attn_implementation == KERNEL
    assert model.state_dict().keys() == plain.state_dict().keys()
    inputs = batch()
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)


def test_every_dropout_of_a_model_is_the_cheap_one():
    kinds = {type(module) for module in cheap().modules() if isinstance(module, nn.Dropout)}
    assert kinds == {CheapDropout}


def test_gradient_checkpointing_draws_the_same_again():
    plain, frugal = cheap().train(), cheap().train()
    frugal.gradient_checkpointing_enable()
    results = []
    for model in (plain, frugal):
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, **masked_batch()))
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_compiled_it_draws_the_same():
    torch._dynamo.reset()
    plain, compiled = cheap().train(), cheap().train()
    compile_regions(compiled)
    results = []
    for model in (plain, compiled):
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, **masked_batch(), num_items_in_batch=torch.tensor(11.0)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, KERNEL),
        ({"bf16": False}, "sdpa"),
        ({"attention_probs_dropout_prob": 0.0}, "eager"),
        ({"attn_implementation": "eager", "isolate_documents": True}, "eager"),
    ],
)
def test_training_on_a_cpu_takes_it(options, kernel):
    args = build_arguments(MODEL | {"bf16": True, "max_seq_length": 128} | options)
    model = build_model(args, model_config(args, vocab_size=61, pad_token_id=0), CPU)
    assert model.config._attn_implementation == kernel
    assert {type(m) for m in model.modules() if isinstance(m, nn.Dropout)} == {CheapDropout}


def test_nothing_of_it_is_in_a_checkpoint(tmp_path):
    model = cheap()
    model.save_pretrained(tmp_path)
    assert KERNEL not in (tmp_path / "config.json").read_text()
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    inputs = batch()
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
