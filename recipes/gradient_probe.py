"""Gradients and norms of a model, layer by layer, on batches that are given.

A gradient here is that of the project's loss (the sum over masked tokens divided by their number) over all
batches, in float32, without dropout: the elementwise average of the mini-batches' gradients, each with the
weight of its masked tokens, and only then the Frobenius norm, as in Fig. 3 of Xiong et al. 2020. The mean of
the mini-batches' own norms is recorded beside it: of a batch's noise it holds all, the average still the part
1 / batches of its square.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bert_ln.norms import NORM_CLASSES
from bert_ln.placements import Stream
from recipes.batches import with_all_positions
from recipes.masking import IGNORED

Batch = dict[str, torch.Tensor]


@dataclass
class Measurement:
    """What one model shows; lists have an entry a layer, from the input. Norms of vectors are mean squares
    over tokens and features, ||x||^2 / d."""

    loss: float
    """Nats a masked token."""
    w1_gradient: list[float]
    """Frobenius norm of the expected gradient of the FFN's first matrix."""
    w2_gradient: list[float]
    """The same of its second matrix."""
    w1_batch_gradient: list[float]
    """Mean of the norms of the mini-batches' own gradients, for comparison."""
    w2_batch_gradient: list[float]
    hidden_state: list[float]
    """The sum that a layer ends with, Lemma 2's x: the input of the layer's last norm where the layer ends
    with a norm (Post-LN: x^5), else the layer's output (Pre-LN: the stream)."""
    stream_gradient: list[float]
    """Root mean square over tokens of the norm of the gradient of the summed loss by the layer's output."""
    straight_through: list[float]
    """An entry less: which multiple of the gradient behind layer l + 1 is found in the gradient before it,
    <g_l, g_{l+1}> / <g_{l+1}, g_{l+1}>: what comes through the residual stream and its norms alone."""
    norm_inputs: dict[str, float]
    """The input of every norm of the encoder by the norm's name, in the order in which they are used.
    Divisions by the length of a query or key (`qk_norm="l2"`) are no norms here."""


def measure(model: PreTrainedModel, batches: Sequence[Batch]) -> Measurement:
    """Measure a masked-language model on `batches` (as the model takes them, with labels).

    Which blocks are in a batch together changes nothing but the figures of single mini-batches.
    """
    model.eval()
    matrices = [*_ffn(model, "intermediate"), *_ffn(model, "output")]  # W1 of all layers, then W2
    counts = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
    expected = [torch.zeros_like(matrix) for matrix in matrices]
    batch_norms = torch.zeros(len(matrices), dtype=torch.float64)
    loss = 0.0
    with Watch(model) as watch:
        for batch, count in zip(batches, counts, strict=True):
            batch = {name: value.to(model.device) for name, value in batch.items()}
            summed = model(**with_all_positions(batch), num_items_in_batch=1).loss
            gradients = torch.autograd.grad(summed, [*matrices, *watch.outputs])
            for total, gradient in zip(expected, gradients[: len(matrices)], strict=True):
                total += gradient / sum(counts)
            batch_norms += _norms(gradients[: len(matrices)]) / count / len(batches)
            watch.add_gradients(gradients[len(matrices) :])
            loss += summed.item() / sum(counts)
    norms, batch_norms, layers = _norms(expected).tolist(), batch_norms.tolist(), len(matrices) // 2
    return Measurement(
        loss=loss,
        w1_gradient=norms[:layers],
        w2_gradient=norms[layers:],
        w1_batch_gradient=batch_norms[:layers],
        w2_batch_gradient=batch_norms[layers:],
        **watch.results(),
    )


def _ffn(model: PreTrainedModel, half: str) -> list[nn.Parameter]:
    return [getattr(layer, half).dense.weight for layer in model.base_model.encoder.layer]


def _norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).double().cpu()


@dataclass
class Watch:
    """Hooks on the norms (found by their type) and on the layers of a model, while it is a context.

    After a forward pass `outputs` holds the layers' outputs, for their gradients; everything else is summed
    over the passes.
    """

    model: PreTrainedModel
    outputs: list[torch.Tensor] = field(default_factory=list)

    def __enter__(self) -> "Watch":
        encoder = self.model.base_model
        layers = encoder.encoder.layer
        self.tokens, self.norm_inputs, self.last_norm = 0, {}, (None, None)
        self.norm_vectors: dict[str, int] = {}
        self.hidden_states = [0.0] * len(layers)
        self.energies, self.products = [0.0] * len(layers), [0.0] * (len(layers) - 1)
        self.handles = [
            module.register_forward_hook(self._see_norm(name))
            for name, module in encoder.named_modules()
            if isinstance(module, NORM_CLASSES)
        ]
        self.handles += [layer.register_forward_hook(self._see_layer(i)) for i, layer in enumerate(layers)]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _see_norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.last_norm = (inputs[0], output)
            self.norm_inputs[name] = self.norm_inputs.get(name, 0.0) + _mean_squares(inputs[0])
            # Not the tokens: a norm may see each head, and may be used twice in a pass.
            self.norm_vectors[name] = self.norm_vectors.get(name, 0) + inputs[0].shape[:-1].numel()

        return hook

    def _see_layer(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Stream) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if number == 0:
                self.outputs.clear()
                self.tokens += output.shape[:-1].numel()
            self.outputs.append(output)
            norm_input, norm_output = self.last_norm
            # A layer that ends with a norm returns the very tensor that the norm made.
            state = norm_input if output is norm_output else output
            self.hidden_states[number] += _mean_squares(state)

        return hook

    def add_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Take the gradients of the summed loss by `outputs`, `[batch, length, hidden]` each."""
        for number, gradient in enumerate(gradients):
            self.energies[number] += gradient.double().square().sum().item()
        for number, (before, behind) in enumerate(pairwise(gradients)):
            self.products[number] += (before.double() * behind.double()).sum().item()

    def results(self) -> dict[str, Any]:
        """The fields of `Measurement` that hooks see."""
        behind = zip(self.products, self.energies[1:], strict=True)
        return {
            "hidden_state": [total / self.tokens for total in self.hidden_states],
            "stream_gradient": [(energy / self.tokens) ** 0.5 for energy in self.energies],
            "straight_through": [product / energy for product, energy in behind],
            "norm_inputs": {n: total / self.norm_vectors[n] for n, total in self.norm_inputs.items()},
        }


def _mean_squares(x: torch.Tensor) -> float:
    """The mean square of the features, summed over the vectors."""
    return x.detach().double().square().mean(dim=-1).sum().item()


def keep_bert(model: PreTrainedModel) -> None:
    """Keep what a new model with `initializer="normal"` has: N(0, initializer_range^2), biases 0 (Devlin et
    al. 2019), times the gain of the placement where it has one."""


def xavier_(model: PreTrainedModel) -> None:
    """Draw every linear matrix from N(0, 2 gain^2 / (n_in + n_out)) (Glorot and Bengio 2010), biases 0.

    The gain is 1 but where the placement has its own. All but the output matrix, which is the word embedding.
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            nn.init.xavier_normal_(module.weight, gain=getattr(module, "init_gain", 1.0))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# How a new model of ours, on real text, is initialised. `theory` brings its own model and data.
INITS: dict[str, Callable[[PreTrainedModel], None] | None] = {
    "bert": keep_bert,
    "xavier": xavier_,
    "theory": None,
}
