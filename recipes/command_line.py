"""Options: those of the default run, under a YAML file, under the command line; misspelt names are errors."""

import argparse
import ast
import inspect
import textwrap
import types
from collections.abc import Collection, Iterable
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from bert_ln import BertLnConfig
from bert_ln.attention import GLOBAL, QK_NORMS
from bert_ln.configuration_bert_ln import INITIALIZERS
from bert_ln.norms import NORMS
from bert_ln.placements import PLACEMENTS
from recipes.arguments import (
    MODEL_OPTIONS,
    DataArguments,
    HubArguments,
    MaskingArguments,
    OptimizationArguments,
    PretrainingArguments,
    RunArguments,
    check_arguments,
    nearest,
)
from recipes.errors import UserError
from recipes.stages import build_stages

# What the options of the model that are names may be.
CHOICES = {
    "norm_placement": PLACEMENTS,
    "norm_type": NORMS,
    "initializer": INITIALIZERS,
    "qk_norm": QK_NORMS,
    "attention_window_global": GLOBAL,
}
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "default.yaml"


def parse_arguments(argv: list[str] | None = None) -> PretrainingArguments:
    """Options from the command line over those of `--config` over those of the default run, checked.

    Args:
        argv: Command-line words; None takes those of the process.

    Raises:
        UserError: An option that is unknown, has the wrong type or a value that is not allowed.
    """
    parser = _build_parser()
    given, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, option_names())
    values = vars(given)
    config = values.pop("config")
    layers = read_yaml(DEFAULT_CONFIG) | (read_yaml(Path(config)) if config else {})
    return build_arguments(layers | values)


def build_arguments(values: dict[str, Any]) -> PretrainingArguments:
    """Options from a flat table of names and values (as in a YAML file), checked.

    Raises:
        UserError: As `parse_arguments`.
    """
    own, model = {}, {}
    for name, value in read_options(values).items():
        target = own if name in PretrainingArguments.__dataclass_fields__ else model
        target[name] = value
    args = PretrainingArguments(**own, model=model)
    check_arguments(args)
    build_stages(args)
    return args


def option_names() -> list[str]:
    """Every option of pre-training."""
    return list(_options())


def refuse_unknown(words: list[str], allowed: Iterable[str]) -> None:
    """Raise UserError for the first of the words that a parser did not know, if there is one."""
    if words:
        # Without what follows "=": it may be a secret.
        name = words[0].split("=")[0]
        raise UserError(f"{name}: unknown option; {nearest(name.lstrip('-'), allowed)}")


def read_options(values: dict[str, Any]) -> dict[str, Any]:
    """The same table with each value as its option's type; words are read as on the command line.

    Raises:
        UserError: An option that is unknown or has the wrong type.
    """
    return convert(values, _options())


def convert(values: dict[str, Any], options: "dict[str, Option]") -> dict[str, Any]:
    """The same table with each value as the type of its option among `options`.

    Raises:
        UserError: As `read_options`.
    """
    for name in values:
        if name not in options:
            raise UserError(f"{name}: unknown option; {nearest(str(name), options)}")
    return {name: _convert(name, options[name].annotation, value) for name, value in values.items()}


def read_yaml(path: Path, option: str = "config") -> dict[str, Any]:
    """The table of a YAML file, which `option` named.

    Raises:
        UserError: There is no such file, or it holds no table.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{option} {path}: no such file") from None
    except (OSError, *NOT_YAML) as error:
        raise UserError(f"{option} {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{option} {path}: must be a table of option: value")
    return values


class _Loader(yaml.SafeLoader):
    """Plain values only. A key that is there twice is refused: the first of its values would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The table of a node."""
        found = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark
                )
            found.add(key.value)
        return super().construct_mapping(node, deep)


# Of a text that is no YAML: dates and numbers that there cannot be, and nesting without end, too.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


@dataclass(frozen=True)
class Option:
    """What an option may be, what it is if nothing is said, and its `--help`."""

    annotation: Any
    default: Any
    help: str


def options_of(group: type) -> dict[str, Option]:
    """The fields of a dataclass, inherited ones first, as options; each field's docstring is its help."""
    hints, docstrings = get_type_hints(group), {}
    for parent in reversed(group.__mro__[:-1]):
        docstrings |= _field_docstrings(parent)
    return {f.name: Option(hints[f.name], _default(f), docstrings[f.name]) for f in fields(group)}


@cache
def _options() -> dict[str, Option]:
    """Every option by name: the fields of the dataclasses above and those of `BertLnConfig`."""
    options = {}
    for group in (DataArguments, MaskingArguments, OptimizationArguments, RunArguments, HubArguments):
        options |= options_of(group)
    for name, annotation in MODEL_OPTIONS.items():
        options[name] = Option(annotation, getattr(BertLnConfig, name), _model_help(name))
    return options


def _model_help(name: str) -> str:
    """The help of an option of the model: the names it may have, and where it is explained."""
    known = f" One of {', '.join(CHOICES[name])}." if name in CHOICES else ""
    is_own = name in BertLnConfig.__annotations__
    return f"{name} of BertLnConfig.{known}{' See docs/normalisation.md.' if is_own else ''}"


def _field_docstrings(group: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0].body
    return {
        node.target.id: " ".join(following.value.value.split())
        for node, following in pairwise(body)
        if isinstance(node, ast.AnnAssign)
    }


def _default(option: Field) -> Any:
    return option.default if option.default is not MISSING else option.default_factory()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of the rest of the program."""

    def error(self, message: str) -> NoReturn:
        """Raise what the rest of the program raises for a mistake."""
        raise UserError(message)


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="recipes/pretrain.py",
        usage="%(prog)s [--config FILE] [--name value ...]",
        allow_abbrev=False,
        description="Pre-train BERT. Every option can stand in the YAML file too.",
    )
    parser.add_argument("--config", help="YAML file of options, laid over those of the default run")
    add_options(parser)
    return parser


def add_options(
    parser: argparse._ActionsContainer, without: Collection[str] = (), config: Path = DEFAULT_CONFIG
) -> None:
    """Let `parser` take the options of pre-training, as words that `read_options` makes values of.

    The defaults in the help are those of the default run under those of the YAML file `config`.
    """
    default_run = read_yaml(DEFAULT_CONFIG) | read_yaml(config)
    for name, option in _options().items():
        if name not in without:
            add_option(parser, name, option, default_run.get(name, option.default))


def add_option(parser: argparse._ActionsContainer, name: str, option: Option, default: Any) -> None:
    """Let `parser` take one option; `default` is what the help says it is."""
    # A switch may stand alone (--bf16), and so may --resume_from_checkpoint.
    alone = {"nargs": "?", "const": True} if bool in _members(option.annotation) else {}
    text = f"{option.help} [{default}]".replace("%", "%%")
    parser.add_argument(f"--{name}", metavar="VALUE", help=text, default=argparse.SUPPRESS, **alone)


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _convert(name: str, annotation: Any, value: Any) -> Any:
    """The value as the option's type; words of the command line are read as YAML reads them."""
    members = _members(annotation)
    if isinstance(value, str) and members != (str,):
        value = _read_word(value, members)
    for member in members:
        if _is(value, member):
            return float(value) if member is float else value
    wanted = " or ".join("null" if m is type(None) else getattr(m, "__name__", str(m)) for m in members)
    raise UserError(f"{name} {value!r}: must be of type {wanted}")


def _read_word(value: str, members: tuple[Any, ...]) -> Any:
    if value.lower() in ("none", "null"):
        return None
    if float in members:
        # YAML 1.1 reads 1e-4 as a string.
        try:
            return float(value)
        except ValueError:
            return value
    if members[0] is str and value.lower() not in ("true", "false"):
        return value
    try:
        return yaml.load(value, _Loader)
    except NOT_YAML:
        return value


def _is(value: Any, member: Any) -> bool:
    kind = get_origin(member) or member
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)
