"""Every architectural choice of a BertLn model, checked when it is made."""

import difflib
import math
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, Self

from huggingface_hub.dataclasses import strict, validated_field
from transformers import BertConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .attention import GLOBAL, QK_NORMS
from .norms import NORMS
from .placements import PLACEMENTS

if TYPE_CHECKING:
    # Saving a config copies the files that this one imports, directly or not, and so does loading one from
    # the Hub. This line makes a folder that was saved from a config alone complete.
    from .modeling_bert_ln import BertLnModel  # noqa: F401

# Flat module names, whatever the class was loaded from: a checkpoint always carries its own code.
AUTO_MAP = {
    "AutoConfig": "configuration_bert_ln.BertLnConfig",
    "AutoModel": "modeling_bert_ln.BertLnModel",
    "AutoModelForMaskedLM": "modeling_bert_ln.BertLnForMaskedLM",
    "AutoModelForMultipleChoice": "modeling_bert_ln.BertLnForMultipleChoice",
    "AutoModelForNextSentencePrediction": "modeling_bert_ln.BertLnForNextSentencePrediction",
    "AutoModelForPreTraining": "modeling_bert_ln.BertLnForPreTraining",
    "AutoModelForQuestionAnswering": "modeling_bert_ln.BertLnForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_bert_ln.BertLnForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_bert_ln.BertLnForTokenClassification",
}

# The fields that say what the layers compute, whatever their number and size. Those of the second list count
# where they are not the default: every config of a method has the method's own.
LAYERS = ("norm_placement", "norm_type", "embedding_norm")
LAYER_DETAILS = (
    "ada_norm_k",
    "ada_norm_scale",
    "attention_window",
    "attention_window_causal",
    "attention_window_global",
    "deep_norm_alpha",
    "frn_tlu",
    "hybrid_norm_star",
    "mix_ln_alpha",
    "normformer_residual_scale",
    "qk_norm",
    "recursive_skip_order",
    "recursive_skip_shared_norm",
)

# With or without embedding norm, these layers are those of another stock architecture.
CONVERTIBLE = {"norm_placement": "pre", "norm_type": "layer_norm", "embedding_norm": True}

INITIALIZERS = ("normal", "xavier_normal")

SMALLEST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 1,
    "type_vocab_size": 1,
    "recursive_skip_order": 1,
}
POSITIVE = (
    "admin_omega",
    "ada_norm_scale",
    "b2t_gain",
    "deep_norm_alpha",
    "deep_norm_beta",
    "dyt_alpha",
    "residual_dual_scale",
    "sub_ln_gain",
    "t_fixup_embedding_gain",
    "t_fixup_gain",
)

# Configs on the Hub carry extras such as `layer_norm_epsilon` (similarity 0.875 to a field), which must pass;
# one letter wrong in `norm_placement` gives 0.96.
MISSPELT = 0.88


def _one_of(allowed: Collection[str], or_none: bool = False) -> Callable[[str | None], None]:
    """Return a check that a value is among the `allowed`, with an error that suggests the nearest name."""

    def check(value: str | None) -> None:
        if value not in allowed and not (or_none and value is None):
            nearest = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{value!r} is not one of {sorted(allowed)}{hint}")

    return check


@strict
class BertLnConfig(BertConfig):
    """Configuration of BERT in which the place and the kind of normalisation is a choice.

    All fields of `transformers.BertConfig`, and:

    - `norm_placement`: where the norm sits relative to the residual addition, a name in
      `placements.PLACEMENTS`.
    - `norm_type`: which norm, a name in `norms.NORMS`.
    - `embedding_norm`: keep BERT's norm after the embeddings; None, the default, means true but for the
      placements without norms. Xiong et al. 2020 do not say whether their Pre-LN has it.
    - `initializer`: how matrices start: "normal", N(0, initializer_range^2), as in BERT, or "xavier_normal";
      None, the default, takes what the placement's paper has. Embeddings start as in BERT, but for T-Fixup.
    - `qk_norm`: a norm on the queries and keys of each head, a name in `attention.QK_NORMS`, or None.
    - `attention_window`: how many positions away a token sees others (N-gram attention), or None for all;
      with `attention_window_causal` those before it only. `attention_window_global` says what the window does
      not bind: "cls", the first token of each document; "last_layer"; or "none".
    - the factors of a method, which begin with its name; see `placements`, `norms` and `attention` for each.
      None means the paper's value, which a saved config holds: where a factor follows from the number of
      layers, a config that is read with another number keeps it, since it belongs to the weights.
    - `sparse_prediction`: compute vocabulary scores for the masked positions only, in training. A way of
      running a model and not a property of it: a saved config always says false.

    The config of a stock BERT, which has no `norm_placement`, is read as Post-LN.

    A folder whose layers are not those of stock BERT must not load in `transformers.BertModel`, which would
    compute something else and only warn. Its config.json therefore holds, under `layer_norm_eps`, the number
    under a key that says what the layers are. That is a type error for the strict `BertConfig`, which prints
    the key. This class takes the number out again. A folder with stock layers has the plain number, and loads
    in the stock classes. The guard is the file: a stock class that is called with `config=` does not read it,
    and only warns of missing and left-over weights.
    """

    model_type = "bert_ln"
    # Makes `save_pretrained` copy the code files, for configs and for models.
    _auto_class = "AutoConfig"

    layer_norm_eps: float | dict[str, float] = 1e-12
    norm_placement: str = validated_field(_one_of(PLACEMENTS), default="pre")
    norm_type: str = validated_field(_one_of(NORMS), default="layer_norm")
    embedding_norm: bool | None = None
    initializer: str | None = validated_field(_one_of(INITIALIZERS, or_none=True), default=None)
    ada_norm_scale: float | int = 1.0
    ada_norm_k: float | int = 0.1
    frn_tlu: bool = False
    dyt_alpha: float | int = 0.5
    sub_ln_gain: float | int | None = None
    normformer_residual_scale: bool = False
    deep_norm_alpha: float | int | None = None
    deep_norm_beta: float | int | None = None
    b2t_gain: float | int | None = None
    residual_dual_scale: float | int = 1.0
    admin_omega: float | int | None = None
    recursive_skip_order: int = 2
    recursive_skip_shared_norm: bool = False
    mix_ln_alpha: float | int = 0.25
    hybrid_norm_star: bool = False
    t_fixup_gain: float | int | None = None
    t_fixup_embedding_gain: float | int | None = None
    qk_norm: str | None = validated_field(_one_of(QK_NORMS, or_none=True), default=None)
    qk_norm_length: int | None = None
    attention_window: int | None = None
    attention_window_causal: bool = False
    attention_window_global: str = validated_field(_one_of(GLOBAL), default="cls")
    sparse_prediction: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.layer_norm_eps, dict):
            if len(self.layer_norm_eps) != 1:
                raise ValueError(f"layer_norm_eps={self.layer_norm_eps} must be one number")
            (self.layer_norm_eps,) = self.layer_norm_eps.values()
        self._refuse_misspelt(kwargs)
        self._take_defaults()
        super().__post_init__(**kwargs)

    def _take_defaults(self) -> None:
        """Replace None by the paper's value, in the fields for which the placement has one."""
        if self.norm_placement in PLACEMENTS:  # else the check of the field speaks
            for name, value in PLACEMENTS[self.norm_placement].defaults(self).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)

    def _refuse_misspelt(self, names: Iterable[str]) -> None:
        """Raise for a keyword that is no field but looks like one of BERT; others pass, as in every config.

        The fields of all configs do not count: old ones look like them (`tie_encoder_decoder`).
        """
        known = sorted(self.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys())
        for name in names:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=MISSPELT)
            if nearest and not hasattr(self, name) and not name.startswith("_"):
                raise TypeError(f"BertLnConfig has no field {name!r}; did you mean {nearest[0]!r}?")

    def check_buildable(self) -> None:
        """Raise ValueError for values that no model can have; called before a model is built.

        A config may hold them, as in the stock class: tools make configs that are never built.
        """
        for name, smallest in SMALLEST.items():
            self._require(name, getattr(self, name) >= smallest, f"must be at least {smallest}")
        heads = self.num_attention_heads
        self._require(
            "hidden_size", self.hidden_size % heads == 0, f"must be a multiple of num_attention_heads={heads}"
        )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            self._require(name, 0 <= (getattr(self, name) or 0) <= 1, "must be between 0 and 1")
        is_positive = isinstance(self.layer_norm_eps, float) and self.layer_norm_eps > 0
        self._require("layer_norm_eps", is_positive, "must be a number above 0")
        self._require("hidden_act", self.hidden_act in ACT2FN, f"must be one of {sorted(ACT2FN)}")
        is_possible = self.is_decoder or not self.add_cross_attention
        self._require("add_cross_attention", is_possible, "needs is_decoder=True")
        for name in POSITIVE:
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "must be a number above 0")
        self._require("initializer_range", self.initializer_range >= 0, "must be at least 0")
        self._require("ada_norm_k", 0 <= self.ada_norm_k < math.inf, "must be a number from 0")
        self._require("mix_ln_alpha", 0 <= self.mix_ln_alpha <= 1, "must be between 0 and 1")
        self._check_method()
        self._check_attention()

    def _check_method(self) -> None:
        """Raise ValueError where placement and norm make no sense together, and for factors of others."""
        placement, norm = self.norm_placement, self.norm_type
        if reason := PLACEMENTS[placement].refusal(norm):
            pair = f"norm_type={norm!r} is not possible with norm_placement={placement!r}"
            raise ValueError(f"{pair}: {reason}")
        for option, chosen, methods in (
            ("norm_placement", placement, PLACEMENTS),
            ("norm_type", norm, NORMS),
            ("qk_norm", "qk_norm" if self.qk_norm else None, ["qk_norm"]),
            ("attention_window", "attention_window" if self.attention_window else None, ["attention_window"]),
        ):
            for method in methods:
                # `layer_norm_eps` is BERT's, and that of all norms.
                if method not in (chosen, "layer_norm"):
                    self._refuse_factors(method, f"has no effect with {option}={getattr(self, option)!r}")
        method = PLACEMENTS[placement]
        for name in method.defaults(self):
            # A placement that is assigned to a config that exists is too late for its factors.
            has_value = getattr(self, name) is not None
            reason = (
                f"has no value for norm_placement={placement!r}: give the placement when the config is made"
            )
            self._require(name, has_value, reason)
        with_placement, with_norm = f"with norm_placement={placement!r}", f"with norm_type={norm!r}"
        self._require(
            "embedding_norm",
            not (method.scales_embeddings and self.embedding_norm),
            f"must be false {with_placement}, which sets the scale of the embeddings",
        )
        self._require(
            "add_cross_attention",
            not (method.encoder_only and self.add_cross_attention),
            f"must be false {with_placement}, whose factors are those of two branches a layer",
        )
        crosses_tokens = NORMS[norm].crosses_tokens
        self._require(
            "is_decoder",
            not (crosses_tokens and self.is_decoder),
            f"must be false {with_norm}: each token would see those after it",
        )
        chunks = self.chunk_size_feed_forward
        self._require("chunk_size_feed_forward", not (chunks and crosses_tokens), f"must be 0 {with_norm}")
        self._require(
            "chunk_size_feed_forward", not (chunks and method.hands_on), f"must be 0 {with_placement}"
        )

    def _refuse_factors(self, method: str, reason: str) -> None:
        """Raise ValueError where a factor of `method`, which is not used, is not what it is by default."""
        for name, field in self.__dataclass_fields__.items():
            if name.startswith(method + "_") and getattr(self, name) != field.default:
                raise ValueError(f"{name}={getattr(self, name)!r} {reason}")

    def _check_attention(self) -> None:
        """Raise ValueError for what `attention_window` and `qk_norm` cannot have."""
        window = self.attention_window
        self._require("attention_window", window is None or window >= 1, "must be None or at least 1")
        self._require("attention_window", window is None or not self.is_decoder, "needs is_decoder=False")
        crosses_tokens = NORMS[self.norm_type].crosses_tokens
        self._require(
            "attention_window",
            window is None or not crosses_tokens,
            f"must be None with norm_type={self.norm_type!r}, which makes each token depend on all others",
        )
        self._require(
            "attention_window_global",
            not (self.attention_window_causal and self.attention_window_global == "cls"),
            "lets all tokens see each other by way of the first; with attention_window_causal=True take "
            "'none' or 'last_layer'",
        )
        has_own = PLACEMENTS[self.norm_placement].qkv_norm
        self._require(
            "qk_norm",
            self.qk_norm is None or not has_own,
            f"must be None with norm_placement={self.norm_placement!r}, which has norms on queries and keys",
        )
        length = self.qk_norm_length
        self._require("qk_norm_length", length is None or length >= 2, "must be at least 2")
        self._require(
            "qk_norm_length", length is None or self.qk_norm == "l2", "has no effect without qk_norm='l2'"
        )

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} {allowed}")

    @property
    def layers(self) -> dict[str, Any]:
        """What the layers compute: the fields `LAYERS`, and the `LAYER_DETAILS` that are not the default."""
        fields = self.__dataclass_fields__
        details = [name for name in LAYER_DETAILS if getattr(self, name) != fields[name].default]
        return {name: getattr(self, name) for name in (*LAYERS, *details)}

    @property
    def has_stock_layers(self) -> bool:
        """Whether `transformers.BertModel` computes the same from the same weights."""
        return self.layers == {"norm_placement": "post", "norm_type": "layer_norm", "embedding_norm": True}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self | tuple[Self, dict[str, Any]]:
        """Read a config; that of a stock BERT is Post-LN. Overrides in `kwargs` are checked like the rest."""
        if config_dict.get("model_type") == "bert":
            config_dict = {"norm_placement": "post", **config_dict}
        config_dict = cls._with_placement(config_dict, kwargs.get("norm_placement"))
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config._refuse_misspelt(name for name in kwargs if not hasattr(config, name))
        # The base class assigns overrides after it has validated the dictionary.
        config._take_defaults()
        config.validate()
        return result

    @classmethod
    def _with_placement(cls, config_dict: dict[str, Any], placement: str | None) -> dict[str, Any]:
        """Return the dictionary for another placement: what its own has from the paper is left open again."""
        old = config_dict.get("norm_placement", cls.norm_placement)
        if placement in (None, old) or old not in PLACEMENTS:
            return config_dict
        papers = PLACEMENTS[old].defaults(super().from_dict(config_dict))
        kept = {name: v for name, v in config_dict.items() if name not in papers or papers[name] != v}
        return kept | {"norm_placement": placement}

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to config.json; see the class for `layer_norm_eps`."""
        output = super().to_dict() | {"auto_map": dict(AUTO_MAP), "sparse_prediction": False}
        if not self.has_stock_layers:
            layers = ", ".join(f"{name}={value}" for name, value in self.layers.items())
            way_out = "load with trust_remote_code=True"
            if {**self.layers, "embedding_norm": True} == CONVERTIBLE:
                way_out += ", or convert with bert_ln.conversion"
            output["layer_norm_eps"] = {f"not stock BERT: {layers}; {way_out}": self.layer_norm_eps}
        return output


__all__ = ["BertLnConfig"]
