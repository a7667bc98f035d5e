"""A study: several arms, several seeds, everything else equal. Read from YAML and checked before any run."""

import hashlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from recipes.arguments import DataArguments, MaskingArguments, PretrainingArguments, nearest
from recipes.command_line import DEFAULT_CONFIG, build_arguments, read_options, read_yaml
from recipes.errors import UserError
from recipes.stages import build_stages, remaining_tokens

KEYS = ("base", "arms", "seeds")
# What all arms must share, or their validation losses would not compare; and what the study sets itself.
SHARED = {
    *DataArguments.__dataclass_fields__,
    *MaskingArguments.__dataclass_fields__,
    "max_eval_samples",
    "cache_dir",
}
SET_BY_STUDY = {"output_dir", "seed", "resume_from_checkpoint"}


@dataclass(frozen=True)
class Arm:
    """One setting that is compared with others."""

    name: str
    """As the name of a folder: option=value,option=value."""
    label: str
    """For people: `post, learning_rate 0.001, warmup_steps 0`."""
    options: dict[str, Any]
    """What makes it differ from the study's base."""


@dataclass(frozen=True)
class Study:
    """Arms and seeds over one base of options."""

    name: str
    output_dir: Path
    base: dict[str, Any]
    """Options of pre-training, by name, those of the default run included."""
    arms: list[Arm]
    seeds: list[int]

    def folder(self, arm: Arm, seed: int) -> Path:
        """Where the run of an arm and a seed lives."""
        return self.output_dir / "runs" / arm.name / f"seed-{seed}"

    def options(self, arm: Arm, seed: int) -> dict[str, Any]:
        """All options of a run, as `build_arguments` takes them."""
        return self.base | arm.options | {"seed": seed, "output_dir": str(self.folder(arm, seed))}

    def arguments(self, arm: Arm, seed: int) -> PretrainingArguments:
        """The same, checked."""
        return build_arguments(self.options(arm, seed))


def read_study(
    config: Path, overrides: dict[str, Any], seeds: list[int] | None = None, output_dir: Path | None = None
) -> Study:
    """Read a study's YAML.

    `base` is a table of options, laid over those of the default run, and over those of a YAML file that it
    names as `config` (relative to the study's own). `arms` is a list of tables: each combination of the
    values in a table's lists is one arm. An option whose value is itself a list is given as a list in a list.

    Args:
        config: The YAML file.
        overrides: Options that replace those of the base.
        seeds: Replace the file's.
        output_dir: Of the study; None: output/NAME_OF_THE_FILE.

    Raises:
        UserError: Anything wrong with the file or with the options of one of its runs.
    """
    table = read_yaml(config)
    for key in table:
        if key not in KEYS:
            raise UserError(f"config {config}: {key}: unknown; {nearest(str(key), KEYS)}")
    base = _base(config, table.get("base") or {}) | read_options(overrides)
    arms = _arms(config, table.get("arms"))
    study = Study(
        config.stem,
        output_dir or Path("output") / config.stem,
        base,
        arms,
        _seeds(table.get("seeds", [0]) if seeds is None else seeds),
    )
    _check(study, overrides)
    return study


def _base(config: Path, base: Any) -> dict[str, Any]:
    if not isinstance(base, dict):
        raise UserError(f"config {config}: base {base!r}: must be a table of option: value")
    layers = read_yaml(DEFAULT_CONFIG)
    if "config" in base:
        layers |= read_yaml(config.parent / str(base["config"]))
    return layers | {name: value for name, value in base.items() if name != "config"}


def _arms(config: Path, tables: Any) -> list[Arm]:
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) and t for t in tables):
        raise UserError(f"config {config}: arms {tables!r}: must be a list of tables of option: values")
    arms = [arm for table in tables for arm in _combinations(table)]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"config {config}: arms: {name} is there {names.count(name)} times")
    return arms


def _combinations(table: dict[str, Any]) -> list[Arm]:
    """An arm for each combination of the values in the table's lists."""
    alternatives = [value if isinstance(value, list) else [value] for value in table.values()]
    for option, values in zip(table, alternatives, strict=True):
        if not values:
            raise UserError(f"arms: {option} []: give at least one value")
    try:
        tables = [read_options(dict(zip(table, values, strict=True))) for values in product(*alternatives)]
    except UserError as error:
        raise UserError(f"arms: {error}") from error
    return [_arm(options) for options in tables]


def _arm(options: dict[str, Any]) -> Arm:
    name = ",".join(f"{option}={_word(value)}" for option, value in options.items())
    return Arm(name, arm_label(options), options)


def arm_label(options: dict[str, Any]) -> str:
    """Options for people: `post, learning_rate 0.001, warmup_steps 0`."""
    return ", ".join(
        value if isinstance(value, str) else f"{name} {format_value(value)}"
        for name, value in options.items()
    )


def format_value(value: Any) -> str:
    """The value of an option, for people."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _word(value: Any) -> str:
    """A value as a short word that can stand in the name of a folder."""
    text = format_value(value)
    if len(text) > 40:
        text = hashlib.sha256(text.encode()).hexdigest()[:8]
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in text)


def _seeds(seeds: Any) -> list[int]:
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise UserError(f"seeds {seeds!r}: must be a list of different integers")
    return seeds


def _check(study: Study, overrides: dict[str, Any]) -> None:
    """Refuse a study whose runs could not start, or would not compare."""
    for arm in study.arms:
        for option in arm.options:
            if option in SHARED:
                raise UserError(
                    f"arms: {option}: must be the same for all arms, whose losses would not compare; "
                    "it belongs into base"
                )
            if option in overrides:
                raise UserError(f"{option} {overrides[option]}: the arms of {study.name} differ in it")
    for option in SET_BY_STUDY:
        if option in study.base.keys() - {"output_dir"} | {o for arm in study.arms for o in arm.options}:
            raise UserError(f"{option}: is set by the study for each of its runs")
    if any(options.get("push_to_hub") for options in (study.base, *(arm.options for arm in study.arms))):
        raise UserError("push_to_hub: not in a study; push a run of it with: python recipes/hub.py push RUN")
    needed = set()
    for arm in study.arms:
        for seed in study.seeds:
            try:
                args = study.arguments(arm, seed)
            except UserError as error:
                raise UserError(f"{arm.name}, seed {seed}: {error}") from error
            needed.add(remaining_tokens(build_stages(args), args.num_processes or 1, 0))
    if study.base.get("streaming") and len(needed) > 1:
        raise UserError("streaming true: each run reads what it needs, and arms need different amounts")
