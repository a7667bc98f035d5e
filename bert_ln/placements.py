"""The ways of joining a sub-layer to the residual stream, one small class each.

A layer of BERT is two residual branches, attention and feed-forward. A branch is called with the stream `x`
`[batch, length, hidden]` and the sub-layer `f` (attention up to its output projection, or the first half of
the feed-forward network), and returns the new stream. It owns what lies between them: the output projection,
dropout and the norms. A new placement is a class below, with its formula and source in the docstring, and one
line in `PLACEMENTS`; a layer never asks which one it has. A branch knows the config and the width of its
sub-layer, and not the number of its layer.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from .norms import build_norm

if TYPE_CHECKING:
    from .configuration_bert_ln import BertLnConfig

SubLayer = Callable[[torch.Tensor], torch.Tensor]


class ResidualBranch(nn.Module):
    """What every placement has: the output projection `[..., width] -> [..., hidden]` and dropout.

    Subclasses add their norms in `__init__`, after this one's, and write `forward(x, sublayer)`. Norms draw
    no random numbers, so all placements start from the same weights when they start from the same seed.
    """

    # Whether the stream leaves the last layer unnormalised, so that the encoder must end with one more norm.
    final_norm = False

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Finish the sub-layer: `[..., width]` to `[..., hidden]`, then dropout, both before the addition."""
        return self.dropout(self.dense(hidden))


class PostNorm(ResidualBranch):
    """Post-LN, the original BERT: `x <- LN(x + f(x))`.

    Source: Xiong et al. 2020, arXiv 2002.04745, Table 1, left column. Parameter names are those of stock BERT
    (`dense`, `LayerNorm`), so that stock checkpoints load here and stock classes load ours.
    """

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__(config, width)
        self.LayerNorm = build_norm(config, config.hidden_size)

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        return self.LayerNorm(x + self.project(sublayer(x)))


class PreNorm(ResidualBranch):
    """Pre-LN: `x <- x + f(LN(x))`, and one more norm after the last layer.

    Source: Xiong et al. 2020, arXiv 2002.04745, Table 1, right column (`x_Final = LN(x_{L+1})`). The norm has
    a name that stock BERT lacks: a class that would compute Post-LN from these weights must not find it.
    """

    final_norm = True

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__(config, width)
        self.pre_norm = build_norm(config, config.hidden_size)

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        return x + self.project(sublayer(self.pre_norm(x)))


PLACEMENTS: dict[str, type[ResidualBranch]] = {"post": PostNorm, "pre": PreNorm}
