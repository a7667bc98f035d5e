"""What Xiong et al. 2020 (arXiv 2002.04745) prove about the first update, and the setting in which they do.

Closed forms by `norm_placement`, and the paper's simplified model built from the real modules. Norms are
given as mean squares, `||x||^2 / d`, so that a vector that leaves a norm has 1.

Two statements are weaker than they look:

- The gradient bounds (Theorem 1) are upper bounds O(.) for the last layer. Only their dependence on the depth
  L is compared, as an exponent.
- The factor (2/3)^((L-l)/2) of Post-LN (appendix F, "preliminary") is that of the product of the *expected*
  layer Jacobians: with zero-mean weights a residual branch is the identity in expectation, and what remains
  of a layer is its norms, sqrt(2/3) at most. It is a statement about a single token's gradient, and about
  the part of it that passes straight through the residual stream (`Measurement.straight_through`). The part
  that the weights scatter, which an expectation over weights drops, makes up for it: an FFN of the simplified
  model multiplies the squared norm of a gradient by 1 + 1/2, just what the norm behind it takes away. The
  gradient of a matrix, averaged over tokens and batches, holds both parts; and since tokens become alike with
  depth, theirs add up in other proportions than one token's. So the factor need not show in the norms of
  Fig. 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bert_ln import BertLnConfig, BertLnForMaskedLM
from recipes.randomness import random_bits

# What one norm pair of a Post-LN layer leaves of a gradient: 1 / sqrt(3/2), Lemmas 2 and 3.
POST_LAYER_FACTOR = (2 / 3) ** 0.5
# The paper leaves the vocabulary open; the cost of the output layer is kept small.
VOCABULARY = 1024
# Inputs drawn from the seed of the weights would repeat the weights' numbers; torch keeps 32 bits of a seed.
INPUTS, SEED_BITS = 100, 0xFFFFFFFF


@dataclass(frozen=True)
class Theory:
    """The paper's statements about one placement; l counts layers passed, L is the depth."""

    hidden_state: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    """Lemma 2: bounds of the mean square of the hidden state after layer l."""
    depth_exponent: float
    """Theorem 1: the last layer's W2 gradient goes like L to this power."""
    layer_factor: float
    """Appendix F: what the expected Jacobian of a layer leaves of a gradient, at most."""


def _post_hidden_state(layers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.full(len(layers), 1.5), np.full(len(layers), 1.5)


def _pre_hidden_state(layers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 1 + layers / 2, 1 + 3 * layers / 2


THEORY: dict[str, Theory] = {
    "post": Theory(_post_hidden_state, 0.0, POST_LAYER_FACTOR),
    "pre": Theory(_pre_hidden_state, -0.5, 1.0),
}


def expected_relu_norm(width: int, variance: float) -> float:
    """Lemma 1: E ||ReLU(X)||^2 for X ~ N(0, variance I) of `width` entries."""
    return variance * width / 2


def norm_jacobian(x: torch.Tensor) -> torch.Tensor:
    """Lemma 3: the Jacobian `[d, d]` of the layer norm (gain 1, bias 0, no eps) at `x` `[d]`.

    (sqrt(d) / ||y||) (I - y y^T / ||y||^2) (I - 1 1^T / d), with y the centred x.
    """
    d = len(x)
    identity = torch.eye(d, dtype=x.dtype)
    y = x - x.mean()
    centring = identity - torch.ones_like(identity) / d
    return d**0.5 / y.norm() * (identity - torch.outer(y, y) / y.dot(y)) @ centring


def exponent(sizes: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Slope of log(values) against log(sizes) by least squares; `values` [..., sizes] to [...]."""
    x = np.log(np.asarray(sizes, dtype=np.float64))
    x -= x.mean()
    return np.log(values) @ x / (x @ x)


def exponents_of_lemma_2(norm_placement: str, depths: Sequence[int]) -> tuple[float, float]:
    """The exponent over `depths` of 1 / ||x_L|| at each bound of Lemma 2.

    For Pre-LN it is -1/2 only in the limit: 1 + L/2 is not yet proportional to L at these depths.
    """
    bounds = THEORY[norm_placement].hidden_state(np.asarray(depths, dtype=np.float64))
    low, high = sorted(float(exponent(depths, bound**-0.5)) for bound in bounds)
    return low, high


def simplified_model(norm_placement: str, depth: int, width: int, seed: int) -> BertLnForMaskedLM:
    """The model of section 3.3: the real layers, with the weights and sizes of the theory.

    One head, all matrices `[width, width]`, ReLU. W_Q = W_K = 0: attention is the mean over the block. No
    output projection of attention: it is the identity. W_V, W1, W2 ~ N(0, 1/d), Xavier for a square matrix.
    No embedding norm: inputs are given as `inputs_embeds`, and nothing is added to them. The output layer is
    the word embedding matrix, ~ N(0, 1/d), without the transform that BERT has before it.
    """
    config = BertLnConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=depth, num_attention_heads=1,
        intermediate_size=width, hidden_act="relu", norm_placement=norm_placement, embedding_norm=False,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = BertLnForMaskedLM(config)
    for matrix in model.parameters():
        if matrix.ndim == 2:  # gains, biases and factors are vectors
            nn.init.normal_(matrix, std=width**-0.5)
    embeddings = model.bert.embeddings
    nn.init.zeros_(embeddings.position_embeddings.weight)
    nn.init.zeros_(embeddings.token_type_embeddings.weight)
    for layer in model.bert.encoder.layer:
        nn.init.zeros_(layer.attention.self.query.weight)
        nn.init.zeros_(layer.attention.self.key.weight)
        nn.init.eye_(layer.attention.output.dense.weight)
    model.cls.predictions.transform = nn.Identity()
    return model.eval()


def simplified_batches(
    num_batches: int, blocks: int, length: int, width: int, seed: int
) -> list[dict[str, Any]]:
    """Batches of the theory: i.i.d. Gaussian tokens `[blocks, length, width]`, random targets everywhere."""
    generator = torch.Generator().manual_seed(int(random_bits(INPUTS, seed)) & SEED_BITS)
    return [
        {
            "inputs_embeds": torch.randn(blocks, length, width, generator=generator),
            "labels": torch.randint(VOCABULARY, (blocks, length), generator=generator),
        }
        for _ in range(num_batches)
    ]
