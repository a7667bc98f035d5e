"""Tiny models and batches, shared by the tests of `bert_ln`."""

import torch
import transformers

import bert_ln
from bert_ln import BertLnConfig

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)
PLACEMENTS = ("post", "pre")
# What a saved folder carries of our code.
CODE = {"attention.py", "configuration_bert_ln.py", "modeling_bert_ln.py", "norms.py", "placements.py"}


def ours(head="ForMaskedLM", placement="pre", seed=0, **settings):
    """A tiny model of ours, in evaluation mode."""
    config = BertLnConfig(**{**SIZES, **settings}, norm_placement=placement)
    torch.manual_seed(seed)
    return getattr(bert_ln, f"BertLn{head}")(config).eval()


def stock(head="ForMaskedLM", seed=0, family="Bert", **settings):
    """The stock model of the same sizes and seed."""
    config_class = getattr(transformers, f"{family}Config")
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}{head}")(config_class(**{**SIZES, **settings})).eval()


def randomise(model, seed=1):
    """Give every parameter another value, so that swapped or forgotten norms and biases show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    return model


def batch(rows=3, length=12, padded=True, seed=2):
    """Token ids, segment ids and a mask; the last tokens of the last row are padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, SIZES["vocab_size"], (rows, length), generator=generator)
    mask = torch.ones_like(input_ids)
    if padded:
        mask[-1, -4:] = 0
    segments = torch.zeros_like(input_ids)
    segments[:, length // 2 :] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": segments}


def mlm_labels(input_ids, seed=3, rate=0.4):
    """Labels at random positions, -100 elsewhere."""
    chosen = torch.rand(input_ids.shape, generator=torch.Generator().manual_seed(seed)) < rate
    return torch.where(chosen, input_ids, -100)


def head_inputs(head, rows=3):
    """A batch with the labels that a head takes."""
    inputs = batch(rows)
    if head == "ForMultipleChoice":
        inputs = {name: value.unsqueeze(1).expand(-1, 2, -1).contiguous() for name, value in inputs.items()}
    sentence = torch.arange(rows) % 2
    labels = {
        "Model": {},
        "ForMaskedLM": {"labels": mlm_labels(inputs["input_ids"])},
        "ForPreTraining": {"labels": mlm_labels(inputs["input_ids"]), "next_sentence_label": sentence},
        "ForSequenceClassification": {"labels": sentence},
        "ForTokenClassification": {"labels": inputs["token_type_ids"]},
        "ForQuestionAnswering": {"start_positions": sentence, "end_positions": sentence + 3},
        "ForMultipleChoice": {"labels": sentence},
        "ForNextSentencePrediction": {"labels": sentence},
    }
    return inputs | labels[head]
