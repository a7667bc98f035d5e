"""BERT whose layer normalisation, its place and its kind, is a configuration choice.

Importing this package registers everything with the Auto classes of transformers.
"""

import transformers

from .configuration_bert_ln import AUTO_MAP, BertLnConfig
from .modeling_bert_ln import (
    BertLnForMaskedLM,
    BertLnForMultipleChoice,
    BertLnForNextSentencePrediction,
    BertLnForPreTraining,
    BertLnForQuestionAnswering,
    BertLnForSequenceClassification,
    BertLnForTokenClassification,
    BertLnModel,
    BertLnPreTrainedModel,
)


def _register() -> None:
    """Register the config, the tokenizer and every class of `AUTO_MAP`."""
    transformers.AutoConfig.register(BertLnConfig.model_type, BertLnConfig, exist_ok=True)
    transformers.AutoTokenizer.register(
        BertLnConfig, fast_tokenizer_class=transformers.BertTokenizerFast, exist_ok=True
    )
    for auto_class, reference in AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = globals()[reference.split(".")[1]]
            getattr(transformers, auto_class).register(BertLnConfig, model_class, exist_ok=True)


_register()

__all__ = [
    "BertLnConfig",
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
