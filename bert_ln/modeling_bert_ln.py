"""BERT in which the place and the kind of normalisation is a choice: the model and its heads.

Only what differs from `transformers.models.bert` is written here. A layer is two residual branches
(`placements`), the encoder ends with a norm where the placement needs one, and the rest is inherited:
attention kernels, gradient checkpointing, decoding, recorded hidden states and attentions, the heads' losses.

The classes have explicit `__init__`s that skip their stock parent's: building stock modules first and
replacing them would draw random numbers twice. So the same seed gives the weights of the stock class,
whatever the placement.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import and_masks, create_bidirectional_mask, packed_sequence_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, MaskedLMOutput
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertCrossAttention,
    BertEmbeddings,
    BertEncoder,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForPreTrainingOutput,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertIntermediate,
    BertLayer,
    BertModel,
    BertOnlyMLMHead,
    BertOnlyNSPHead,
    BertPooler,
    BertPreTrainedModel,
    BertPreTrainingHeads,
    BertSelfAttention,
)
from transformers.utils.generic import can_return_tuple

from .attention import L2Norm, normalise_heads, window_mask_function
from .configuration_bert_ln import BertLnConfig
from .norms import NORM_CLASSES, NORMS, build_norm, segments_of
from .placements import (
    ATTENTION,
    CROSS_ATTENTION,
    FEED_FORWARD,
    PLACEMENTS,
    ResidualBranch,
    Stream,
    build_branch,
)

# Modules whose own parameters an optimiser must not decay: gains, biases, and factors whose aim is not 0.
NO_WEIGHT_DECAY = (*NORM_CLASSES, L2Norm, ResidualBranch)
# The attention kernels that take a mask for each pair of tokens.
ISOLATING = ("eager", "sdpa", "flex_attention")
IGNORED = -100  # a label that is not predicted, as everywhere in transformers


class BertLnEmbeddings(BertEmbeddings):
    """BERT's embeddings, with the norm of `config.norm_type` or, without `config.embedding_norm`, none."""

    def __init__(self, config: BertLnConfig) -> None:
        super().__init__(config)
        self.LayerNorm = build_norm(config, config.hidden_size) if config.embedding_norm else nn.Identity()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> torch.Tensor:
        """Embed `[batch, length]` ids as `[batch, length, hidden]`; arguments as in `BertEmbeddings`.

        Without types and positions these are added up before the words, so that the result may differ from
        the stock class in its last bits.
        """
        is_plain = token_type_ids is None and position_ids is None and inputs_embeds is None
        if not is_plain or past_key_values_length:
            return super().forward(
                input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
            )
        # Every token has the same type: it is looked up once, and gradients are summed before they are
        # scattered.
        position_ids, token_type_ids = self.position_ids[:, : input_ids.shape[1]], self.token_type_ids[:, :1]
        same = self.position_embeddings(position_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + same))


class BertLnAttention(BertAttention):
    """Attention as a residual branch: self-attention, or cross-attention in a decoder."""

    def __init__(
        self,
        config: BertLnConfig,
        is_causal: bool = False,
        layer_idx: int | None = None,
        is_cross_attention: bool = False,
    ) -> None:
        super(BertAttention, self).__init__()
        self.is_cross_attention = is_cross_attention
        attention = BertCrossAttention if is_cross_attention else BertSelfAttention
        self.self = attention(config, is_causal=is_causal, layer_idx=layer_idx)
        normalise_heads(self.self, config, with_values=PLACEMENTS[config.norm_placement].qkv_norm)
        self.output = build_branch(config, layer_idx, CROSS_ATTENTION if is_cross_attention else ATTENTION)

    def forward(
        self,
        hidden_states: Stream,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Stream, None]:
        """Return the new stream, see `placements`; attention weights are recorded at `self.self`."""
        mask = encoder_attention_mask if self.is_cross_attention else attention_mask

        def attend(x: torch.Tensor) -> torch.Tensor:
            return self.self(
                x,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )[0]

        return self.output(hidden_states, attend), None


class BertLnLayer(BertLayer):
    """Two residual branches; three in a decoder with cross-attention."""

    def __init__(self, config: BertLnConfig, layer_idx: int | None = None) -> None:
        super(BertLayer, self).__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.seq_len_dim = 1
        self.is_decoder = config.is_decoder
        self.add_cross_attention = config.add_cross_attention
        self.is_last = layer_idx == config.num_hidden_layers - 1
        self.has_window = not (self.is_last and config.attention_window_global == "last_layer")
        self.attention = BertLnAttention(config, is_causal=config.is_decoder, layer_idx=layer_idx)
        if config.add_cross_attention:
            self.crossattention = BertLnAttention(config, layer_idx=layer_idx, is_cross_attention=True)
        self.intermediate = BertIntermediate(config)
        self.output = build_branch(config, layer_idx, FEED_FORWARD)
        self._note_gains(config)

    def _note_gains(self, config: BertLnConfig) -> None:
        """Leave with each matrix by what its first values are multiplied, for `_init_weights`."""
        placement = PLACEMENTS[config.norm_placement]
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(placement.gained):
                module.init_gain = placement.gain(config)

    def forward(
        self,
        hidden_states: Stream,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        window_mask: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        needed_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Stream:
        """Return the new stream, see `placements`; arguments as in `BertLayer`, and

        `window_mask`, the attention mask where the layer has a window, in the form of `attention_mask`;
        `segments` `[batch, length]`, for the norms that cross tokens (`norms.segments_of`);
        `needed_positions` `[batch, n]`: the last layer of an encoder returns the stream there only.
        """
        if window_mask is not None and self.has_window:
            attention_mask = window_mask
        with segments_of(self, segments):
            if needed_positions is None or not self.is_last:
                return super().forward(hidden_states, attention_mask, *args, **kwargs)
            stream, _ = self.attention(hidden_states, attention_mask, **kwargs)
            return self.feed_forward_chunk(at_positions(stream, needed_positions))

    def feed_forward_chunk(self, attention_output: Stream) -> Stream:
        """Apply the feed-forward branch to the stream."""
        return self.output(attention_output, self.intermediate)


class BertLnEncoder(BertEncoder):
    """A stack of layers, and after it one more norm where the placement leaves the stream unnormalised."""

    def __init__(self, config: BertLnConfig) -> None:
        super(BertEncoder, self).__init__()
        self.config = config
        self.layer = nn.ModuleList(
            [BertLnLayer(config, layer_idx=i) for i in range(config.num_hidden_layers)]
        )
        self.placement = PLACEMENTS[config.norm_placement]
        has_norm = self.placement.final_norm
        self.final_norm = build_norm(config, config.hidden_size) if has_norm else nn.Identity()

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Run all layers: `[batch, length, hidden]` to the same, after the final norm where there is one."""
        output = super().forward(*args, **kwargs)
        with segments_of(self.final_norm, kwargs.get("segments")):
            output.last_hidden_state = self.placement.finish(output.last_hidden_state, self.final_norm)
        return output


class BertLnPreTrainedModel(BertPreTrainedModel):
    """Loading that refuses weights of another architecture; all else as in the stock class."""

    config: BertLnConfig
    config_class = BertLnConfig
    _no_split_modules: ClassVar[list[str]] = ["BertLnEmbeddings", "BertLnLayer"]
    # Only the masked-language-model head divides by `num_items_in_batch`. Told so, transformers.Trainer
    # divides the loss of the other heads by the number of accumulation steps.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Set the first values of a module's own parameters.

        Norms and branches know theirs. Matrices follow `config.initializer` and the gain of the placement,
        embeddings its deviation. The same seed draws the same numbers, whatever these are.
        """
        if isinstance(module, (*NORMS.values(), L2Norm, ResidualBranch)):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            self._init_matrix(module.weight, getattr(module, "init_gain", 1.0))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=PLACEMENTS[self.config.norm_placement].embedding_std(self.config))
            # The row of a loaded table does not carry the mark of its table.
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        else:
            super()._init_weights(module)

    def _init_matrix(self, weight: torch.Tensor, gain: float) -> None:
        """Draw `[out, in]` with variance (gain initializer_range)^2, or Xavier, 2 gain^2 / (in + out)."""
        if self.config.initializer == "xavier_normal":
            init.xavier_normal_(weight, gain=gain)
        else:
            init.normal_(weight, std=gain * self.config.initializer_range)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Refuse the reentrant way where layers hand on two streams: it would lose gradients."""
        is_reentrant = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False)
        placement = self.config.norm_placement
        if enable and is_reentrant and PLACEMENTS[placement].hands_on == "to the end":
            raise ValueError(f"use_reentrant=True is not possible with norm_placement={placement!r}")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load a model; raise ValueError where the weights belong to another `norm_placement` or `norm_type`.

        Two things tell: the source's own config.json, whatever config is given, and the names of the norms.
        New heads (a classifier, a pooler) and more or fewer layers are allowed, as in the stock classes.
        """
        source = pretrained_model_name_or_path
        model, info = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        reason = _other_config(model.config, source, kwargs) or _other_norms(info)
        if reason:
            layers = ", ".join(f"{name}={value!r}" for name, value in model.config.layers.items())
            raise ValueError(
                f"{source} holds the weights of another architecture than {layers}: {reason}. "
                "Load it with its own config: weights cannot be moved between methods."
            )
        return (model, info) if output_loading_info else model


def _other_config(
    config: BertLnConfig, source: str | os.PathLike | None, download: dict[str, Any]
) -> str | None:
    """Return how the layers in the config.json of `source` differ from those of `config`, if they do.

    `download` are the arguments of `from_pretrained`, which say where in the Hub the file is.
    """
    if source is None:
        return None
    # Only the Auto classes act on it, and reading a file of ours runs no code.
    download = {name: value for name, value in download.items() if name != "trust_remote_code"}
    try:
        found = BertLnConfig.get_config_dict(source, **download)[0]
    except OSError:
        found = {}
    if not found:  # weights without a config
        return None
    stated = BertLnConfig.from_dict(found).layers
    # A window has no weights: it may be put on, or taken off, when a model is loaded.
    ours = {name: value for name, value in config.layers.items() if not name.startswith("attention_window")}
    theirs = {name: value for name, value in stated.items() if not name.startswith("attention_window")}
    different = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    words = ", ".join(f"{name}={theirs[name]!r}" for name in different if name in theirs)
    return f"its config.json says {words or 'nothing of ' + ', '.join(different)}" if different else None


# Every layer has this weight, in every placement.
_IN_LAYER = "attention.self.query.weight"


def _other_norms(info: dict[str, list[str]]) -> str | None:
    """Return which norms `info`, the report of loading weights, lists as missing or left over, if any."""
    # Weights without the layers at all say nothing about them; the base class reports what is new.
    has_none = any(key.endswith("encoder.layer.0." + _IN_LAYER) for key in info["missing_keys"])
    if has_none and not any("encoder.layer.0." in key for key in info["unexpected_keys"]):
        return None
    missing, unexpected = (_stray_norms(info[key]) for key in ("missing_keys", "unexpected_keys"))
    if not missing and not unexpected:
        return None
    return (
        f"{len(missing)} norm parameters are missing {missing[:2]}, "
        f"{len(unexpected)} are left over {unexpected[:2]}"
    )


def _stray_norms(keys: Iterable[str]) -> list[str]:
    """Return the norms among `keys`, but not those of layers that are among them as a whole."""
    whole = tuple(key.removesuffix(_IN_LAYER) for key in keys if key.endswith("." + _IN_LAYER))
    return sorted(key for key in keys if _is_norm(key) and not key.startswith(whole))


def _is_norm(key: str) -> bool:
    """Whether a parameter is that of a norm, ours or (`ln`) of Megatron-BERT, or a factor of a branch."""
    *modules, _ = key.split(".")
    in_stream = "encoder" in modules or "embeddings" in modules
    # Cross-attention may be new: a decoder that starts from an encoder has to train it.
    is_norm = "ln" in modules or any("norm" in module.lower() for module in modules)
    is_factor = modules[-1:] == ["output"]  # the branch's own, such as omega
    return in_stream and (is_norm or is_factor) and "crossattention" not in modules


class BertLnModel(BertLnPreTrainedModel, BertModel):
    """The encoder: embeddings, layers, final norm, and optionally the pooler."""

    def __init__(self, config: BertLnConfig, add_pooling_layer: bool = True) -> None:
        config.check_buildable()
        super(BertModel, self).__init__(config)
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = BertLnEmbeddings(config)
        self.encoder = BertLnEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        *,
        document_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...] | BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode `[batch, length]` token ids as `[batch, length, hidden]`; arguments as in `BertModel`.

        `document_ids`, integers `[batch, length]`, isolates documents that share a block: a token attends to
        tokens of its own document only. Positions are not touched; give `position_ids` where each document
        starts at 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        shape = (inputs_embeds if input_ids is None else input_ids).shape[:2]
        attention_mask, masks = self._masks(document_ids, attention_mask, shape)
        with segments_of(self.embeddings, masks.get("segments")):
            return super().forward(
                input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **masks,
                **kwargs,
            )

    def _masks(
        self, document_ids: torch.Tensor | None, padding: torch.Tensor | None, shape: torch.Size
    ) -> tuple[Any, dict[str, Any]]:
        """Return the attention mask of all layers, and what layers get besides: see `BertLnLayer.forward`.

        `document_ids` are `[batch, length]`, or `[batch, choices, length]` as multiple choice gets them;
        `padding` is 1 for real tokens, `shape` = `[rows, length]`.
        """
        has_window = self.config.attention_window is not None
        crosses_tokens = NORMS[self.config.norm_type].crosses_tokens
        if document_ids is None and not has_window and not (crosses_tokens and padding is not None):
            return padding, {}
        self._check_isolation(document_ids, padding)
        documents = self._documents(document_ids, padding, shape)
        masks: dict[str, Any] = {"segments": documents} if crosses_tokens else {}
        if has_window:
            first = (documents.unsqueeze(1) == documents.unsqueeze(2)).int().argmax(-1)  # [rows, length]
            is_first = first == torch.arange(first.shape[1], device=first.device)
            masks["window_mask"] = self._isolated(documents, window_mask_function(self.config, is_first))
        return (padding if document_ids is None else self._isolated(documents)), masks

    def _check_isolation(self, document_ids: torch.Tensor | None, padding: torch.Tensor | None) -> None:
        """Raise ValueError where the attention kernel, or the form of `padding`, has no way to isolate."""
        option = "attention_window" if document_ids is None else "document_ids"
        if document_ids is None and self.config.attention_window is None:
            option = f"norm_type={self.config.norm_type!r}"
        elif self.config._attn_implementation not in ISOLATING or self.config.is_decoder:
            raise ValueError(
                f"{option} need an encoder with attn_implementation 'eager', 'sdpa' or 'flex_attention', "
                f"got {self.config._attn_implementation!r} with is_decoder={self.config.is_decoder}"
            )
        if padding is not None and padding.ndim != 2:
            raise ValueError(
                f"{option} need an attention_mask [batch, length], got shape {tuple(padding.shape)}"
            )

    def _documents(
        self, document_ids: torch.Tensor | None, padding: torch.Tensor | None, shape: torch.Size
    ) -> torch.Tensor:
        """Return the number of each token's document, int64 `[rows, length]`.

        Each padding token becomes a document of its own: nobody attends to it, and no row is left empty,
        which would be NaN after the softmax.
        """
        if document_ids is None:
            device = self.embeddings.position_ids.device if padding is None else padding.device
            documents = torch.zeros(shape, dtype=torch.long, device=device)
        else:
            documents = document_ids.long().flatten(0, -2)
        if padding is None:
            return documents
        alone = documents.max() + 1 + torch.arange(documents.shape[1], device=documents.device)
        return torch.where(padding.bool(), documents, alone)

    def _isolated(self, documents: torch.Tensor, *also: Callable[..., torch.Tensor]) -> Any:
        """Return the mask of attention within `documents` `[rows, length]`, where all of `also` allow it.

        It has the form that the attention kernel takes.
        """
        # create_bidirectional_mask reads shape, dtype and device only; scores have the dtype of the weights.
        dtype = self.embeddings.word_embeddings.weight.dtype
        states = torch.empty(1, dtype=dtype, device=documents.device).expand(*documents.shape, 1)
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=states,
            attention_mask=None,
            and_mask_function=and_masks(packed_sequence_mask_function(documents), *also),
        )


def at_positions(stream: Stream, positions: torch.Tensor) -> Stream:
    """Return a stream `[batch, length, hidden]` at `positions` `[batch, n]`: `[batch, n, hidden]`.

    What a placement hands on besides may be a factor, which has no positions.
    """
    if isinstance(stream, tuple):
        return tuple(part if part.ndim < 3 else at_positions(part, positions) for part in stream)
    return stream.gather(1, positions.unsqueeze(-1).expand(-1, -1, stream.shape[-1]))


def can_narrow(config: BertLnConfig) -> bool:
    """Whether the last feed-forward block may work at some positions only: no other token needs the rest."""
    crosses_tokens = NORMS[config.norm_type].crosses_tokens
    return config.num_hidden_layers > 0 and not config.is_decoder and not crosses_tokens


def select_predictions(
    config: BertLnConfig,
    hidden: torch.Tensor,
    labels: torch.Tensor | None,
    masked_positions: torch.Tensor | None,
    are_selected: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the hidden states to score and their labels; see `BertLnForMaskedLM.forward` for the shapes.

    Without sparse prediction, or with nothing that says where the masks are, that is everything as it came.
    `are_selected` says that `hidden` is that of `masked_positions` already.
    """
    if masked_positions is None:
        if not config.sparse_prediction or labels is None:
            return hidden, labels
        is_masked = labels != IGNORED
        return hidden[is_masked], labels[is_masked]  # [masked, hidden], [masked]
    selected = hidden if are_selected else at_positions(hidden, masked_positions)
    return selected.flatten(0, 1), None if labels is None else labels.flatten()


def check_positions(
    config: BertLnConfig,
    batch: torch.Tensor | None,
    labels: torch.Tensor | None,
    masked_positions: torch.Tensor | None,
) -> None:
    """Raise ValueError where `masked_positions` do not fit the config, the labels or the rows of `batch`."""
    if masked_positions is None or batch is None:
        return
    if not config.sparse_prediction:
        raise ValueError("masked_positions need a config with sparse_prediction=True")
    if labels is not None and labels.shape != masked_positions.shape:
        shapes = f"{tuple(labels.shape)} and {tuple(masked_positions.shape)}"
        raise ValueError(f"labels and masked_positions must be aligned, got shapes {shapes}")
    if len(masked_positions) != len(batch):
        raise ValueError(f"masked_positions have {len(masked_positions)} rows, the batch has {len(batch)}")


def masked_lm_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """Return the cross entropy in float32, summed over all labels but -100 and divided by their number.

    With gradient accumulation or several processes, the number is that of the global batch:
    `num_items_in_batch`. A batch without masked tokens has loss 0 and zero gradients.
    """
    scores = logits.float().view(-1, logits.shape[-1])
    total = F.cross_entropy(scores, labels.view(-1), ignore_index=IGNORED, reduction="sum")
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


class BertLnForMaskedLM(BertLnPreTrainedModel, BertForMaskedLM):
    """The encoder with the masked-language-model head, dense or sparse."""

    accepts_loss_kwargs = True

    def __init__(self, config: BertLnConfig) -> None:
        super(BertForMaskedLM, self).__init__(config)
        self.bert = BertLnModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...] | MaskedLMOutput:
        """Score the vocabulary, and with `labels` return the loss too (see `masked_lm_loss`).

        The loss is divided by `num_items_in_batch` where given, else by the number of labels that are not
        -100. Where all are -100 it is 0; in the stock class it is NaN.

        | `config.sparse_prediction` | given | logits |
        |---|---|---|
        | false | | `[batch, length, vocab]`; `labels` `[batch, length]` |
        | true | neither `labels` nor `masked_positions` | `[batch, length, vocab]` |
        | true | `labels` `[batch, length]` | `[masked, vocab]`, where the labels are not -100 |
        | true | `masked_positions` and `labels` `[batch, capacity]` | static `[batch * capacity, vocab]` |

        Unused entries of `masked_positions` may hold any position, with the label -100. With them the last
        feed-forward block of an encoder works at these positions only, unless hidden states are asked for or
        the norm crosses tokens: nobody would look at the others.
        """
        check_positions(
            self.config, input_ids if inputs_embeds is None else inputs_embeds, labels, masked_positions
        )
        is_narrow = masked_positions is not None and not self._needs_all_positions(kwargs)
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=True,
            **({"needed_positions": masked_positions} if is_narrow else {}),
            **kwargs,
        )
        hidden, labels = select_predictions(
            self.config, outputs.last_hidden_state, labels, masked_positions, are_selected=is_narrow
        )
        logits, loss = self.score(hidden, labels, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def score(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits `[..., vocab]` of `hidden` `[..., hidden]`, and with `labels` the loss."""
        logits = self.cls(hidden)
        return logits, None if labels is None else masked_lm_loss(logits, labels, num_items_in_batch)

    def _needs_all_positions(self, asked: dict[str, Any]) -> bool:
        """Whether the last layer must work where nothing is predicted, too."""
        hidden_states = asked.get("output_hidden_states")
        records = self.config.output_hidden_states if hidden_states is None else hidden_states
        return bool(records or not can_narrow(self.config))


class BertLnForPreTraining(BertLnPreTrainedModel, BertForPreTraining):
    """The encoder with the heads of Devlin et al.: masked language model and next sentence."""

    def __init__(self, config: BertLnConfig) -> None:
        super(BertForPreTraining, self).__init__(config)
        self.bert = BertLnModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...] | BertForPreTrainingOutput:
        """Score vocabulary and sentence pair; the loss needs both kinds of label, as in the stock class.

        `labels`, `masked_positions`, `num_items_in_batch` and the prediction logits are those of
        `BertLnForMaskedLM`. The loss of the sentence pairs is always the mean over the batch.
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        check_positions(self.config, outputs.last_hidden_state, labels, masked_positions)
        hidden, labels = select_predictions(self.config, outputs.last_hidden_state, labels, masked_positions)
        logits, pair_logits = self.cls(hidden, outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            pair_loss = F.cross_entropy(pair_logits.float().view(-1, 2), next_sentence_label.view(-1))
            loss = masked_lm_loss(logits, labels, num_items_in_batch) + pair_loss
        return BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=pair_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class BertLnForNextSentencePrediction(BertLnPreTrainedModel, BertForNextSentencePrediction):
    """The encoder with the next-sentence head."""

    def __init__(self, config: BertLnConfig) -> None:
        super(BertForNextSentencePrediction, self).__init__(config)
        self.bert = BertLnModel(config)
        self.cls = BertOnlyNSPHead(config)
        self.post_init()


def _classifier_dropout(config: BertLnConfig) -> nn.Dropout:
    """Return the dropout before a classifier: its own probability, or that of the hidden states."""
    own = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if own is None else own)


class BertLnForSequenceClassification(BertLnPreTrainedModel, BertForSequenceClassification):
    """The encoder with a classifier or regressor on the pooled first token."""

    def __init__(self, config: BertLnConfig) -> None:
        super(BertForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertLnModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class BertLnForMultipleChoice(BertLnPreTrainedModel, BertForMultipleChoice):
    """The encoder with one score for each choice, from the pooled first token."""

    def __init__(self, config: BertLnConfig) -> None:
        super(BertForMultipleChoice, self).__init__(config)
        self.bert = BertLnModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()


class BertLnForTokenClassification(BertLnPreTrainedModel, BertForTokenClassification):
    """The encoder with a classifier on every token."""

    def __init__(self, config: BertLnConfig) -> None:
        super(BertForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertLnModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class BertLnForQuestionAnswering(BertLnPreTrainedModel, BertForQuestionAnswering):
    """The encoder with start and end scores on every token."""

    def __init__(self, config: BertLnConfig) -> None:
        super(BertForQuestionAnswering, self).__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertLnModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "BertLnForMaskedLM",
    "BertLnForMultipleChoice",
    "BertLnForNextSentencePrediction",
    "BertLnForPreTraining",
    "BertLnForQuestionAnswering",
    "BertLnForSequenceClassification",
    "BertLnForTokenClassification",
    "BertLnModel",
    "BertLnPreTrainedModel",
]
