"""Fine-tune the stock way and ours in one run: same model, task, batch, epochs and seed.

    python glue_eval/benchmark.py --model_name_or_path DIR_OR_REPO --data_dir DIR

The stock way is what the text-classification example of transformers does with its default settings:
examples in random order, each batch padded to its longest, AdamW, linear decay, float32, Accelerate,
validation in batches of 8. Ours is a run of `glue_eval/run.py` on as many threads. Options are those of
`glue_eval/run.py`; `--seeds N` repeats both. It prints examples per second of training, the whole time, and
the scores. Leave the machine otherwise idle.
"""

import sys
import time
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, get_scheduler

import bert_ln  # noqa: F401  registers its classes with the Auto classes
from glue_eval.arguments import GlueArguments, parse_glue_arguments
from glue_eval.data import Examples
from glue_eval.evaluation import plan_jobs, read_data
from glue_eval.finetuning import Job, finetune
from glue_eval.jobs import choose_device
from glue_eval.models import find_sources, inspect_model, load_tokenizer
from glue_eval.report import number
from glue_eval.scores import task_scores
from recipes.errors import UserError
from recipes.intervals import mean_interval
from recipes.launch import choose_precision, set_threads

# The defaults of the stock example, with the batch that the comparison is about.
DEFAULTS = {"task": "mrpc", "seeds": 1, "warmup_steps": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0}
STOCK_EVAL_BATCH_SIZE = 8


def main() -> int:
    """Parse, call, done."""
    try:
        compare(parse_glue_arguments(prog="glue_eval/benchmark.py", defaults=DEFAULTS))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(args: GlueArguments) -> None:
    """Run both ways, seed by seed, and print what they did."""
    device = choose_device()
    bf16, precision = choose_precision(args.bf16, device)
    with TemporaryDirectory() as cache:
        jobs, examples = _plan(args, cache, bf16)
        print(f"{set_threads()}; stock: float32; ours: {precision}")
        rows: dict[str, list[dict[str, float]]] = {"stock": [], "ours": []}
        for job in jobs:
            for way, run in (("stock", run_stock), ("ours", run_ours)):
                begun = time.perf_counter()
                measured = run(job, examples, device)
                rows[way].append(measured | {"seconds": time.perf_counter() - begun})
                print(f"{way:<6} seed {job.seed}: {_words(rows[way][-1])}", flush=True)
    _print_means(rows)


def _plan(args: GlueArguments, cache: str, bf16: bool) -> tuple[list[Job], dict[str, Examples]]:
    if len(args.tasks) > 1 or len(args.settings()) > 1:
        raise UserError(f"task {args.task}: one task and one setting are timed")
    args = GlueArguments(**(vars(args) | {"cache_dir": cache}))
    data = read_data(args)
    model = inspect_model(find_sources(args)[-1], args.tasks[0], args.max_seq_length)
    return plan_jobs(args, [model], data, bf16), data[args.tasks[0].name].examples


def run_ours(job: Job, _: dict[str, Examples], device: torch.device) -> dict[str, float]:
    """One run of `glue_eval/run.py`, which reads the tokenised task."""
    result = finetune(job, device).result
    wanted = ("examples_per_second", *job.task.metrics, "validation_loss")
    return {name: result[name] for name in wanted}


def run_stock(job: Job, examples: dict[str, Examples], device: torch.device) -> dict[str, float]:
    """The same the stock way, which tokenises for itself."""
    set_seed(job.seed)
    accelerator = Accelerator(cpu=device.type == "cpu")
    tokenizer, setting = load_tokenizer(job.model.source), job.setting
    model = AutoModelForSequenceClassification.from_pretrained(
        job.model.source.path,
        num_labels=job.task.num_labels,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
    )
    collate = DataCollatorWithPadding(tokenizer)
    splits = {name: _features(rows, job, tokenizer) for name, rows in examples.items()}
    train = DataLoader(splits["train"], setting.train_batch_size, shuffle=True, collate_fn=collate)
    validation = {
        name: DataLoader(splits[name], STOCK_EVAL_BATCH_SIZE, collate_fn=collate)
        for name in job.task.validation
    }
    optimizer = torch.optim.AdamW(_groups(model, setting.weight_decay), lr=setting.learning_rate)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)
    updates = setting.num_train_epochs * len(train)
    scheduler = accelerator.prepare(get_scheduler("linear", optimizer, setting.warmup_steps, updates))
    seconds = 0.0
    for _ in range(setting.num_train_epochs):
        begun = time.perf_counter()
        model.train()
        for batch in train:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - begun
        scores = {name: _stock_predictions(model, loader, accelerator) for name, loader in validation.items()}
    done = setting.num_train_epochs * len(splits["train"])
    return {"examples_per_second": done / seconds} | task_scores(job.task, scores)


def _features(rows: Examples, job: Job, tokenizer: Any) -> list[dict[str, Any]]:
    """Tokenised examples as the stock collator takes them."""
    encoded = tokenizer(rows.first, rows.second, truncation=True, max_length=job.model.max_length)
    labels = rows.labels.tolist()
    return [{k: v[i] for k, v in encoded.items()} | {"labels": labels[i]} for i in range(len(labels))]


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """By name, as the stock example does it."""
    no_decay = ("bias", "LayerNorm.weight")
    named = list(model.named_parameters())
    spared = [p for name, p in named if any(word in name for word in no_decay)]
    decayed = [p for name, p in named if not any(word in name for word in no_decay)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def _stock_predictions(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> tuple:
    model.eval()
    logits, labels = [], []
    for batch in loader:
        with torch.no_grad():
            outputs = model(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()})
        logits.append(outputs.logits.cpu())
        labels.append(batch["labels"])
    outputs = torch.cat(logits)
    predictions = outputs.squeeze(-1) if outputs.shape[-1] == 1 else outputs.argmax(-1)
    return predictions.numpy(), torch.cat(labels).numpy()


def _words(row: dict[str, float]) -> str:
    speed = f"{row['examples_per_second']:.1f} examples/s of training, {row['seconds']:.0f} s in all"
    rest = [
        f"{name} {number(value)}"
        for name, value in row.items()
        if "seconds" not in name and "per" not in name
    ]
    return f"{speed}; {', '.join(rest)}"


def _print_means(rows: dict[str, list[dict[str, float]]]) -> None:
    names = [name for name in rows["stock"][0] if name not in ("seconds", "examples_per_second")]
    for name in names:
        words = []
        for way, runs in rows.items():
            mean, low, high = mean_interval([run[name] for run in runs])
            words.append(f"{way} {mean:.4f}" + (f" [{low:.4f}, {high:.4f}]" if len(runs) > 1 else ""))
        print(f"{name}: {'; '.join(words)}")
    for name, what in (("examples_per_second", "training"), ("seconds", "everything")):
        stock, ours = (sum(run[name] for run in rows[way]) for way in ("stock", "ours"))
        ratio = ours / stock if name == "examples_per_second" else stock / ours
        print(f"{what}: ours is {ratio:.2f} times as fast")


if __name__ == "__main__":
    sys.exit(main())
