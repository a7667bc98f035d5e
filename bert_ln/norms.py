"""The kinds of norm, one small class each.

A norm maps `[..., width]` to `[..., width]` and is built from the config and the width alone. A new kind is a
class below with its formula and source in the docstring, and one line in `NORMS`. Its `reset_parameters` sets
the first values of its parameters through the functions of `torch.nn.init`: while a folder is loaded,
transformers makes these leave alone what the folder had.

In the formulas v is one token's features, mu and sigma^2 their mean and their biased variance, and eps is
`config.layer_norm_eps`, inside the root. Statistics are computed in float32 at least, whatever the input is:
BERT's eps of 1e-12 is nothing in half precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .configuration_bert_ln import BertLnConfig


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm:
    """What the model around a norm needs to know of it."""

    removes_scale = True
    """Whether the output does not change when a token's features are multiplied by a number: some placements
    are derived for such norms."""
    crosses_tokens = False
    """Whether the output of a token depends on others: it then has an attribute `segments`."""

    def reset_parameters(self) -> None:
        """Set the first values of the parameters, where there are any."""


class LayerNorm(nn.LayerNorm, Norm):
    """Layer normalisation: `g * (v - mu) / sigma + b`, with gain g and bias b for each feature.

    Source: Ba, Kiros, Hinton 2016, arXiv 1607.06450; Xiong et al. 2020, section 3.1. The position of eps and
    its value, `config.layer_norm_eps`, are those of BERT. Starts as g = 1, b = 0 and draws no random numbers.
    """

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__(width, eps=config.layer_norm_eps)


class LayerNormSimple(nn.LayerNorm, Norm):
    """LayerNorm-simple: `(v - mu) / sigma`, layer normalisation without gain and bias; no parameters.

    Source: Xu et al. 2019, arXiv 1911.07013. Their code takes the unbiased deviation and adds its eps of 1e-5
    to it; here both are as in BERT, which at 768 features is a factor of 0.99935.
    """

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__(width, eps=config.layer_norm_eps, elementwise_affine=False)


class DetachNorm(nn.Module, Norm):
    """DetachNorm: forwards `(v - mu) / sigma`, backwards mu and sigma are constants; no parameters.

    So the gradient is only divided by sigma: it is neither re-centred nor re-scaled. A tool to study layer
    normalisation, not to train with: in the paper it diverges on the largest task.

    Source: Xu et al. 2019, arXiv 1911.07013 (poster, and `mean_detach`, `std_detach` in the authors' code).
    """

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x`."""
        wide = widened(x)
        variance, mean = torch.var_mean(wide.detach(), dim=-1, correction=0, keepdim=True)
        return ((wide - mean) * (variance + self.eps).rsqrt()).to(x.dtype)


class AdaNorm(nn.Module, Norm):
    """AdaNorm: `C (1 - k y) y` with `y = (v - mu) / sigma`; the whole factor `C (1 - k y)` is a constant
    backwards. No parameters.

    C is `config.ada_norm_scale` and k `config.ada_norm_k`. The output's mean over the features is -C k, not
    0.

    Source: Xu et al. 2019, arXiv 1911.07013, eq. 1 of the poster; k = 1/10 and the detached factor from the
    authors' code. C is tuned for each task and position (in the code 2 unless given, in its README 1); the
    paper's values are not known here.
    """

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__()
        self.width, self.eps = width, config.layer_norm_eps
        self.scale, self.k = config.ada_norm_scale, config.ada_norm_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x`."""
        y = F.layer_norm(widened(x), (self.width,), eps=self.eps)
        factor = self.scale * (1 - self.k * y.detach())
        return (factor * y).to(x.dtype)


class RMSNorm(nn.RMSNorm, Norm):
    """RMSNorm: `g * v / sqrt(mean(v^2) + eps)`, neither centred nor biased; starts as g = 1.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467. eps is inside the root, as in torch and in the authors'
    TensorFlow code; their torch code adds 1e-8 to the root.
    """

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__(width, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x`."""
        wide = widened(x)
        return F.rms_norm(wide, self.normalized_shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class FilterResponseNorm(nn.Module, Norm):
    """FRN: `g * v / sqrt(nu^2 + eps) + b`, where nu^2 is the mean square of one feature over the tokens.

    The axes of a picture become the axis of the sequence, dim 1. `segments`, integers `[batch, length]` which
    the model sets for the time of a call, say which tokens are averaged: those with the same number. So
    padding and the other documents of a block play no part. Without segments it is the whole sequence. eps =
    1e-6 + |e|, e a learnt number for each norm, which keeps short inputs from becoming signs. With
    `config.frn_tlu`, the thresholded linear unit `max(y, tau)`, a learnt tau for each feature, follows; off
    by default, since on the residual stream tau = 0 cuts off half of every vector. Starts as g = 1, b = 0,
    tau = 0, e = 1e-4.

    Source: Singh and Krishnan 2020, arXiv 1911.09737, section 3. The use in an encoder is an adaptation of
    our own; the form of the learnt eps is that of public implementations. Every token depends on all others,
    so there is no causal use, and the length of a token's vector is not controlled.
    """

    removes_scale = False
    crosses_tokens = True
    segments: torch.Tensor | None = None

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = nn.Parameter(torch.full((1,), 1e-4))
        self.tau = nn.Parameter(torch.zeros(width)) if config.frn_tlu else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each feature of `x` `[batch, length, ..., width]` over the tokens of a segment."""
        wide = widened(x)
        mean_squares = self._mean_over_segments(wide.square())
        y = self.weight * wide * (mean_squares + 1e-6 + self.eps.abs()).rsqrt() + self.bias
        return (y if self.tau is None else torch.maximum(y, self.tau)).to(x.dtype)

    def _mean_over_segments(self, values: torch.Tensor) -> torch.Tensor:
        """Return for each token the mean of `values` over its segment, broadcastable to their shape."""
        if self.segments is None:
            return values.mean(dim=1, keepdim=True)
        is_same = self.segments.unsqueeze(1) == self.segments.unsqueeze(2)  # [batch, length, length]
        weights = is_same / is_same.sum(-1, keepdim=True, dtype=values.dtype)
        # A matrix product, since adding up by index is not reproducible on a GPU; never in half precision.
        with torch.autocast(values.device.type, enabled=False):
            return (weights @ values.flatten(2)).view_as(values)

    def reset_parameters(self) -> None:
        """Set the first values."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.eps, 1e-4)
        if self.tau is not None:
            nn.init.zeros_(self.tau)


class DynamicTanh(nn.Module, Norm):
    """DyT: `g * tanh(alpha v) + b`, one learnt number alpha for each norm; no statistics.

    Starts as alpha = `config.dyt_alpha`, g = 1, b = 0.

    Source: Zhu et al. 2025, arXiv 2503.10622, and the authors' code; alpha = 0.5 is their value for all but
    large language models, where attention has a larger one than the rest and the embedding a scale of its own
    (not built here).
    """

    removes_scale = False

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__()
        self.first_alpha = config.dyt_alpha
        self.alpha = nn.Parameter(torch.full((1,), self.first_alpha))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Squash `x` `[..., width]`, each number by itself."""
        return (self.weight * torch.tanh(self.alpha * widened(x)) + self.bias).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set the first values."""
        nn.init.constant_(self.alpha, self.first_alpha)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class NoNorm(nn.Identity, Norm):
    """No norm at all: `v`. The baseline without normalisation of Xu et al. 2019, arXiv 1911.07013."""

    removes_scale = False

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__()


NORMS: dict[str, type[Norm]] = {
    "layer_norm": LayerNorm,
    "layer_norm_simple": LayerNormSimple,
    "detach_norm": DetachNorm,
    "ada_norm": AdaNorm,
    "rms_norm": RMSNorm,
    "frn": FilterResponseNorm,
    "dyt": DynamicTanh,
    "none": NoNorm,
}

# How a norm is told from a weight matrix: by type. nn.LayerNorm is the one inside the stock heads.
NORM_CLASSES: tuple[type[nn.Module], ...] = (nn.LayerNorm, *NORMS.values())


def build_norm(config: "BertLnConfig", width: int) -> nn.Module:
    """Return a new norm over `width` features, of the kind that `config.norm_type` names."""
    return NORMS[config.norm_type](config, width)


@contextmanager
def segments_of(module: nn.Module, segments: torch.Tensor | None) -> Iterator[None]:
    """Tell the norms inside `module` that cross tokens which ones they may; see `FilterResponseNorm`.

    An attribute and not an argument, so that the other norms and all placements need not know of it. It is
    set where it is used: inside a layer's forward, which gradient checkpointing repeats with its arguments.
    """
    crossing = [
        norm for norm in module.modules() if segments is not None and isinstance(norm, FilterResponseNorm)
    ]
    for norm in crossing:
        norm.segments = segments
    try:
        yield
    finally:
        for norm in crossing:
            norm.segments = None
