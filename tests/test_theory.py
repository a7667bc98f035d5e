"""What Xiong et al. 2020 prove, on the real modules in the paper's simplified setting; no more than that."""

import numpy as np
import pytest
import torch

from bert_ln import BertLnConfig
from bert_ln.norms import build_norm
from recipes.gradient_probe import measure
from recipes.intervals import mean_interval
from recipes.theory import (
    THEORY,
    expected_relu_norm,
    exponent,
    exponents_of_lemma_2,
    norm_jacobian,
    simplified_batches,
    simplified_model,
)

WIDTH, DEPTHS, SEEDS = 128, (6, 12, 24), range(5)


@pytest.fixture(scope="module")
def sweep():
    """Measurements by (placement, depth), a list over seeds."""

    def one(placement, depth, seed):
        return measure(
            simplified_model(placement, depth, WIDTH, seed), simplified_batches(2, 8, 64, WIDTH, seed)
        )

    return {(p, d): [one(p, d, seed) for seed in SEEDS] for p in THEORY for d in DEPTHS}


def test_lemma_1_on_the_first_half_of_the_feed_forward_network():
    model = simplified_model("pre", 1, 256, seed=0)
    x = torch.randn(500, 256, generator=torch.Generator().manual_seed(1))
    squared_norms = model.bert.encoder.layer[0].intermediate(x).square().sum(dim=1)
    assert squared_norms.mean().item() == pytest.approx(expected_relu_norm(256, 1.0), rel=0.03)


def test_lemma_3_is_what_autograd_finds_in_the_norm():
    x = 3 + 2 * torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = build_norm(BertLnConfig(layer_norm_eps=1e-30), 24).double()
    torch.testing.assert_close(norm_jacobian(x), torch.autograd.functional.jacobian(norm, x))


def test_lemma_2_the_hidden_state_of_post_ln_is_three_halves(sweep):
    for depth in DEPTHS:
        low, high = THEORY["post"].hidden_state(np.arange(1, depth + 1))
        mean, _, _ = mean_interval([one.hidden_state for one in sweep["post", depth]])
        assert (low == high).all()
        assert mean.mean() == pytest.approx(low.mean(), rel=0.05)
        np.testing.assert_allclose(mean, low, rtol=0.2)


def test_lemma_2_the_stream_of_pre_ln_lies_within_its_bounds(sweep):
    for depth in DEPTHS:
        low, high = THEORY["pre"].hidden_state(np.arange(1, depth + 1))
        mean, _, _ = mean_interval([one.hidden_state for one in sweep["pre", depth]])
        assert (mean > 0.95 * low).all()
        assert (mean < high).all()


def fitted(sweep, placement):
    return exponent(DEPTHS, np.array([[s.w2_gradient[-1] for s in sweep[placement, d]] for d in DEPTHS]).T)


def test_theorem_1_the_last_gradient_of_post_ln_does_not_depend_on_depth(sweep):
    mean, low, high = mean_interval(fitted(sweep, "post"))
    assert abs(mean) < 0.12
    assert low - 0.05 < 0 < high + 0.05


def test_theorem_1_the_last_gradient_of_pre_ln_falls_like_one_over_the_root_of_depth(sweep):
    """Over few batches. Averaged over many, what the tokens share is left, and that falls slower."""
    mean, low, high = mean_interval(fitted(sweep, "pre"))
    steepest, flattest = exponents_of_lemma_2("pre", DEPTHS)
    assert -0.5 < steepest < flattest < -0.4
    assert mean == pytest.approx(-0.5, abs=0.12)
    assert low - 0.05 < -0.5 < high + 0.1


def test_what_passes_straight_through_post_ln_decays_at_least_as_two_thirds(sweep):
    layers = np.arange(11, 0, -1)  # L - l
    passed = np.mean([one.straight_through for one in sweep["post", 12]], axis=0)
    straight = np.cumprod(passed[::-1])[::-1]
    assert (straight < 1.05 * THEORY["post"].layer_factor ** layers).all()
    assert (np.diff(straight) > 0).all()


def test_what_passes_straight_through_is_what_the_norms_let_through(sweep):
    """Lemma 3 layer by layer: one over the root mean squares of the two norms' inputs."""
    for one in sweep["post", 12]:
        norms = 1 / np.sqrt(list(one.norm_inputs.values())).reshape(12, 2).prod(axis=1)
        np.testing.assert_allclose(one.straight_through, norms[1:], rtol=0.12)


def test_a_layer_of_pre_ln_passes_gradients_on_unchanged(sweep):
    for one in sweep["pre", 12]:
        np.testing.assert_allclose(one.straight_through, 1.0, atol=0.05)


def test_attention_of_the_simplified_model_is_the_mean_of_the_values():
    model = simplified_model("post", 2, 32, seed=3)
    attention = model.bert.encoder.layer[1].attention
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    values = x.mean(dim=1, keepdim=True) @ attention.self.value.weight.T
    projected = attention.output.project(attention.self(x)[0])
    torch.testing.assert_close(projected, values.expand(2, 8, 32))


def test_weights_are_those_of_the_theory_and_inputs_are_none_of_them():
    model, (batch,) = simplified_model("pre", 1, 128, seed=5), simplified_batches(1, 8, 64, 128, seed=5)
    layer = model.bert.encoder.layer[0]
    for matrix in (layer.attention.self.value, layer.intermediate.dense, layer.output.dense):
        assert matrix.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    drawn = batch["inputs_embeds"].flatten()
    assert drawn.std().item() == pytest.approx(1, rel=0.02)
    # The numbers that the same seed gives to the weights.
    of_weights = torch.randn(len(drawn), generator=torch.Generator().manual_seed(5))
    assert abs(torch.corrcoef(torch.stack([of_weights, drawn]))[0, 1]) < 0.05


def test_an_exponent_is_recovered_exactly():
    depths = np.array([6, 8, 24])
    np.testing.assert_allclose(exponent(depths, np.array([3 * depths**-0.5, depths**2.0])), [-0.5, 2.0])
