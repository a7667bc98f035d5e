"""Training speed beside the stock recipe, in one run: tokens a second, share of the ceiling, peak memory.

    python recipes/benchmark.py

Leave the machine otherwise idle: 90 minutes on 2 CPU cores. Every measurement is a process of its own, and
the ways of training alternate, --repeats times. Parts (--parts, with commas) are

    ratios     the stock recipe as it comes (float32), the same with every switch that it has (bfloat16,
               fused AdamW, torch.compile; attention by SDPA or plain: the faster of the two counts), and
               ours with and without torch_compile, Post-LN like the stock model; with dropout 0.1 on all
               sides and with 0; two sizes of model
    ablation   ours with each of its measures switched off, or with one more switched on
    growth     ours against depth, width, length, vocabulary and batch, with fitted exponents; one round
    data       rate of building a token store beside the bare tokenizers library; time to the first batch
               after a resume against the updates done; rate of a validation
    loss       validation loss of the stock recipe, as it comes, over --minutes of training, and of ours over
               a quarter of them; same corpus, same frozen masks, learning rates constant after warm-up
    scaling    ours with one process and with two, which share blocks and cores, beside what the cost model of
               recipes/estimate.py predicts
    start      time of the default run from its command to its first update: from nothing, with the token
               store there, and resumed after few updates and after more

Blocks are full: all tokens that are counted are real. The ceiling is a bfloat16 matrix product, measured in
the same process just before and just after. It writes benchmark.json, benchmark.md and figures into
--output_dir. Exit codes: 0 done, 2 a mistake in options.
"""

import argparse
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from recipes.benchmark_arms import Arm, measure
from recipes.benchmark_data import measure_data
from recipes.benchmark_loss import time_to_loss
from recipes.benchmark_report import write_benchmark
from recipes.benchmark_scaling import scaling
from recipes.benchmark_start import start_times
from recipes.command_line import DEFAULT_CONFIG, Parser, build_arguments, read_yaml, refuse_unknown
from recipes.errors import UserError
from recipes.launch import describe_hardware, set_threads
from recipes.preparation import prepare_stores

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DROPOUT = dict.fromkeys(NO_DROPOUT, 0.1)
# On the embedded corpus, masked as the paper does.
COMMON = read_yaml(DEFAULT_CONFIG) | NO_DROPOUT
COMMON |= {
    "norm_placement": "post",
    "vocab_size": 30522,
    "mlm_probability": 0.15,
    "max_steps": 1_000_000,
    "initializer_range": 0.02,
}


def sizes_of(width: int, layers: int, batch: int) -> dict[str, int]:
    """Options of a BERT with heads of 64 features."""
    model = {"hidden_size": width, "num_hidden_layers": layers, "per_device_train_batch_size": batch}
    return model | {"num_attention_heads": width // 64, "intermediate_size": 4 * width}


SMALL, BASE = sizes_of(256, 6, 32), sizes_of(768, 12, 8)
SIZES = {"6x256": SMALL, "BERT-base": BASE}
KINDS = ("stock", "stock bf16 compiled", "stock bf16 eager compiled", "ours", "ours compiled")
ABLATION = [
    Arm("ours"),
    Arm("head at all positions", without="sparse_head"),
    Arm("last layer at all positions", without="narrow_layer"),
    Arm("embeddings looked up for each row", without="shared_embeddings"),
    Arm("freed memory given back", without="keep_memory"),
    Arm("attention by sdpa", options={"attn_implementation": "sdpa"}),
    Arm("float32", options={"bf16": False, "attn_implementation": "eager"}),
    Arm("AdamW not fused", options={"optim": "adamw_torch"}),
    Arm("with dropout 0.1", options=DROPOUT),
    Arm("with dropout 0.1 of PyTorch", without="cheap_dropout", options=DROPOUT),
    Arm("with torch_compile", options={"torch_compile": True}),
    Arm("with dropout 0.1 and torch_compile", options=DROPOUT | {"torch_compile": True}),
    Arm("with Muon", options={"optim": "muon"}),
    Arm("with a worker for batches", options={"dataloader_num_workers": 1}),
]
GROWTH: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "depth": [(n, {"num_hidden_layers": n}) for n in (3, 6, 12)],
    "width": [(n, sizes_of(n, 6, 32)) for n in (128, 256, 512)],
    "length at equal tokens": [
        (n, {"max_seq_length": n, "per_device_train_batch_size": 4096 // n}) for n in (64, 128, 256, 512)
    ],
    "vocabulary": [(n, {"vocab_size": n}) for n in (8192, 16384, 30522)],
    "batch": [(n, {"per_device_train_batch_size": n}) for n in (8, 16, 32, 64)],
    "batch of BERT-base": [(n, sizes_of(768, 12, n)) for n in (8, 16, 32)],
}
# Beside the loss of the stock recipe: ours with the same options, and with those that learn faster.
ALIKE = COMMON | SMALL | DROPOUT | {"learning_rate": 5e-4, "warmup_steps": 100}
WAYS: dict[str, dict[str, Any]] = {
    "the same options": {},
    "without dropout": NO_DROPOUT,
    "without dropout, Pre-LN, Muon": NO_DROPOUT
    | {
        "norm_placement": "pre",
        "optim": "muon",
        "learning_rate": 3e-3,
        "warmup_steps": 0,
        "initializer_range": 0.04,
    },
}
PARTS = ("ratios", "ablation", "growth", "data", "loss", "scaling", "start")


def main() -> int:
    """Parse, call, done."""
    try:
        given = parse_command_line()
        given.output_dir.mkdir(parents=True, exist_ok=True)
        results = run(given)
        for file in write_benchmark(results, given.output_dir):
            print(f"wrote {file}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """Options, checked before anything is measured.

    Raises:
        UserError: An option that is unknown or has a value that is not allowed.
    """
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds, in which all ways alternate")
    parser.add_argument("--seconds", type=float, default=5.0, help="shortest time of one measurement")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="training time of the stock recipe in loss"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    parser.add_argument("--sizes", default=",".join(SIZES), help="models of the ratios")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output/benchmark"), help="folder of the report"
    )
    given, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, vars(given))
    for name, allowed in (("parts", PARTS), ("sizes", tuple(SIZES))):
        for word in getattr(given, name).split(","):
            if word not in allowed:
                raise UserError(f"{name} {word}: allowed: {', '.join(allowed)}, with commas between them")
    for name, least in (("repeats", 1), ("seconds", 0), ("minutes", 0)):
        if not getattr(given, name) >= least:
            raise UserError(f"{name} {getattr(given, name)}: must be at least {least}")
    return given


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts one after the other; the rounds of a part alternate between its arms."""
    parts, repeats, seconds = given.parts.split(","), given.repeats, given.seconds
    threads = set_threads()
    args = build_arguments(COMMON)
    prepare_stores(args, 0)  # not part of any measurement
    plans = {"ratios": _ratios(given.sizes.split(",")), "ablation": _ablation(), "growth": _growth()}
    measured = {
        part: _alternate(plan, 1 if part == "growth" else repeats, seconds)
        for part, plan in plans.items()
        if part in parts
    }
    if "data" in parts:
        measured["data"] = measure_data(args)
    if "loss" in parts:
        measured["loss"] = time_to_loss(ALIKE, WAYS, given.minutes)
    if "scaling" in parts:
        measured["scaling"] = scaling({n: COMMON | size for n, size in SIZES.items()}, seconds, repeats)
    if "start" in parts:
        measured["start"] = start_times([])
    hardware = describe_hardware(Accelerator(mixed_precision="no").device, 1)
    circumstances = f"{hardware}, {threads}, {repeats} rounds of at least {seconds:g} s"
    return {"circumstances": circumstances, "command": shlex.join(["python", *sys.argv]), **measured}


# Ways of training, each with the options that it shares with others.
Plan = list[tuple[Arm, dict[str, Any]]]


def _ratios(sizes: list[str]) -> Plan:
    return [
        (Arm(f"{size}|{dropout['hidden_dropout_prob']}|{kind}", kind, dropout), COMMON | SIZES[size])
        for size in sizes
        for dropout in (DROPOUT, NO_DROPOUT)
        for kind in KINDS
    ]


def _ablation() -> Plan:
    return [(arm, COMMON | SMALL) for arm in ABLATION]


def _growth() -> Plan:
    return [
        (Arm(f"{what}|{number}", options=options), COMMON | SMALL)
        for what, points in GROWTH.items()
        for number, options in points
    ]


def _alternate(plan: Plan, repeats: int, seconds: float) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {arm.name: [] for arm, _ in plan}
    with tqdm(total=repeats * len(plan), unit="measurement", file=sys.stderr) as bar:
        for _ in range(repeats):
            for arm, options in plan:
                bar.set_postfix_str(arm.name)
                # A process each: none profits or suffers from what another left in memory.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
                    found[arm.name].append(child.submit(measure, arm, options, seconds).result())
                bar.update()
    return found


if __name__ == "__main__":
    sys.exit(main())
