"""Convert a model folder between BertLn and the stock architecture that computes the same.

    python -m bert_ln.conversion SRC DST --to bert                   Post-LN, as transformers.Bert*
    python -m bert_ln.conversion SRC DST --to megatron-bert          Pre-LN without embedding norm
    python -m bert_ln.conversion SRC DST --to roberta-prelayernorm   Pre-LN with embedding norm
    python -m bert_ln.conversion SRC DST --to bert_ln                from any of these three

SRC is a folder with config.json and weights; its head is read from `architectures`, and weights that this
head does not have are dropped with a warning. DST must not exist, or be empty; it appears complete or not at
all. The written folder loads in the stock class without custom code and gives the same outputs. Tokenizer
files are copied. What has no counterpart is refused with one line and exit code 2: a placement or norm that
the stock architecture lacks, a head that it lacks, a decoder.

Two things to know about RoBERTa-PreLayerNorm. It counts positions from `pad_token_id + 1`, so its table of
positions gets that many rows more. And it does not count padding: padding in the middle of a sequence shifts
what follows, which it does not in BERT.
"""

import argparse
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

import bert_ln
from bert_ln import BertLnConfig

logger = logging.getLogger(__name__)

Renames = Sequence[tuple[str, str]]

# Left our name, right theirs. `{layer}` is any layer, `base.` the encoder, whatever its prefix in a head.
MEGATRON_NAMES: Renames = (
    ("base.encoder.{layer}.attention.output.pre_norm", "base.encoder.{layer}.attention.ln"),
    ("base.encoder.{layer}.output.pre_norm", "base.encoder.{layer}.ln"),
    ("base.encoder.final_norm", "base.encoder.ln"),
)
ROBERTA_NAMES: Renames = (
    ("base.encoder.{layer}.attention.output.pre_norm", "base.encoder.{layer}.attention.LayerNorm"),
    ("base.encoder.{layer}.output.pre_norm", "base.encoder.{layer}.intermediate.LayerNorm"),
    ("base.encoder.final_norm", "base.LayerNorm"),
    ("cls.predictions.transform.dense", "lm_head.dense"),
    ("cls.predictions.transform.LayerNorm", "lm_head.layer_norm"),
    ("cls.predictions", "lm_head"),
)
# RoBERTa's classifier of sequences holds what is BERT's pooler.
ROBERTA_CLASSIFIER_NAMES: Renames = (
    ("base.pooler.dense", "classifier.dense"),
    ("classifier", "classifier.out_proj"),
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)

ROBERTA_HEADS = (
    "Model",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
)
BERT_HEADS = (*ROBERTA_HEADS, "ForNextSentencePrediction", "ForPreTraining")


class Family(NamedTuple):
    """An architecture: where its classes are, which heads it has, and which BertLn computes the same."""

    package: ModuleType
    class_prefix: str
    heads: tuple[str, ...]
    layers: dict[str, str | bool]
    names: Renames
    # Its own masked-LM head, classifier of sequences and way of counting positions.
    is_roberta: bool = False

    def class_for(self, head: str) -> type[PreTrainedModel]:
        """Return the model class of a head such as "ForMaskedLM"."""
        return getattr(self.package, self.class_prefix + head)


def _layers(placement: str, embedding_norm: bool) -> dict[str, str | bool]:
    """Return the fields of `BertLnConfig` that say what the layers compute."""
    return {"norm_placement": placement, "norm_type": "layer_norm", "embedding_norm": embedding_norm}


STOCK: dict[str, Family] = {
    "bert": Family(transformers, "Bert", BERT_HEADS, _layers("post", True), ()),
    "megatron-bert": Family(transformers, "MegatronBert", BERT_HEADS, _layers("pre", False), MEGATRON_NAMES),
    "roberta-prelayernorm": Family(
        transformers, "RobertaPreLayerNorm", ROBERTA_HEADS, _layers("pre", True), ROBERTA_NAMES, True
    ),
}
OURS = Family(bert_ln, "BertLn", BERT_HEADS, {}, ())
FAMILIES = {**STOCK, BertLnConfig.model_type: OURS}


def convert(source: Path, destination: Path, to: str) -> PreTrainedModel:
    """Convert the model folder `source` to the family `to`, write it to `destination` and return the model.

    Raises ValueError for what cannot be converted, before anything is written.
    """
    if destination.is_file() or (destination.exists() and any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty folder")
    try:
        converted = _converted(source, to)
    except (ValueError, OSError):
        raise
    except Exception as error:  # broken configs and weights fail in many ways
        raise ValueError(f"{source} cannot be converted: {type(error).__name__}: {error}") from error
    destination = destination.resolve()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as aside:
        folder = Path(aside) / destination.name
        converted.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        folder.replace(destination)
    return converted


def _converted(source: Path, to: str) -> PreTrainedModel:
    """Read the model folder `source` and return the model of the family `to` that computes the same."""
    config, head = _read(source)
    stock = _stock_side(config, to)
    _check(config, head, to, stock)
    model = _load(FAMILIES[config.model_type].class_for(head), source)
    return _moved(model, head, to, STOCK[stock])


def _read(source: Path) -> tuple[PreTrainedConfig, str]:
    """Return the config of a model folder and its head, such as "ForMaskedLM"."""
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} is no model folder: it has no config.json")
    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{source} has model_type {model_type!r}; known are {sorted(FAMILIES)}")
    family = FAMILIES[model_type]
    config = family.class_for("Model").config_class.from_pretrained(source)
    names = config.architectures or []
    heads = [head for head in family.heads if family.class_prefix + head in names]
    if not heads:
        raise ValueError(f"{source} has architectures {names}, none of which can be converted")
    return config, heads[0]


def _stock_side(config: PreTrainedConfig, to: str) -> str:
    """Return which stock family takes part; the other side is always BertLn."""
    ours = BertLnConfig.model_type
    if (config.model_type == ours) == (to == ours):
        raise ValueError(f"cannot convert {config.model_type} to {to}: exactly one of them must be {ours}")
    return config.model_type if to == ours else to


def _check(config: PreTrainedConfig, head: str, to: str, stock: str) -> None:
    """Raise ValueError where the stock family and `config` with `head` do not compute the same."""
    family = STOCK[stock]
    wanted = config.layers if isinstance(config, BertLnConfig) else family.layers
    if wanted != family.layers:
        raise ValueError(f"{to} computes {family.layers}, not {wanted}{_advice(wanted)}")
    if head not in family.heads:
        raise ValueError(f"{to} has no head {head!r}, only {list(family.heads)}")
    if config.is_decoder or config.add_cross_attention:
        raise ValueError("only encoders can be converted: is_decoder and add_cross_attention must be false")
    if family.is_roberta:
        _check_roberta(config, head)


def _advice(layers: dict[str, str | bool]) -> str:
    """Return a hint at the family that does compute these layers, if there is one."""
    fitting = [name for name, family in STOCK.items() if family.layers == layers]
    return f"; use --to {fitting[0]}" if fitting else "; no stock architecture does"


def _check_roberta(config: PreTrainedConfig, head: str) -> None:
    """Raise ValueError for what RoBERTa-PreLayerNorm has fixed."""
    if head == "ForMaskedLM" and config.hidden_act != "gelu":
        raise ValueError(
            f"the head of roberta-prelayernorm always uses gelu, not hidden_act={config.hidden_act!r}"
        )
    if config.pad_token_id is None:
        raise ValueError("roberta-prelayernorm counts positions from pad_token_id, which is None")


def _load(model_class: type[PreTrainedModel], source: Path) -> PreTrainedModel:
    """Load the source; raise ValueError where weights would be random numbers or layers would be lost."""
    model, info = model_class.from_pretrained(source, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"{source} lacks weights of {model_class.__name__}: {sorted(info['missing_keys'])[:3]}"
        )
    left = sorted(info["unexpected_keys"])
    if layers := [key for key in left if "encoder.layer." in key]:
        raise ValueError(f"{source} has weights of layers that its config.json does not have: {layers[:3]}")
    if left:
        logger.warning("dropped weights that %s does not have: %s", model_class.__name__, ", ".join(left))
    return model


def _moved(model: PreTrainedModel, head: str, to: str, stock: Family) -> PreTrainedModel:
    """Return a new model of the family `to` with the weights of `model`."""
    to_stock = stock is FAMILIES[to]
    renames = stock.names
    if stock.is_roberta and head == "ForSequenceClassification":
        renames = (*ROBERTA_CLASSIFIER_NAMES, *renames)
    if not to_stock:
        renames = [(theirs, ours) for ours, theirs in renames]
    target_class = FAMILIES[to].class_for(head)
    config = _converted_config(model.config, target_class.config_class, {} if to_stock else stock.layers)
    state = _renamed(model, target_class.base_model_prefix, head != "Model", renames)
    if stock.is_roberta:
        _shift_positions(config, state, to_stock)
    converted = target_class(config).to(model.dtype).eval()
    converted.load_state_dict(state)
    return converted


def _converted_config(
    config: PreTrainedConfig, config_class: type[PreTrainedConfig], layers: dict[str, str | bool]
) -> PreTrainedConfig:
    """Return a config of `config_class` with all fields that both have, and with `layers`."""
    shared = [field.name for field in fields(config_class) if hasattr(config, field.name)]
    own = ("architectures", "transformers_version")
    return config_class(**{name: getattr(config, name) for name in shared if name not in own}, **layers)


def _renamed(
    model: PreTrainedModel, prefix: str, has_head: bool, renames: Iterable[tuple[str, str]]
) -> dict[str, torch.Tensor]:
    """Return the weights of `model` under the names of the target, whose encoder has the name `prefix`."""
    old_base = f"{model.base_model_prefix}." if has_head else ""
    new_base = f"{prefix}." if has_head else ""
    state = {}
    for name, weight in model.state_dict().items():
        neutral = "base." + name.removeprefix(old_base) if name.startswith(old_base) else name
        renamed = _rename(neutral, renames)
        state[new_base + renamed.removeprefix("base.") if renamed.startswith("base.") else renamed] = weight
    return state


def _rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """Return `name` with the first of `renames` that fits its beginning, or unchanged."""
    for old, new in renames:
        pattern = re.escape(old + ".").replace(re.escape("{layer}"), r"(?P<layer>layer\.\d+)")
        if match := re.match(pattern, name):
            return new.format(**match.groupdict()) + "." + name[match.end() :]
    return name


def _shift_positions(config: PreTrainedConfig, state: dict[str, torch.Tensor], to_roberta: bool) -> None:
    """Add, or take away, the rows that RoBERTa's table of positions has before position 0."""
    name = next(key for key in state if key.endswith("embeddings.position_embeddings.weight"))
    table, extra = state[name], config.pad_token_id + 1  # table: [positions, hidden]
    if to_roberta:
        state[name] = torch.cat([table.new_zeros(extra, table.shape[1]), table])
    else:
        state[name] = table[extra:].clone()
    config.max_position_embeddings = state[name].shape[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, convert, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bert_ln.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="model folder to read")
    parser.add_argument("destination", metavar="DST", type=Path, help="model folder to write; new or empty")
    parser.add_argument("--to", required=True, choices=sorted(FAMILIES), help="architecture to write")
    options = parser.parse_args(arguments)
    try:
        model = convert(options.source, options.destination, options.to)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {options.destination}: {type(model).__name__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
