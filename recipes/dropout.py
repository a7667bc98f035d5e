"""Dropout on a CPU at a fraction of its price: sixteen random bits decide on an element.

PyTorch draws a number of 64 bits, one after the other on one core, for each element; here one serves four.
"""

import math

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

# What 16 bits tell apart: a probability is met to half of 1 / CHANCES.
CHANCES = 2**16
# Name of the kernel that `attend` is, beside transformers' own.
KERNEL = "eager_cheap_dropout"


@torch.library.custom_op("bert_ln::dropout", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _drop(x: torch.Tensor, dropped: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x`, any shape and floating dtype, with each element 0 in `dropped` of `CHANCES` cases.

    The others are scaled, so that the mean stays. The second result is 1 where an element was kept and 0
    elsewhere, like `x`. Draws from PyTorch's generator for the CPU.
    """
    # Whole numbers of 64 bits, the fastest that the generator has; compared and converted in one pass.
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.ge(bits, dropped - CHANCES // 2, out=torch.empty_like(x))
    return _scaled(x, kept, dropped), kept


def _scaled(x: torch.Tensor, kept: torch.Tensor, dropped: int) -> torch.Tensor:
    """`x * kept / (share kept)`, in one pass and with one rounding."""
    return torch.addcmul(x.new_zeros(()), x, kept, value=CHANCES / (CHANCES - dropped))


@_drop.register_fake
def _shapes(x: torch.Tensor, dropped: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.dropped = inputs[1]
    ctx.save_for_backward(output[1])


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor, _: None) -> tuple:
    return _scaled(gradient, ctx.saved_tensors[0], ctx.dropped), None


_drop.register_autograd(_backward, setup_context=_remember)


def cheap_dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """As `torch.nn.functional.dropout`, with `p` rounded to 1 / 65536."""
    dropped = round(p * CHANCES)
    if not training or dropped == 0:
        return x
    # All or nothing has no scale; other devices have kernels of their own.
    if dropped == CHANCES or x.device.type != "cpu":
        return nn.functional.dropout(x, p)
    return _drop(x, dropped)[0]


class CheapDropout(nn.Dropout):
    """`torch.nn.Dropout` by way of `cheap_dropout`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of `x` while training."""
        return cheap_dropout(x, self.p, self.training)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformers' eager attention, but for its dropout.

    Queries, keys and values are `[batch, heads, length, width]`. Returns `[batch, length, heads, width]` and
    the weights `[batch, heads, length, length]`.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = cheap_dropout(scores.softmax(dim=-1), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(KERNEL, attend)
AttentionMaskInterface.register(KERNEL, eager_mask)


def cheapen_dropout(model: PreTrainedModel, has_mask: bool) -> None:
    """Put the cheap dropout into `model`, in place: between its layers and, without a mask, in attention."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, CheapDropout(child.p).train(child.training))
    config = model.config
    if config._attn_implementation == "eager" and config.attention_probs_dropout_prob and not has_mask:
        config._attn_implementation = KERNEL


def restore_dropout(model: PreTrainedModel) -> None:
    """Undo `cheapen_dropout`."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is CheapDropout:
                setattr(parent, name, nn.Dropout(child.p).train(child.training))
    if model.config._attn_implementation == KERNEL:
        model.config._attn_implementation = "eager"
