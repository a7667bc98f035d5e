"""Training speed beside the stock recipe, in one run: tokens a second, share of the ceiling, peak memory.

    python recipes/benchmark.py

Leave the machine otherwise idle: some two hours on 2 CPU cores. Every measurement is a process of its own,
and the ways of training alternate, --repeats times. Parts (--parts, with commas) are

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
               recipes/estimate.py predicts; on a CPU only
    start      time of the default run from its command to its first update: from nothing, with the token
               store there, and resumed after few updates and after more

Blocks are full: all tokens that are counted are real. The ceiling is a bfloat16 matrix product, measured in
the same process just before and just after. After each part it writes benchmark.json, benchmark.md and
figures into --output_dir. A GPU wants more at once: --sizes BERT-base --per_device_train_batch_size 256
--max_seq_length 512. Exit codes: 0 done, 2 a mistake in options.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
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
    Arm("types looked up for each token", without="shared_embeddings"),
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
# Options of recipes/pretrain.py that change the batch that is measured.
SHAPE = ("max_seq_length", "per_device_train_batch_size")
PARTS = ("ratios", "ablation", "growth", "data", "loss", "scaling", "start")


def main() -> int:
    """Parse, call, done."""
    try:
        given = parse_command_line()
        given.output_dir.mkdir(parents=True, exist_ok=True)
        for results in run(given):
            files = write_benchmark(results, given.output_dir)
        for file in files:
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
    device = Accelerator(mixed_precision="no").device
    possible = [part for part in PARTS if part != "scaling" or device.type == "cpu"]
    parser.add_argument("--parts", default=",".join(possible), help="what to measure")
    parser.add_argument("--sizes", default=",".join(SIZES), help="models of the ratios")
    for name in SHAPE:
        parser.add_argument(f"--{name}", type=int, help="in the ratios and the ablation, instead of theirs")
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
    build_arguments(COMMON | _shape(given))
    if "scaling" in given.parts.split(",") and device.type != "cpu":
        raise UserError(
            f"parts scaling: shares the cores of a CPU, and this machine has a {device.type} device"
        )
    return given


def run(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the parts one after the other; the rounds of a part alternate between its arms.

    Yields:
        All results so far, after each part.
    """
    repeats, seconds, shape = given.repeats, given.seconds, _shape(given)
    threads, hardware = set_threads(), describe_hardware(Accelerator(mixed_precision="no").device, 1)
    args = build_arguments(COMMON)
    prepare_stores(args, 0)  # not part of any measurement
    parts: dict[str, Callable[[], Any]] = {
        "ratios": lambda: _alternate(_ratios(given.sizes.split(","), shape), repeats, seconds),
        "ablation": lambda: _alternate(_ablation(shape), repeats, seconds),
        "growth": lambda: _alternate(_growth(), 1, seconds),
        "data": lambda: measure_data(args),
        "loss": lambda: time_to_loss(ALIKE, WAYS, given.minutes),
        "scaling": lambda: scaling({n: COMMON | size for n, size in SIZES.items()}, seconds, repeats),
        "start": lambda: start_times([]),
    }
    results: dict[str, Any] = {
        "circumstances": f"{hardware}, {threads}, {repeats} rounds of at least {seconds:g} s",
        "command": shlex.join(["python", *sys.argv]),
    }
    for part, measure_part in parts.items():
        if part in given.parts.split(","):
            results[part] = measure_part()
            yield results


def _shape(given: argparse.Namespace) -> dict[str, int]:
    """The options of a batch's shape that were given."""
    return {name: value for name in SHAPE if (value := getattr(given, name)) is not None}


# Ways of training, each with the options that it shares with others.
Plan = list[tuple[Arm, dict[str, Any]]]


def _ratios(sizes: list[str], shape: dict[str, int]) -> Plan:
    return [
        (Arm(f"{size}|{dropout['hidden_dropout_prob']}|{kind}", kind, dropout), COMMON | SIZES[size] | shape)
        for size in sizes
        for dropout in (DROPOUT, NO_DROPOUT)
        for kind in KINDS
    ]


def _ablation(shape: dict[str, int]) -> Plan:
    return [(arm, COMMON | SMALL | shape) for arm in ABLATION]


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
