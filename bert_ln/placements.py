"""The ways of joining a sub-layer to the residual stream, one small class each.

A layer of BERT is two residual branches, attention and feed-forward. A branch is called with the stream `x`
`[batch, length, hidden]` and the sub-layer `f` (attention up to its output projection, or the first half of
the feed-forward network), and returns the new stream. It owns what lies between them: the output projection,
dropout, the norms and the factors. A new placement is a class below, with its formula and source in the
docstring, and one line in `PLACEMENTS`; a layer never asks which one it has.

A placement that needs more than the stream returns a tuple whose first entry is the stream, which the next
branch gets. A placement says, as class attributes and methods, what the model around it needs to know:
whether the encoder ends with a norm, how weights start, which norms make sense. N is the number of layers.

Factors are fields of the config that begin with the placement's name. A field that is None there gets the
paper's value (`defaults`) when the config is made.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .norms import NORMS, build_norm

if TYPE_CHECKING:
    from .configuration_bert_ln import BertLnConfig

SubLayer = Callable[[torch.Tensor], torch.Tensor]
Stream = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

# The branches of a layer in the order of their use; a decoder's cross-attention is one more.
ATTENTION, CROSS_ATTENTION, FEED_FORWARD = "attention", "crossattention", "feed_forward"
# What an initialisation usually scales: all that a branch's output is linear in, or nearly so.
BRANCH_MATRICES = ("self.value", "output.dense", "intermediate.dense")


class ResidualBranch(nn.Module):
    """What every placement has: the output projection `[..., width] -> [..., hidden]` and dropout.

    Subclasses add their norms in `__init__`, after this one's, and write `forward(x, sublayer)`. Norms draw
    no random numbers, so all placements start from the same weights, up to their gains, when they start from
    the same seed and initializer.
    """

    final_norm = False
    """Whether the last layer leaves the stream unnormalised, so that the encoder ends with one more norm."""
    qkv_norm = False
    """Whether queries, keys and values get a norm of `norm_type` for each head."""
    hands_on: str | None = None
    """How long a branch hands on more than the stream: "within a layer", "to the end", or not at all."""
    scales_embeddings = False
    """Whether the method sets the scale of the embeddings, which a norm behind them would take away."""
    encoder_only = False
    """Whether its factors are those of an encoder, and would be others with cross-attention."""
    gained: tuple[str, ...] = ()
    """The matrices of a layer, by the ends of their names, whose first values are multiplied by `gain`."""

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__()
        width = config.intermediate_size if kind == FEED_FORWARD else config.hidden_size
        self.dense = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Finish the sub-layer: `[..., width]` to `[..., hidden]`, then dropout, both before the addition."""
        return self.dropout(self.dense(hidden))

    def reset_parameters(self) -> None:
        """Set the first values of this module's own parameters, without those of the modules inside it."""

    @classmethod
    def for_layer(cls, config: "BertLnConfig", layer_idx: int) -> type["ResidualBranch"]:
        """Return the class of the branches of layer `layer_idx`, counted from 0."""
        return cls

    @staticmethod
    def finish(stream: Stream, final_norm: nn.Module) -> torch.Tensor:
        """Return the encoder's output `[batch, length, hidden]` from what the last layer returned."""
        return final_norm(stream)

    @staticmethod
    def defaults(config: "BertLnConfig") -> dict[str, Any]:
        """Return the paper's values of the fields that are None."""
        return {"embedding_norm": True, "initializer": "normal"}

    @staticmethod
    def gain(config: "BertLnConfig") -> float:
        """Return by what the first values of the `gained` matrices are multiplied."""
        return 1.0

    @staticmethod
    def embedding_std(config: "BertLnConfig") -> float:
        """Return the standard deviation of the first values of the embeddings."""
        return config.initializer_range

    @classmethod
    def refusal(cls, norm_type: str) -> str | None:
        """Return why this placement and a norm make no sense together; None where they do."""
        without = (
            "without norms it would be another method; take norm_placement 'pre', 're_zero' or 't_fixup'"
        )
        return without if norm_type == "none" else None


class PostNorm(ResidualBranch):
    """Post-LN, the original BERT: `x <- LN(x + f(x))`.

    Source: Xiong et al. 2020, arXiv 2002.04745, Table 1, left column. Parameter names are those of stock BERT
    (`dense`, `LayerNorm`), so that stock checkpoints load here and stock classes load ours.
    """

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.LayerNorm = build_norm(config, config.hidden_size)

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        return self.LayerNorm(x + self.project(sublayer(x)))


class PreNorm(ResidualBranch):
    """Pre-LN: `x <- x + f(LN(x))`, and one more norm after the last layer.

    Source: Xiong et al. 2020, arXiv 2002.04745, Table 1, right column (`x_Final = LN(x_{L+1})`). The norm has
    a name that stock BERT lacks: a class that would compute Post-LN from these weights must not find it. So
    it is in all placements but Post-LN; of Mix-LN's first layers, which have Post-LN's names, only the config
    tells.
    """

    final_norm = True

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.pre_norm = build_norm(config, config.hidden_size)

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        return x + self.project(sublayer(self.pre_norm(x)))

    @classmethod
    def refusal(cls, norm_type: str) -> str | None:
        """Return None: with no norm at all this is the plain residual network that papers compare with."""
        return None


class Sandwich(ResidualBranch):
    """Sandwich-LN, Peri-LN: `x <- x + LN(f(LN(x)))`, and one more norm after the last layer.

    Source: Ding et al. 2021 (CogView), arXiv 2105.13290; Kim et al. 2025 (Peri-LN), arXiv 2502.02732, where
    the embedding norm is optional. Dropout is the end of the sub-layer, before its second norm, as in
    CogView's code; its tricks for fp16 (a division before the norm, PB-relax) are not built. Peri-LN is
    reported (in notes, not read in the paper) to need a second norm with a learnt gain; norms without
    parameters are allowed here all the same.
    """

    final_norm = True

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.pre_norm = build_norm(config, config.hidden_size)
        self.post_norm = build_norm(config, config.hidden_size)

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        return x + self.post_norm(self.project(sublayer(self.pre_norm(x))))


class _ScaleFree(ResidualBranch):
    """A placement whose factors were derived for a norm that takes away the scale of each token."""

    @classmethod
    def refusal(cls, norm_type: str) -> str | None:
        """Refuse the norms that do not."""
        if NORMS[norm_type].removes_scale:
            return None
        return super().refusal(norm_type) or "its factors need a norm that takes away the scale of each token"


class SubNorm(_ScaleFree):
    """Sub-LN (Magneto): `x <- x + W LN(f(LN(x)))`, W the output projection.

    One more norm follows the last layer. The inner norm is as wide as what the projection reads: all heads
    together, or the feed-forward network behind its activation. Values, output projections and both
    feed-forward matrices start from Xavier normal with the gain `sub_ln_gain` = sqrt(ln 2N), queries and keys
    with gain 1.

    Source: Wang et al. 2022, arXiv 2210.06423, encoder-only, and the authors' torchscale, where the gain
    multiplies whatever the weights started from. That this is Xavier normal is recalled and not read.
    """

    final_norm = True
    encoder_only = True
    gained = BRANCH_MATRICES

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.pre_norm = build_norm(config, config.hidden_size)
        self.inner_norm = build_norm(config, self.dense.in_features)

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        return x + self.project(self.inner_norm(sublayer(self.pre_norm(x))))

    @staticmethod
    def defaults(config: "BertLnConfig") -> dict[str, Any]:
        """Return the paper's values of the fields that are None."""
        gain = math.sqrt(math.log(2 * max(config.num_hidden_layers, 1)))
        return {"embedding_norm": True, "initializer": "xavier_normal", "sub_ln_gain": gain}

    @staticmethod
    def gain(config: "BertLnConfig") -> float:
        """Return gamma."""
        return config.sub_ln_gain


class NormFormer(ResidualBranch):
    """NormFormer: `h = x + LN(W HeadScale(attention(LN(x))))`, `h + W2 LN(activation(W1 LN(h)))`.

    HeadScale multiplies each head by a learnt number, 1 at the start, before the output projection W. With
    `normformer_residual_scale`, which the authors advise for small models only, the skip of the feed-forward
    branch is multiplied by a learnt vector, 1 at the start. One more norm after the last layer.

    Source: Shleifer et al. 2021, arXiv 2110.09456. The place of HeadScale is the paper's (recalled, not
    read); the code in fairseq multiplies after the output projection.
    """

    final_norm = True

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.is_feed_forward = kind == FEED_FORWARD
        self.pre_norm = build_norm(config, config.hidden_size)
        self.residual_scale = None
        if self.is_feed_forward:
            self.inner_norm = build_norm(config, config.intermediate_size)
            if config.normformer_residual_scale:
                self.residual_scale = nn.Parameter(torch.ones(config.hidden_size))
        else:
            self.post_norm = build_norm(config, config.hidden_size)
            self.head_scale = nn.Parameter(torch.ones(config.num_attention_heads))

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        hidden = sublayer(self.pre_norm(x))
        if not self.is_feed_forward:
            heads = hidden.unflatten(-1, (len(self.head_scale), -1))  # [batch, length, heads, width]
            scaled = (self.head_scale.unsqueeze(-1) * heads).flatten(-2)
            return x + self.dropout(self.post_norm(self.dense(scaled)))
        skip = x if self.residual_scale is None else self.residual_scale * x
        return skip + self.project(self.inner_norm(hidden))

    def reset_parameters(self) -> None:
        """Start the scales at 1."""
        for scale in self.parameters(recurse=False):
            nn.init.ones_(scale)


class DeepNorm(_ScaleFree):
    """DeepNorm: `x <- LN(alpha x + f(x))`.

    alpha is `deep_norm_alpha` = (2N)^(1/4). Values, output projections and both feed-forward matrices start
    from Xavier normal with the gain `deep_norm_beta` = (8N)^(-1/4), queries and keys with gain 1.

    Source: Wang et al. 2022 (DeepNet), arXiv 2203.00555, encoder-only, and the authors' torchscale. The
    factors are derived for Xavier; with `initializer="normal"` the branches are weaker than the derivation
    takes them.
    """

    encoder_only = True
    gained = BRANCH_MATRICES

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.alpha = config.deep_norm_alpha
        self.post_norm = build_norm(config, config.hidden_size)

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        return self.post_norm(self.alpha * x + self.project(sublayer(x)))

    @staticmethod
    def defaults(config: "BertLnConfig") -> dict[str, Any]:
        """Return the paper's values of the fields that are None."""
        layers = max(config.num_hidden_layers, 1)
        return {
            "embedding_norm": True,
            "initializer": "xavier_normal",
            "deep_norm_alpha": (2 * layers) ** 0.25,
            "deep_norm_beta": (8 * layers) ** -0.25,
        }

    @staticmethod
    def gain(config: "BertLnConfig") -> float:
        """Return beta."""
        return config.deep_norm_beta


class BottomToTop(ResidualBranch):
    """B2T connection: `h = LN(x + attention(x))`, `x <- LN(x + h + feed_forward(h))`.

    Post-LN, with the layer's input added once more before its last norm. All matrices of a layer start
    multiplied by `b2t_gain` = N^(-1/2).

    Source: Takase et al. 2022, arXiv 2206.00330; the gain from the authors' code, where it multiplies an
    initialisation of their own. Here it multiplies BERT's.
    """

    hands_on = "within a layer"
    gained = ("self.query", "self.key", *BRANCH_MATRICES)

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.is_feed_forward = kind == FEED_FORWARD
        self.post_norm = build_norm(config, config.hidden_size)

    def forward(self, stream: Stream, sublayer: SubLayer) -> Stream:
        """Join `sublayer` to the stream, which within a layer takes the layer's input along."""
        x, bottom = stream if isinstance(stream, tuple) else (stream, stream)
        total = x + self.project(sublayer(x))
        if self.is_feed_forward:
            return self.post_norm(bottom + total)
        return self.post_norm(total), bottom

    @staticmethod
    def defaults(config: "BertLnConfig") -> dict[str, Any]:
        """Return the paper's values of the fields that are None."""
        gain = max(config.num_hidden_layers, 1) ** -0.5
        return {"embedding_norm": True, "initializer": "normal", "b2t_gain": gain}

    @staticmethod
    def gain(config: "BertLnConfig") -> float:
        """Return the factor of the first weights."""
        return config.b2t_gain


class ResiDual(_ScaleFree):
    """ResiDual: two streams, `x <- LN(x + f(x))` and `s <- s + c f(x)`; the encoder returns `x + LN(s)`.

    Both start from the embeddings, s from c times them. c is `residual_dual_scale`, 1: the last norm takes it
    away again, it only keeps s small in half precision (the authors' deep fp16 models have 0.05).

    Source: Xie et al. 2023, arXiv 2304.14802, and the authors' code (which gives the last norm an eps of
    1e-7).
    """

    final_norm = True
    hands_on = "to the end"

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.dual_scale = config.residual_dual_scale
        self.post_norm = build_norm(config, config.hidden_size)

    def forward(self, stream: Stream, sublayer: SubLayer) -> Stream:
        """Join `sublayer` to both streams, `[batch, length, hidden]` each."""
        x, dual = stream if isinstance(stream, tuple) else (stream, self.dual_scale * stream)
        branch = self.project(sublayer(x))
        return self.post_norm(x + branch), dual + self.dual_scale * branch

    @staticmethod
    def finish(stream: Stream, final_norm: nn.Module) -> torch.Tensor:
        """Return the sum of the first stream and the normalised second."""
        x, dual = stream if isinstance(stream, tuple) else (stream, stream)
        return x + final_norm(dual)


class Admin(_ScaleFree):
    """Admin: `x <- LN(omega * x + f(x))`, with a learnt vector omega for each branch.

    omega starts as `admin_omega` = sqrt((n + 1) / ln(n + 1) - 1), n = 2N the number of branches: the form
    without a profiling pass, of the authors' package admin-torch. The paper sets it from the measured
    variance of the branches before each one, which is not built. Afterwards omega may be folded into the
    weights.

    Source: Liu et al. 2020, arXiv 2004.08249, and both repositories of the authors. Our reading
    of the closed form is that each branch has variance 1 at the start; with BERT's initialisation, which is
    kept, it is less, so omega is on the safe side. Which one the package expects is not known here.
    """

    encoder_only = True

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.first_omega = config.admin_omega
        self.omega = nn.Parameter(torch.full((config.hidden_size,), self.first_omega))
        self.post_norm = build_norm(config, config.hidden_size)

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        return self.post_norm(self.omega * x + self.project(sublayer(x)))

    def reset_parameters(self) -> None:
        """Set omega."""
        nn.init.constant_(self.omega, self.first_omega)

    @staticmethod
    def defaults(config: "BertLnConfig") -> dict[str, Any]:
        """Return the paper's values of the fields that are None."""
        branches = 2 * max(config.num_hidden_layers, 1)
        omega = math.sqrt((branches + 1) / math.log(branches + 1) - 1)
        return {"embedding_norm": True, "initializer": "normal", "admin_omega": omega}


class RecursiveSkip(_ScaleFree):
    """rSkip+LN: `y_1 = LN(x + f(x))`, `y_k = LN(x + y_{k-1})`; `x <- y_lambda`.

    lambda is `recursive_skip_order`, 1 being Post-LN; f is computed once. The norms of the steps have
    parameters of their own, or with `recursive_skip_shared_norm` the same.

    Source: Liu et al. 2020, COLING, arXiv 2105.07205. The formula is recalled and agrees with a public
    review; whether the authors share the norms is not known, nor is their lambda (2 as default: uncertain).
    """

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.order = config.recursive_skip_order
        count = 1 if config.recursive_skip_shared_norm else self.order
        self.post_norms = nn.ModuleList(build_norm(config, config.hidden_size) for _ in range(count))

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        y = self.project(sublayer(x))
        for step in range(self.order):
            y = self.post_norms[step % len(self.post_norms)](x + y)
        return y


class MixNorm(ResidualBranch):
    """Mix-LN: Post-LN in the first floor(a N) layers, Pre-LN in the others and after the last.

    a is `mix_ln_alpha`, 0.25.

    Source: Li, Yin, Liu 2024, arXiv 2412.13795, and the authors' scripts.
    """

    final_norm = True

    @classmethod
    def for_layer(cls, config: "BertLnConfig", layer_idx: int) -> type[ResidualBranch]:
        """Return the class of the branches of layer `layer_idx`, counted from 0."""
        # A rounding error must not cost a layer: 0.29 * 100 is 28.999999999999996.
        post_layers = math.floor(config.mix_ln_alpha * config.num_hidden_layers + 1e-9)
        return PostNorm if layer_idx < post_layers else PreNorm


class HybridNorm(ResidualBranch):
    """HybridNorm: `h = x + attention(x)` with norms on q, k and v; `n = LN(h)`, `x <- n + feed_forward(n)`.

    One more norm after the last layer, as in the authors' code. With `hybrid_norm_star` (HybridNorm*) the
    first layer is Pre-LN, with norms on q, k and v as well.

    Source: Zhuo et al. 2025, arXiv 2503.04598, and the authors' code. There all norms are RMSNorm
    (`norm_type="rms_norm"`).
    """

    final_norm = True
    qkv_norm = True

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        # Behind the attention's addition, and so in front of the feed-forward network and its skip.
        self.stream_norm = build_norm(config, config.hidden_size) if kind == FEED_FORWARD else nn.Identity()

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        x = self.stream_norm(x)
        return x + self.project(sublayer(x))

    @classmethod
    def for_layer(cls, config: "BertLnConfig", layer_idx: int) -> type[ResidualBranch]:
        """Return the class of the branches of layer `layer_idx`, counted from 0."""
        return PreNorm if config.hybrid_norm_star and layer_idx == 0 else cls


class _NormFree(ResidualBranch):
    """A placement without norms."""

    @staticmethod
    def defaults(config: "BertLnConfig") -> dict[str, Any]:
        """Return the paper's values of the fields that are None."""
        return {"embedding_norm": False, "initializer": "normal"}

    @classmethod
    def refusal(cls, norm_type: str) -> str | None:
        """Refuse a kind of norm that would be chosen in vain; the default stands for none."""
        return None if norm_type in ("layer_norm", "none") else "it has no norms"


class ReZero(_NormFree):
    """ReZero: `x <- x + a f(x)`, one learnt number a for each layer, shared by its branches; no norm.

    a starts as 0, so that the encoder starts as the identity.

    Source: Bachlechner et al. 2020, arXiv 2003.04887; that the branches share a, and that there is
    no norm at the end, from the authors' code. That the embeddings have none is our reading of it.
    """

    hands_on = "within a layer"

    def __init__(self, config: "BertLnConfig", layer_idx: int, kind: str) -> None:
        super().__init__(config, layer_idx, kind)
        self.is_feed_forward = kind == FEED_FORWARD
        # The first branch of a layer owns it and hands it on.
        self.residual_weight = nn.Parameter(torch.zeros(1)) if kind == ATTENTION else None

    def forward(self, stream: Stream, sublayer: SubLayer) -> Stream:
        """Join `sublayer` to the stream, which within a layer takes a along."""
        x, weight = stream if isinstance(stream, tuple) else (stream, self.residual_weight)
        x = x + weight * self.project(sublayer(x))
        return x if self.is_feed_forward else (x, weight)

    def reset_parameters(self) -> None:
        """Start at 0."""
        if self.residual_weight is not None:
            nn.init.zeros_(self.residual_weight)


class TFixup(_NormFree):
    """T-Fixup: `x <- x + f(x)` without norms; only the initialisation differs from a plain residual network.

    Xavier; values, output projections and both feed-forward matrices with the gain `t_fixup_gain` =
    0.67 N^(-1/4); embeddings from N(0, 1/hidden) times `t_fixup_embedding_gain` = (9N)^(-1/4).

    Source: Huang et al. 2020, ICML, and the authors' code for the encoder, which is built on fairseq. There
    the word embeddings are multiplied by sqrt(hidden) in use, which BERT's are not; and (recalled) the draw
    is uniform, of the same variance as the normal one here, queries and keys have an extra 1/sqrt(2), and
    positions are sines, which are not scaled.
    """

    scales_embeddings = True
    encoder_only = True
    gained = BRANCH_MATRICES

    def forward(self, x: torch.Tensor, sublayer: SubLayer) -> torch.Tensor:
        """Join `sublayer` to the stream `x`; both `[batch, length, hidden]`."""
        return x + self.project(sublayer(x))

    @staticmethod
    def defaults(config: "BertLnConfig") -> dict[str, Any]:
        """Return the paper's values of the fields that are None."""
        layers = max(config.num_hidden_layers, 1)
        return {
            "embedding_norm": False,
            "initializer": "xavier_normal",
            "t_fixup_gain": 0.67 * layers**-0.25,
            "t_fixup_embedding_gain": (9 * layers) ** -0.25,
        }

    @staticmethod
    def gain(config: "BertLnConfig") -> float:
        """Return the factor of the first weights."""
        return config.t_fixup_gain

    @staticmethod
    def embedding_std(config: "BertLnConfig") -> float:
        """Return the standard deviation of the first values of the embeddings."""
        return config.hidden_size**-0.5 * config.t_fixup_embedding_gain


PLACEMENTS: dict[str, type[ResidualBranch]] = {
    "post": PostNorm,
    "pre": PreNorm,
    "sandwich": Sandwich,
    "sub_ln": SubNorm,
    "normformer": NormFormer,
    "deep_norm": DeepNorm,
    "b2t": BottomToTop,
    "residual_dual": ResiDual,
    "admin": Admin,
    "recursive_skip": RecursiveSkip,
    "mix_ln": MixNorm,
    "hybrid_norm": HybridNorm,
    "re_zero": ReZero,
    "t_fixup": TFixup,
}


def build_branch(config: "BertLnConfig", layer_idx: int, kind: str) -> ResidualBranch:
    """Return the branch `kind` of layer `layer_idx`, joined as `config.norm_placement` says."""
    return PLACEMENTS[config.norm_placement].for_layer(config, layer_idx)(config, layer_idx, kind)
