"""Estimate what a pre-training run would cost: tokens per second, time, memory and traffic on N devices.

BERT-base of the paper on a node of 8 H100:

    python recipes/estimate.py

Any configuration of recipes/pretrain.py, on other hardware, with the MFU that one device was seen to reach
(training lines say it), and with a price; several numbers of devices make a table:

    python recipes/estimate.py --config FILE --hardware a100 --devices 8 --mfu 0.5 --price_per_hour 2
    python recipes/estimate.py --devices 1,8,64,1024 --global_batch_size 4096

The batch is that of the configuration however many devices share it: the run stays the same run. Hardware:
a100, a10g, h100, h200, l4, and cpu (this machine, of which the devices are processes). The formulas, their
sources and how far off they are: docs/scaling.md. `--help` lists the options; those of recipes/pretrain.py
are taken too. Only the configuration is read, nothing is written. Exit codes: 0 done, 2 a mistake in options.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bert_ln import BertLnConfig
from recipes.arguments import Check, PretrainingArguments, at_least, check_value, model_config
from recipes.budget import ASSUMED_MFU
from recipes.command_line import (
    DEFAULT_CONFIG,
    Parser,
    add_option,
    add_options,
    build_arguments,
    convert,
    option_names,
    options_of,
    read_yaml,
    refuse_unknown,
)
from recipes.console import clock
from recipes.cost_model import (
    CHECKPOINT_BYTES,
    LINK_SHARE,
    TOKEN_BYTES,
    Hardware,
    Memory,
    Model,
    Plan,
    Update,
    divide,
    find_hardware,
    largest_micro_batch,
    memory_of,
    update_of,
)
from recipes.errors import UserError
from recipes.stages import Stage, build_stages

CONFIG = Path(__file__).parent / "configs" / "bert_base_wikipedia.yaml"


@dataclass(kw_only=True)
class EstimateArguments:
    """What is to be estimated for a run."""

    hardware: str = "h100"
    """Device: a100, a10g, h100, h200, l4, or cpu for this machine."""
    devices: str | int | None = None
    """Number of devices, or several with commas; None: num_processes of the configuration, else 1."""
    mfu: float = ASSUMED_MFU
    """Share of its peak that one device reaches; measured: mfu of the training lines."""
    price_per_hour: float | None = None
    """Price of a device for an hour, in any currency."""
    global_batch_size: int | None = None
    """Blocks of an update, instead of the configuration's; the tokens stay, so updates become fewer."""
    use_fsdp: bool = False
    """FSDP2 instead of DDP."""
    network_bandwidth: float | None = None
    """GB/s that leave a node, as a data sheet says (100 Gb/s is 12.5); None: as the hardware usually has."""
    disk_bandwidth: float = 1.0
    """GB/s at which a checkpoint is written, synced and summed."""


CHECKS: dict[str, Check] = {
    "mfu": (lambda value: 0 < value <= 1, "must be more than 0 and at most 1"),
    "price_per_hour": at_least(0),
    "global_batch_size": at_least(1),
    "network_bandwidth": (lambda value: 0 < value < math.inf, "must be more than 0"),
    "disk_bandwidth": (lambda value: 0 < value < math.inf, "must be more than 0"),
}


@dataclass(frozen=True)
class Estimate:
    """A run on so many devices; a list has an entry for each stage."""

    model: Model
    hardware: Hardware
    plans: list[Plan]
    steps: list[int]
    updates: list[Update]
    memories: list[Memory]
    save_seconds: float
    saves: int

    @property
    def devices(self) -> int:
        """How many compute."""
        return self.plans[0].devices

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return sum(steps * plan.tokens for steps, plan in zip(self.steps, self.plans, strict=True))

    @property
    def training_seconds(self) -> float:
        """Time of all updates."""
        return sum(steps * update.seconds for steps, update in zip(self.steps, self.updates, strict=True))

    @property
    def seconds(self) -> float:
        """Time of updates and saves."""
        return self.training_seconds + self.saves * self.save_seconds

    @property
    def device_hours(self) -> float:
        """What is paid for."""
        return self.seconds / 3600 * self.devices


def main() -> int:
    """Parse, call, done."""
    try:
        own, args = parse()
        estimates = [estimate(own, args, devices) for devices in numbers_of_devices(own, args)]
        print("\n".join(screen(own, estimates[0]) if len(estimates) == 1 else table(own, estimates)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None = None) -> tuple[EstimateArguments, PretrainingArguments]:
    """Options of the estimate, and those of the run that it is for, checked.

    Raises:
        UserError: As `recipes.command_line.parse_arguments`.
    """
    options = options_of(EstimateArguments)
    given, unknown = _build_parser().parse_known_args(argv)
    refuse_unknown(unknown, [*options, *option_names()])
    values = vars(given)
    layers = read_yaml(DEFAULT_CONFIG) | read_yaml(Path(values.pop("config")))
    own = EstimateArguments(**convert({n: values.pop(n) for n in options if n in values}, options))
    for name, check in CHECKS.items():
        check_value(name, getattr(own, name), check)
    return own, build_arguments(layers | values)


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="recipes/estimate.py",
        usage="%(prog)s [--config FILE] [--hardware NAME] [--devices N,...] [--name value ...]",
        allow_abbrev=False,
        description="Estimate the cost of a pre-training run on machines that are not there.",
    )
    parser.add_argument("--config", default=CONFIG, help=f"YAML file of the run [{CONFIG.name}]")
    for name, option in options_of(EstimateArguments).items():
        add_option(parser, name, option, option.default)
    add_options(parser.add_argument_group("options of recipes/pretrain.py"), config=CONFIG)
    return parser


def numbers_of_devices(own: EstimateArguments, args: PretrainingArguments) -> list[int]:
    """The numbers that `--devices` lists.

    Raises:
        UserError: Something in it is not a number of devices.
    """
    words = str(own.devices or args.num_processes or 1).split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"devices {own.devices}: must be integers of at least 1, such as 8 or 1,8,64")
    return [int(word) for word in words]


def estimate(own: EstimateArguments, args: PretrainingArguments, devices: int) -> Estimate:
    """The run of `args` on so many devices.

    Raises:
        UserError: Unknown hardware, or a batch that the devices cannot share.
    """
    hardware = find_hardware(own.hardware, devices)
    if own.network_bandwidth:
        hardware = replace(hardware, network=LINK_SHARE * 1e9 * own.network_bandwidth)
    config = model_config(args, vocab_size=args.vocab_size or BertLnConfig.vocab_size, pad_token_id=0)
    model = Model.of(config, args.mlm_probability)
    stages = build_stages(args)
    plans = [_plan(own, args, stage, devices) for stage in stages]
    steps = [_steps(own, args, stage) for stage in stages]
    return Estimate(
        model=model,
        hardware=hardware,
        plans=plans,
        steps=steps,
        updates=[update_of(model, plan, hardware, own.mfu) for plan in plans],
        memories=[memory_of(model, plan, hardware) for plan in plans],
        save_seconds=CHECKPOINT_BYTES * model.parameters / (1e9 * own.disk_bandwidth),
        saves=math.ceil(sum(steps) / args.save_steps),
    )


def _plan(own: EstimateArguments, args: PretrainingArguments, stage: Stage, devices: int) -> Plan:
    blocks = own.global_batch_size or stage.global_batch_size(args.num_processes or 1)
    micro_batch, micro_batches = divide(blocks, devices, stage.per_device_train_batch_size)
    length, recomputes = stage.max_seq_length, args.gradient_checkpointing
    return Plan(devices, length, micro_batch, micro_batches, own.use_fsdp and devices > 1, recomputes)


def _steps(own: EstimateArguments, args: PretrainingArguments, stage: Stage) -> int:
    """Updates of a stage: as many tokens as the configuration says."""
    blocks = stage.global_batch_size(args.num_processes or 1)
    return math.ceil(stage.steps * blocks / (own.global_batch_size or blocks))


def screen(own: EstimateArguments, e: Estimate) -> list[str]:
    """One estimate at length."""
    stages = zip(e.plans, e.steps, e.updates, e.memories, strict=True)
    nodes, rate = e.hardware.nodes(e.devices), e.tokens / e.training_seconds
    saves = f"{e.saves:,} of them take {e.saves * e.save_seconds / e.seconds:.1%} of the time"
    return [
        *_head(own, e),
        f"devices     {e.devices:,} on {nodes} node{'s' if nodes > 1 else ''}, "
        f"{'FSDP2' if e.plans[0].is_sharded else 'DDP' if e.devices > 1 else 'alone'}",
        *(line for stage in stages for line in _stage(own, e, *stage)),
        f"checkpoint  {CHECKPOINT_BYTES * e.model.parameters / 1e9:.2f} GB, {e.save_seconds:.1f} s each at "
        f"{own.disk_bandwidth:g} GB/s; {saves}",
        f"data        {TOKEN_BYTES * rate / nodes / 1e6:.2f} MB/s read by a node, "
        f"{TOKEN_BYTES * e.tokens / 1e9:.1f} GB in all",
        f"total       {e.tokens / 1e9:.3g} G tokens at {rate:,.0f} tokens/s: {clock(e.seconds)}, "
        f"{e.device_hours:,.1f} device-hours{_price(own, e)}",
        "not counted start-up, validation, building the token store, failures",
    ]


def _head(own: EstimateArguments, e: Estimate) -> list[str]:
    c, hardware = e.model.config, e.hardware
    why = "assumed; measure it and give --mfu" if own.mfu == ASSUMED_MFU else "as you set"
    between = "" if math.isinf(hardware.network) else f" and {hardware.network / 1e9:g} GB/s a node"
    return [
        f"model       {e.model.parameters / 1e6:.1f} M parameters: {c.num_hidden_layers} layers x "
        f"{c.hidden_size}, vocabulary {c.vocab_size}",
        f"hardware    {hardware.name}: {hardware.flops / 1e12:.3g} TFLOP/s, {hardware.memory / 1e9:.3g} GB; "
        f"collectives at {hardware.link / 1e9:.3g} GB/s a device{between}",
        f"MFU         {own.mfu:.1%} on one device ({why})",
    ]


def _stage(
    own: EstimateArguments, e: Estimate, plan: Plan, steps: int, update: Update, memory: Memory
) -> list[str]:
    return [
        f"updates     {steps:,} of {plan.blocks:,} blocks of {plan.length}; a device computes "
        f"{plan.micro_batches} x {plan.micro_batch}",
        f"  speed     {plan.tokens / update.seconds:,.0f} tokens/s, {efficiency(own, e, plan, update):.0%} "
        f"of {e.devices:,} that need not share",
        f"  an update {_ms(update.seconds)} = compute {_ms(update.compute)} + optimiser "
        f"{_ms(update.optimizer)} + waiting {_ms(update.exposed)} (traffic {_ms(update.traffic)})",
        f"  memory    {memory.total / 1e9:.1f} GB a device: states {memory.states / 1e9:.1f}, activations "
        f"{memory.activations / 1e9:.1f}; {_fits(e, plan, memory)}",
    ]


def _fits(e: Estimate, plan: Plan, memory: Memory) -> str:
    if memory.fits:
        return f"fits in {memory.available / 1e9:.1f}"
    most = largest_micro_batch(e.model, plan, e.hardware)
    way = f"give per_device_train_batch_size {most}" if most else "give --use_fsdp, or a smaller model"
    return f"DOES NOT FIT in {memory.available / 1e9:.1f}; {way}"


def efficiency(own: EstimateArguments, e: Estimate, plan: Plan, update: Update) -> float:
    """Tokens per second beside those of as many devices that each do the whole update alone."""
    alone = plan.tokens * e.model.flops_per_token(plan.length) / (own.mfu * e.hardware.flops)
    return alone / e.devices / update.seconds


def table(own: EstimateArguments, estimates: list[Estimate]) -> list[str]:
    """Several estimates, a row each; where there are stages, speed and time are those of the whole run."""
    rows = [["devices", "blocks each", "tokens/s", "efficiency", "waiting", "memory", "time", "device-hours"]]
    rows[0] += ["cost"] if own.price_per_hour is not None else []
    rows += [_row(own, e) for e in estimates]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        *_head(own, estimates[0]),
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
    ]


def _row(own: EstimateArguments, e: Estimate) -> list[str]:
    alone = sum(
        steps * update.seconds * efficiency(own, e, plan, update)
        for steps, plan, update in zip(e.steps, e.plans, e.updates, strict=True)
    )
    waiting = sum(steps * update.exposed for steps, update in zip(e.steps, e.updates, strict=True))
    memory = max(e.memories, key=lambda memory: memory.total)
    row = [
        f"{e.devices:,}",
        ", ".join(dict.fromkeys(f"{plan.micro_batches} x {plan.micro_batch}" for plan in e.plans)),
        f"{e.tokens / e.training_seconds:,.0f}",
        f"{alone / e.training_seconds:.0%}",
        f"{waiting / e.training_seconds:.0%}",
        f"{memory.total / 1e9:.1f} GB{'' if memory.fits else ' (does not fit)'}",
        clock(e.seconds),
        f"{e.device_hours:,.1f}",
    ]
    return row if own.price_per_hour is None else [*row, f"{e.device_hours * own.price_per_hour:,.0f}"]


def _price(own: EstimateArguments, e: Estimate) -> str:
    if own.price_per_hour is None:
        return " (cost: give --price_per_hour)"
    return f", {e.device_hours * own.price_per_hour:,.2f} at {own.price_per_hour:g} a device-hour"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


if __name__ == "__main__":
    sys.exit(main())
