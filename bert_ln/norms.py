"""The kinds of norm, one small class each.

A norm maps `[..., width]` to `[..., width]` and is built from the config and the width alone. A new kind is a
class below with its formula and source in the docstring, and one line in `NORMS`. Its `reset_parameters` sets
the first values of its parameters through the functions of `torch.nn.init`: while a folder is loaded,
transformers makes these leave alone what the folder had.
"""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .configuration_bert_ln import BertLnConfig


class LayerNorm(nn.LayerNorm):
    """Layer normalisation: `g * (v - mean(v)) / sqrt(var(v) + eps) + b`, statistics over the features of one
    token.

    Source: Ba, Kiros, Hinton 2016, arXiv 1607.06450; Xiong et al. 2020, section 3.1. The position of eps and
    its value, `config.layer_norm_eps`, are those of BERT. Starts as g = 1, b = 0 and draws no random numbers.
    """

    def __init__(self, config: "BertLnConfig", width: int) -> None:
        super().__init__(width, eps=config.layer_norm_eps)


NORMS: dict[str, type[nn.Module]] = {"layer_norm": LayerNorm}

# How an optimiser tells a norm from a weight matrix: by type. nn.LayerNorm is the one inside the stock heads.
NORM_CLASSES: tuple[type[nn.Module], ...] = (nn.LayerNorm, *NORMS.values())


def build_norm(config: "BertLnConfig", width: int) -> nn.Module:
    """Return a new norm over `width` features, of the kind that `config.norm_type` names."""
    return NORMS[config.norm_type](config, width)
