"""What may be changed inside attention: norms on queries, keys and values, and a window on the positions."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from .norms import LayerNorm, RMSNorm, build_norm, widened

if TYPE_CHECKING:
    from .configuration_bert_ln import BertLnConfig

# What `attention_window_global` may be: which tokens, or which layer, a window does not bind.
GLOBAL = ("cls", "last_layer", "none")


class L2Norm(nn.Module):
    """`v / ||v||` over the features of a head, without parameters: the keys of `QueryNorm`."""

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x`."""
        return F.normalize(widened(x), dim=-1).to(x.dtype)

    def reset_parameters(self) -> None:
        """Do nothing: there are none."""


class QueryNorm(L2Norm):
    """`g v / ||v||`: with keys of length 1 and no other scale, attention is `softmax(g q k^T) V`.

    g is one learnt number for each attention module and takes the place of 1 / sqrt(head width). It starts as
    log2(L^2 - L), L = `config.qk_norm_length`: in the paper the length that 97.5 % of the training sequences
    do not exceed, here `max_position_embeddings` unless given.

    Source: Henry et al. 2020, arXiv 2010.04245, and the authors' code.
    """

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__(config, width)
        length = config.qk_norm_length or config.max_position_embeddings
        self.first_scale = math.log2(max(length, 2) ** 2 - max(length, 2))
        self.scale = nn.Parameter(torch.full((1,), self.first_scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x` and scale it."""
        return (self.scale * super().forward(x)).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set the first value."""
        nn.init.constant_(self.scale, self.first_scale)


# `qk_norm`: the norms of queries and of keys. The last two, a form that is recalled and not read in a source,
# keep the scale 1 / sqrt(head width).
QK_NORMS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "l2": (QueryNorm, L2Norm),
    "layer_norm": (LayerNorm, LayerNorm),
    "rms_norm": (RMSNorm, RMSNorm),
}


class NormedLinear(nn.Linear):
    """A linear map, and behind it a norm over the features of each head: `[..., in]` to `[..., out]`.

    A subclass, so that its weight keeps the name that it has in stock BERT.
    """

    def __init__(self, linear: nn.Linear, norm: nn.Module, width: int) -> None:
        # On "meta" nothing is drawn: with and without norms, the same seed gives the same weights.
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.norm, self.width = norm, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project `x`, and normalise each head."""
        heads = super().forward(x).unflatten(-1, (-1, self.width))  # [..., heads, width]
        return self.norm(heads).flatten(-2).to(heads.dtype)  # attention wants one dtype


def normalise_heads(attention: nn.Module, config: "BertLnConfig", with_values: bool) -> None:
    """Put norms behind the projections of `attention`, a `BertSelfAttention` or `BertCrossAttention`.

    Two ways lead here: `config.qk_norm`, and a placement that asks for norms of `config.norm_type` on
    queries, keys and values (`with_values`). The gains and scales are shared by the heads of a module.
    """
    if with_values:
        norms = dict.fromkeys(("query", "key", "value"), build_norm)
    elif config.qk_norm is not None:
        norms = dict(zip(("query", "key"), QK_NORMS[config.qk_norm], strict=True))
    else:
        return
    width = attention.attention_head_size
    for name, norm in norms.items():
        setattr(attention, name, NormedLinear(getattr(attention, name), norm(config, width), width))
    if norms["query"] is QueryNorm:
        attention.scaling = 1.0


def window_mask_function(config: "BertLnConfig", is_first: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return which query may see which key, as a mask function of `transformers.masking_utils`.

    A token sees those at most `config.attention_window` positions away, with `attention_window_causal` of
    those before it only. With `attention_window_global="cls"` the first token of each document (`is_first`,
    `[batch, length]`) sees all and is seen by all. A token always sees itself.

    Source: Chelba et al. 2020, arXiv 2001.04589, for decoders (there a window of w is order w + 1 in the
    authors' code, and N = w + 2); the band for encoders is an extension of our own.
    """
    window, causal = config.attention_window, config.attention_window_causal
    cls_is_global = config.attention_window_global == "cls"

    def may_see(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        is_near = (query - key <= window) & (key - query <= (0 if causal else window))
        if cls_is_global:
            is_near = is_near | is_first[batch, query] | is_first[batch, key]
        return is_near

    return may_see
