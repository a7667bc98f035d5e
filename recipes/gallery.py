"""Sum up a gallery: every placement and every norm at its best learning rate, without warm-up, and what it costs.

The study is run by recipes/compare.py; this command reads its folder and measures speed and memory, which
wants a machine that does nothing else (three rounds of 21 methods: a quarter of an hour on 2 CPU cores):

    python recipes/compare.py --config recipes/configs/gallery.yaml --parallel_runs 2
    python recipes/gallery.py output/gallery

The same without measuring, with the speed and memory that the last command found:

    python recipes/gallery.py output/gallery --repeats 0

It writes gallery.json (all values), gallery.md (the tables) and gallery.png into STUDY/report, or into
--output_dir. --config is the study's file, from which it knows the runs there should be; those that are
missing are named. Exit codes: 0 done, 2 a mistake in options or folders, 130 interrupted.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm
from transformers import PreTrainedModel

from bert_ln import BertLnConfig
from recipes.arguments import PretrainingArguments, UserError
from recipes.batches import Batch
from recipes.budget import Peak
from recipes.command_line import Parser, refuse_unknown
from recipes.comparison import Group, final_loss
from recipes.figures import DRAWING, GREY, LOSS, WIDTH
from recipes.files import write_json, write_text
from recipes.findings import DASH
from recipes.launch import choose_precision, set_threads
from recipes.optimization import build_optimizer
from recipes.pretraining import build_model
from recipes.stages import Stage, build_stages
from recipes.study import read_study
from recipes.study_results import LEARNING_RATE, PLACEMENT, ArmCurves, StudyCurves, read_study_curves
from recipes.training import Trainer

CONFIG = Path(__file__).parent / "configs" / "gallery.yaml"
# Against which all others are held: placement, norm.
REFERENCE = ("pre", "layer_norm")
# Updates of a measurement; the first fifth of them is not timed.
UPDATES = 100
# What is beyond the unigram cross-entropy by more than this share of the figure is drawn at its edge.
ROOM = 0.15
Summary = dict[str, Any]


def main() -> int:
    """Parse, call, done."""
    try:
        given = parse_command_line()
        folder = given.output_dir or given.study / "report"
        curves = read_study_curves(read_study(given.config, {}, output_dir=given.study))
        summary = summarise(curves)
        summary["costs"] = measure_all(records(curves), given.repeats) if given.repeats else kept_costs(folder)
        for file in write_gallery(summary, folder):
            print(f"wrote {file}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """The study's folder and what to do with it.

    Raises:
        UserError: A word that is no option, or a value that is not allowed.
    """
    parser = Parser(
        prog="recipes/gallery.py",
        usage="%(prog)s STUDY [--name value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="output_dir of the study")
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML file of the study [gallery.yaml]")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of speed and memory; 0: keep those [3]")
    parser.add_argument("--output_dir", type=Path, help="of the report [STUDY/report]")
    given, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, ["config", "repeats", "output_dir"])
    if given.repeats < 0:
        raise UserError(f"repeats {given.repeats}: must be at least 0")
    if not (given.study / "runs").is_dir():
        raise UserError(f"study {given.study}: holds no runs; give the output_dir of a study")
    return given


# -------------------------------------------------------------------- losses


def summarise(curves: StudyCurves) -> Summary:
    """What the runs of a gallery say, as plain values; None for what was no number or is not there."""
    found = _methods(curves)
    reference = _tuned(found.get(REFERENCE, [])).best
    missing = [f"{a.label}, seed {r.seed}: {r.status}" for a in curves.arms for r in a.runs if not r.finished]
    methods = [_method(*key, arms, reference) for key, arms in found.items()]
    methods.sort(key=lambda method: np.inf if method["best"] is None else method["best"]["mean"])
    spreads = [max(d) - min(d) for m in methods if len(d := list(m["difference"].values())) > 1 and any(d)]
    return {
        "runs": len(curves.runs),
        "missing": missing,
        "seeds": curves.seeds,
        "unigram_cross_entropy": _number(curves.unigram_cross_entropy),
        "common": curves.common,
        "median_spread_of_differences": median(spreads) if spreads else None,
        "methods": methods,
    }


def _methods(curves: StudyCurves) -> dict[tuple[str, str], list[ArmCurves]]:
    """The arms of each placement and norm."""
    found: dict[tuple[str, str], list[ArmCurves]] = {}
    for arm in curves.arms:
        found.setdefault((arm.placement, (curves.common | arm.options)["norm_type"]), []).append(arm)
    return found


def _tuned(arms: list[ArmCurves]) -> Group:
    """The arms with warm-up, by rising learning rate; of two equally good rates the lower is the best."""
    warm = [arm for arm in arms if arm.options.get("warmup_steps") != 0]
    return Group("", "", sorted(warm, key=lambda arm: arm.options[LEARNING_RATE]))


def _method(placement: str, norm: str, arms: list[ArmCurves], reference: ArmCurves | None) -> Summary:
    tuned = _tuned(arms)
    cold = [_outcome(arm) for arm in arms if arm.options.get("warmup_steps") == 0]
    best = _outcome(tuned.best) if tuned.best else None
    rates = [_outcome(arm) for arm in tuned.arms]
    highest = max(cold, key=lambda outcome: outcome[LEARNING_RATE], default=None)
    same_rate = [rate for rate in rates if highest and rate[LEARNING_RATE] == highest[LEARNING_RATE]]
    return {
        PLACEMENT: placement,
        "norm_type": norm,
        "best": best,
        "note": tuned.note,
        "difference": _differences(best, _outcome(reference) if reference else None),
        "rates": rates,
        "without_warmup": highest,
        "loss_of_no_warmup": _differences(highest, next(iter(same_rate), None)),
    }


def _outcome(arm: ArmCurves) -> Summary:
    """How the finished runs of an arm ended, by seed."""
    return {
        LEARNING_RATE: arm.options[LEARNING_RATE],
        "mean": _number(final_loss(arm).mean),
        "losses": {run.seed: _number(run.final_loss) for run in arm.finished},
        "diagnoses": {run.seed: run.diagnosis for run in arm.finished},
    }


def _differences(one: Summary | None, other: Summary | None) -> dict[int, float]:
    """Losses of one less those of the other, of the seeds that both have: same data in the same order."""
    mine, theirs = (outcome["losses"] if outcome else {} for outcome in (one, other))
    both = [seed for seed in mine if mine[seed] is not None and theirs.get(seed) is not None]
    return {seed: mine[seed] - theirs[seed] for seed in both}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# -------------------------------------------------------------------- speed and memory


def records(curves: StudyCurves) -> dict[tuple[str, str], Summary]:
    """A run.json of each method of which a run has begun."""
    begun = {key: [run for arm in arms for run in arm.begun] for key, arms in _methods(curves).items()}
    return {key: runs[0].record for key, runs in begun.items() if runs}


def measure_all(methods: dict[tuple[str, str], Summary], repeats: int) -> list[Summary]:
    """Speed and memory of each method, method after method, `repeats` rounds; ratios are within a round.

    Raises:
        UserError: There is no run of the reference.
    """
    if REFERENCE not in methods:
        raise UserError(f"study: no run of {', '.join(REFERENCE)} has begun, which all are measured against")
    rounds = []
    with tqdm(total=repeats * len(methods), unit="measurement", file=sys.stderr) as bar:
        for _ in range(repeats):
            rounds.append({})
            for method, record in methods.items():
                # A process each: no method profits or suffers from what another left in memory.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
                    rounds[-1][method] = child.submit(measure, record).result()
                bar.update()
    return [_cost(method, rounds) for method in methods]


def _cost(method: tuple[str, str], rounds: list[dict[tuple[str, str], Summary]]) -> Summary:
    speeds = [found[method]["tokens_per_second"] for found in rounds]
    references = [found[REFERENCE]["tokens_per_second"] for found in rounds]
    first, reference = rounds[0][method], rounds[0][REFERENCE]
    return {
        **first,
        PLACEMENT: method[0],
        "norm_type": method[1],
        "tokens_per_second": speeds,
        "speed_ratios": [mine / other for mine, other in zip(speeds, references, strict=True)],
        "memory_ratio": first["kept_bytes"] / reference["kept_bytes"],
    }


@dataclass
class RepeatedBatch:
    """Stands in for `TrainingBatches`: the same micro-batch again and again."""

    batch: Batch
    accumulation: int

    def updates(self, first_step: int, last_step: int, num_workers: int) -> Iterator[list[Batch]]:
        """As `TrainingBatches.updates`."""
        for _ in range(first_step, last_step):
            yield [self.batch] * self.accumulation


def measure(record: Summary, updates: int = UPDATES) -> Summary:
    """Train the model of a run.json for some updates, in the recipe's own loop, on random ids.

    The model, its precision, the optimiser and the shape of the batches are the run's (those of its first
    stage); the learning rate is 0, since random ids teach nothing and speed does not depend on it.

    Returns:
        Tokens a second, parameters, bytes that a forward pass keeps for its backward pass, threads.
    """
    threads = set_threads()
    args = PretrainingArguments(**record["options"])
    stage = build_stages(args)[0]
    args = replace(
        args, max_steps=updates, logging_steps=max(1, updates // 5), eval_steps=updates, save_steps=updates,
        stages=None, learning_rate=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(args, BertLnConfig(**record["model_config"]))
    accelerator = Accelerator(mixed_precision="no")
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    batch = _random_batch(stage, args.mlm_probability, model.config.vocab_size)
    bf16, precision = choose_precision(args.bf16, accelerator.device)
    kept, lines = kept_bytes(model, batch, bf16), []
    Trainer(
        args=args, accelerator=accelerator, wrapped_model=wrapped, model=model, optimizer=optimizer,
        batches=RepeatedBatch(batch, stage.gradient_accumulation_steps), stages=[stage],
        peak=Peak(1.0, "not asked for"), bf16=bf16, report=lines.append,
        evaluate=lambda state: None, save=lambda state: None,
    ).train()  # fmt: skip
    tokens, seconds = (lines[-1][name] - lines[0][name] for name in ("tokens_seen", "elapsed_seconds"))
    return {
        "tokens_per_second": tokens / seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "kept_bytes": kept,
        "precision": precision,
        "threads": threads,
    }


def _random_batch(stage: Stage, mlm_probability: float, vocab_size: int) -> Batch:
    """Random ids with as many positions to predict as the masker selects at most."""
    rows, length = stage.per_device_train_batch_size, stage.max_seq_length
    ids = torch.randint(vocab_size, (rows, length))
    positions = torch.rand(rows, length).argsort()[:, : round(mlm_probability * (length - 2))].sort()[0]
    return {"input_ids": ids, "masked_positions": positions, "labels": ids.gather(1, positions)}


def kept_bytes(model: PreTrainedModel, batch: Batch, bf16: bool) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, without the parameters."""
    device = model.device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor  # and so keeps it alive: no address is used twice

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        loss = model(**batch).loss  # noqa: F841  holds the graph until here
    return sum(size for address, size in sizes.items() if address not in parameters)


def kept_costs(folder: Path) -> list[Summary]:
    """The costs that the gallery.json of an earlier report holds; none where there is no such file."""
    file = folder / "gallery.json"
    return json.loads(file.read_text(encoding="utf-8"))["costs"] if file.exists() else []


# -------------------------------------------------------------------- report
