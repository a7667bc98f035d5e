"""Two processes beside one, on the cores of this machine: as measured, and as the cost model predicts."""

from dataclasses import replace
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bert_ln import BertLnConfig
from recipes.arguments import PretrainingArguments, model_config
from recipes.benchmark_arms import Arm, measure
from recipes.command_line import build_arguments
from recipes.cost_model import Model, Plan, find_hardware, update_of

PROCESSES = (1, 2)


def scaling(options: dict[str, dict[str, Any]], seconds: float, repeats: int) -> dict[str, Any]:
    """Train each of `options` with one process and with two, which share the blocks and the cores, by turns.

    Returns:
        For each: measured, for each number of processes the results of `measure` by round; and predicted,
        the tokens a second of two by those of one, round by round.
    """
    return {name: _scaling(each, seconds, repeats) for name, each in options.items()}


def _scaling(options: dict[str, Any], seconds: float, repeats: int) -> dict[str, Any]:
    found: dict[int, list[dict[str, float]]] = {number: [] for number in PROCESSES}
    blocks = options["per_device_train_batch_size"]
    for _ in range(repeats):
        for number, rounds in found.items():
            rounds.append(
                _launch(number, options | {"per_device_train_batch_size": blocks // number}, seconds)
            )
    args = build_arguments(options)
    return {"measured": found, "predicted": [predicted_ratio(args, one) for one in found[1]]}


def _launch(processes: int, options: dict[str, Any], seconds: float) -> dict[str, float]:
    """`measure` in so many processes; the result of the first."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
        max_restarts=0,
    )
    return elastic_launch(config, measure)(Arm("ours"), options, seconds)[0]


def predicted_ratio(args: PretrainingArguments, one: dict[str, float]) -> float:
    """Tokens a second of two processes by those of one, from what one was measured to do."""
    config: BertLnConfig = model_config(args, vocab_size=args.vocab_size, pad_token_id=0)
    model = Model.of(config, args.mlm_probability)
    seconds = []
    for number in PROCESSES:
        plan = Plan(number, args.max_seq_length, args.per_device_train_batch_size // number, 1)
        hardware = replace(find_hardware("cpu", number), flops=one["ceiling"] / number)
        seconds.append(update_of(model, plan, hardware, one["mfu"]).seconds)
    return seconds[0] / seconds[1]
