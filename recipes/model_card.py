"""The README.md of a finished model, written from its run."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from bert_ln import BertLnConfig

TEXT = """\
# {name}

A BERT encoder, pre-trained on masked tokens. What its layers compute: {layers}.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("PATH_OF_THIS_FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER", trust_remote_code=True)
```

| | |
|---|---|
| updates | {step:,} |
| tokens seen | {tokens_seen:,} |
| validation loss (nats a masked token) | {validation_loss:.4f} |
| unigram cross-entropy of the corpus | {unigram_cross_entropy:.4f} |
| validation accuracy | {validation_accuracy:.4f} |
| validation masks | {mask_fingerprint} |

All options, versions and fingerprints are in `run.json`, every measured value in `metrics.jsonl`.
"""


def write_model_card(folder: Path, record: dict[str, Any], results: dict[str, Any]) -> None:
    """Write `folder/README.md` with the metadata that the Hub reads."""
    config = BertLnConfig(**record["model_config"])
    text = TEXT.format(
        name=folder.resolve().name,
        layers=", ".join(f"`{name}: {value}`" for name, value in config.layers.items()),
        unigram_cross_entropy=record["unigram_cross_entropy"],
        mask_fingerprint=record["mask_fingerprint"],
        **results,
    )
    data = ModelCardData(library_name="transformers", pipeline_tag="fill-mask", tags=["bert", "bert-ln"])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")
