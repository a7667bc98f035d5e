"""Options of the gradient probe: its own, and under them all options of pre-training."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_ln.placements import PLACEMENTS
from recipes.arguments import PretrainingArguments, model_config, nearest
from recipes.command_line import (
    DEFAULT_CONFIG,
    Parser,
    add_options,
    build_arguments,
    option_names,
    read_options,
    read_yaml,
    refuse_unknown,
)
from recipes.errors import UserError
from recipes.gradient_probe import INITS

PROBE_CONFIG = Path(__file__).parent / "configs" / "gradients.yaml"
# What the probe sets itself, and what to give instead; in a YAML file, which may be that of a pre-training
# run, these are passed over.
SET_BY_PROBE = {
    "max_steps": "is warmup_steps + 1; give warmup_steps",
    "norm_placement": "give norm_placements",
    "stages": "one length is measured; give max_seq_length",
    "resume_from_checkpoint": "finished work is always reused; to measure a checkpoint give checkpoints",
}

HELP = {
    "norm_placements": "placements that are compared, or all",
    "inits": "of new models: bert (normal, initializer_range), xavier, theory (the paper's setting), or none",
    "depths": "numbers of layers; num_hidden_layers, at which layers are compared, joins them",
    "seeds": "seeds of weights and batches: seed, seed + 1, ...",
    "num_batches": "mini-batches of per_device_train_batch_size blocks over which a gradient is averaged",
    "checkpoints": "folders of checkpoints or exported models to measure, instead of warm-up runs",
}


@dataclass(kw_only=True)
class ProbeArguments:
    """What is measured, as `HELP` says; the values of the bare command are in `PROBE_CONFIG`."""

    norm_placements: list[str]
    inits: list[str]
    depths: list[int]
    seeds: int
    num_batches: int
    checkpoints: list[str]


LISTS = ("norm_placements", "inits", "depths", "checkpoints")
# Every option by name: the probe's own, then those of pre-training.
OPTIONS = [*HELP, *option_names()]


@dataclass(frozen=True)
class GradientArguments:
    """Everything that was asked for, checked."""

    probe: ProbeArguments
    values: dict[str, Any]
    """Options of pre-training as a flat table."""

    def pretraining(self, **changes: Any) -> PretrainingArguments:
        """The options of one model, with `changes`."""
        return build_arguments(self.values | changes)


def parse_gradient_arguments(argv: list[str] | None = None) -> GradientArguments:
    """Options from the command line over `--config` over `configs/gradients.yaml` over the default run.

    Raises:
        UserError: An option that is unknown, has the wrong type or a value that is not allowed.
    """
    given, unknown = _build_parser().parse_known_args(argv)
    refuse_unknown(unknown, OPTIONS)
    values = vars(given)
    config = values.pop("config", None)
    for name, why in SET_BY_PROBE.items():
        if name in values:
            raise UserError(f"{name}: is set by the probe; {why}")
    layers = [DEFAULT_CONFIG, PROBE_CONFIG, *([Path(config)] if config else [])]
    for layer in reversed(layers):
        values = read_yaml(layer) | values
    return build_gradient_arguments({n: v for n, v in values.items() if n not in SET_BY_PROBE})


def build_gradient_arguments(values: dict[str, Any]) -> GradientArguments:
    """Options from a flat table of names and values, checked.

    Raises:
        UserError: As `parse_gradient_arguments`.
    """
    for name in values:
        if name not in OPTIONS:
            raise UserError(f"{name}: unknown option; {nearest(str(name), OPTIONS)}")
    probe = ProbeArguments(**{name: _read(name, values[name]) for name in values if name in HELP})
    if probe.norm_placements == ["all"]:
        probe.norm_placements = list(PLACEMENTS)
    _check(probe)
    rest = read_options({name: value for name, value in values.items() if name not in HELP})
    if rest["warmup_steps"] < 1 and not probe.checkpoints:
        raise UserError(f"warmup_steps {rest['warmup_steps']}: must be at least 1, or give checkpoints")
    args = GradientArguments(probe, rest | {"max_steps": rest["warmup_steps"] + 1})
    checked = args.pretraining()
    if checked.seed + probe.seeds > 2**32:
        raise UserError(f"seed {checked.seed}: with seeds {probe.seeds} the last is not less than 2**32")
    probe.depths = sorted({*probe.depths, checked.model["num_hidden_layers"]})
    for placement in probe.norm_placements:
        checked.model["norm_placement"] = placement
        model_config(checked)
    return args


def _read(name: str, value: Any) -> Any:
    """A value of `ProbeArguments` from YAML or from the words of the command line."""
    if name not in LISTS:
        return _number(name, value)
    words = [value] if isinstance(value, (str, int)) else value
    if not isinstance(words, list):
        raise UserError(f"{name} {value!r}: must be a list")
    if name != "checkpoints":  # folders may have commas in their names
        words = [part for word in words for part in str(word).split(",")]
    words = list(dict.fromkeys(word for word in words if word not in ("", "none")))
    return [_number(name, word) for word in words] if name == "depths" else words


def _number(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdigit():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{name} {value!r}: must be of type int")
    return value


def _check(probe: ProbeArguments) -> None:
    for name, allowed in (("norm_placements", PLACEMENTS), ("inits", INITS)):
        for value in getattr(probe, name):
            if value not in allowed:
                raise UserError(f"{name} {value!r}: {nearest(value, allowed)}")
    for name in ("norm_placements", "depths"):
        if not getattr(probe, name):
            raise UserError(f"{name} []: give at least one")
    for name, value in (("seeds", probe.seeds), ("num_batches", probe.num_batches)):
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    if min(probe.depths) < 1:
        raise UserError(f"depths {min(probe.depths)}: must be at least 1")
    for folder in probe.checkpoints:
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"checkpoints {folder}: holds no config.json; give the folder of a model")


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="recipes/gradients.py",
        usage="%(prog)s [--config FILE] [--name value ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        description="Measure gradients and norms beside theory. Every option can stand in the YAML file too.",
    )
    parser.add_argument("--config", help="YAML file of options, laid over recipes/configs/gradients.yaml")
    defaults = read_yaml(PROBE_CONFIG)
    for name, help in HELP.items():
        several = {"nargs": "+"} if name in LISTS else {}
        default = " ".join(map(str, defaults[name])) if name in LISTS else defaults[name]
        parser.add_argument(f"--{name}", metavar="VALUE", help=f"{help} [{default or 'none'}]", **several)
    add_options(parser.add_argument_group("options of recipes/pretrain.py"), config=PROBE_CONFIG)
    return parser
