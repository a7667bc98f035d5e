"""Every option of fine-tuning: a dataclass, its defaults, which values are allowed, and the grid."""

import itertools
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from glue_eval.tasks import Task, read_tasks
from recipes.arguments import Check, at_least, check_name, check_value, nearest
from recipes.command_line import Parser, add_option, convert, options_of, read_yaml, refuse_unknown
from recipes.errors import UserError

CONFIGS = Path(__file__).parent / "configs"
# Of a setting; other options only where they do not have their default.
ALWAYS_TOLD = ("learning_rate", "train_batch_size", "num_train_epochs")
# Tasks that may start from a model of MNLI, as Liu et al. 2019 (RoBERTa) did.
FROM_TASK_CHECKPOINT = ("mrpc", "stsb", "rte")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a grid may vary; names are those of transformers.TrainingArguments where these have them."""

    learning_rate: float = 5e-5
    """Peak learning rate; it rises linearly over warmup_steps and falls linearly to 0."""
    train_batch_size: int = 32
    """Examples of an update."""
    num_train_epochs: int = 3
    """Passes over the training split."""
    warmup_steps: float = 0.1
    """Updates of warm-up; less than 1: the share of all updates."""
    weight_decay: float = 0.01
    """Decoupled decay, not on norms and biases."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches it off."""

    @property
    def name(self) -> str:
        """A folder name that says what differs from the defaults, and always the first three."""
        first = f"lr{self.learning_rate}-batch{self.train_batch_size}-epochs{self.num_train_epochs}"
        return "-".join([first, *(f"{name}{value}" for name, value in self._unusual())])

    @property
    def label(self) -> str:
        """The same for people."""
        epochs = f"{self.num_train_epochs} epoch{'s' if self.num_train_epochs > 1 else ''}"
        first = f"learning rate {self.learning_rate}, batch {self.train_batch_size}, {epochs}"
        return ", ".join([first, *(f"{name} {value}" for name, value in self._unusual())])

    def _unusual(self) -> list[tuple[str, Any]]:
        """The other options that do not have their default."""
        others = [f for f in fields(Setting) if f.name not in ALWAYS_TOLD]
        return [(f.name, v) for f in others if (v := getattr(self, f.name)) != f.default]


@dataclass(frozen=True, kw_only=True)
class GlueArguments(Setting):
    """All options of `glue_eval/run.py`."""

    task: str = ""
    """Tasks, separated by commas, or all."""
    model_name_or_path: str | None = None
    """Model to fine-tune: a folder, a Hub id or hub:REPO@REVISION; None takes the newest checkpoint of
    output/pretrain."""
    run_dir: str | None = None
    """Pre-training runs, separated by commas: folders, or hub:REPO with its revisions step-N; each of their
    checkpoints is fine-tuned."""
    from_task_checkpoint: str | None = None
    """Folder of a model fine-tuned on MNLI (see save_model) from which mrpc, stsb and rte start."""
    from_scratch: bool = False
    """Start from random weights of the model's configuration: the baseline that pre-training has to beat."""
    trust_remote_code: bool = False
    """Execute the model code that a folder or a repository brings; BertLn needs none of it."""
    data_dir: str | None = None
    """Folder with TASK/SPLIT.parquet or .jsonl; None reads nyu-mll/glue from the Hub or its cache."""
    allow_other_sizes: bool = False
    """Accept splits that do not have the official number of rows."""
    output_dir: str = "output/glue"
    """Folder of the results."""
    cache_dir: str = "output/cache"
    """Where tokenised tasks are kept for the next run."""
    seeds: int = 3
    """Runs of each setting, with seeds 1, 2, ...; a seed decides new weights, order and dropout."""
    grid: str | dict[str, Any] | None = None
    """YAML file of lists of values for the options of a setting: all combinations are run; or paper."""
    load_best_model_at_end: bool = False
    """Report the epoch with the best validation score, not the last: an optimistic choice."""
    max_seq_length: int = 128
    """Longest input in tokens; what is longer is cut. No more than the model takes."""
    bf16: bool | None = None
    """bfloat16 autocast with float32 parameters; None: where the hardware multiplies bfloat16."""
    parallel_runs: int | None = None
    """Runs at a time; None: one for each GPU, or for each CPU core as far as runs and memory go."""
    save_model: bool = False
    """Keep the fine-tuned model of each run beside its result."""
    submission: str | None = None
    """Folder for the files that the GLUE server takes; needs the test splits."""
    update_model_card: bool = False
    """Write the results into the model card of the folder that was fine-tuned."""

    @property
    def tasks(self) -> list[Task]:
        """The tasks that were asked for."""
        return read_tasks(self.task, bool(self.submission))

    @property
    def run_dirs(self) -> list[str]:
        """The folders of runs that were asked for."""
        names = [name.strip() for name in (self.run_dir or "").split(",")]
        return list(dict.fromkeys(name for name in names if name))

    def settings(self) -> list[Setting]:
        """All combinations of the grid over the single setting.

        Raises:
            UserError: The grid names what is no option of a setting, or a value that is not allowed.
        """
        base = Setting(**{f.name: getattr(self, f.name) for f in fields(Setting)})
        axes = {name: _values(name, value) for name, value in _read_grid(self.grid).items()}
        points = [replace(base, **dict(zip(axes, p, strict=True))) for p in itertools.product(*axes.values())]
        for point in points:
            for name, check in SETTING_CHECKS.items():
                check_value(name, getattr(point, name), check)
        return list(dict.fromkeys(points))


SETTING_CHECKS: dict[str, Check] = {
    "learning_rate": at_least(0),
    "train_batch_size": at_least(1),
    "num_train_epochs": at_least(1),
    "warmup_steps": at_least(0),
    "weight_decay": at_least(0),
    "max_grad_norm": at_least(0),
}
CHECKS: dict[str, Check] = {
    "seeds": at_least(1),
    "max_seq_length": at_least(8),
    "parallel_runs": at_least(1),
}
# What names a file, a folder or something on the Hub.
NAMES = ("model_name_or_path", "from_task_checkpoint", "data_dir", "output_dir", "cache_dir", "submission")
OPTIONS = options_of(GlueArguments)


def parse_glue_arguments(
    argv: list[str] | None = None, prog: str = "glue_eval/run.py", defaults: dict[str, Any] | None = None
) -> GlueArguments:
    """Options from the command line over those of `--config` over `defaults`, checked.

    Raises:
        UserError: An option that is unknown, has the wrong type or a value that is not allowed.
    """
    parser = Parser(
        prog=prog,
        usage="%(prog)s --task TASK[,TASK...] [--config FILE] [--name value ...]",
        allow_abbrev=False,
        description="Fine-tune a model on GLUE. Every option can stand in the YAML file too.",
    )
    parser.add_argument("--config", help="YAML file of options; or paper, the protocol of Xiong et al. 2020")
    defaults = defaults or {}
    for name, option in OPTIONS.items():
        add_option(parser, name, option, defaults.get(name, option.default))
    given, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, OPTIONS)
    values = vars(given)
    config = values.pop("config")
    return build_glue_arguments(defaults | (read_yaml(_shipped(config)) if config else {}) | values)


def build_glue_arguments(values: dict[str, Any]) -> GlueArguments:
    """Options from a flat table of names and values, checked.

    Raises:
        UserError: As `parse_glue_arguments`.
    """
    args = GlueArguments(**convert(values, OPTIONS))
    for name, check in CHECKS.items():
        check_value(name, getattr(args, name), check)
    for name in NAMES:
        check_name(name, getattr(args, name))
    args.settings()
    tasks = [task.name for task in args.tasks]
    if args.model_name_or_path and args.run_dir:
        raise UserError(f"run_dir {args.run_dir}: not together with model_name_or_path; give one")
    if args.from_task_checkpoint:
        _check_task_checkpoint(args, tasks)
    if args.from_scratch and args.update_model_card:
        raise UserError("update_model_card: not together with from_scratch: the card is the trained model's")
    if args.submission and args.run_dirs:
        raise UserError(f"submission {args.submission}: of one model; give model_name_or_path, not run_dir")
    return args


def _check_task_checkpoint(args: GlueArguments, tasks: list[str]) -> None:
    for name in tasks:
        if name not in FROM_TASK_CHECKPOINT:
            raise UserError(
                f"from_task_checkpoint: task {name} does not start from a model of MNLI; "
                f"allowed: {', '.join(FROM_TASK_CHECKPOINT)}"
            )
    for name in ("model_name_or_path", "run_dir"):
        if getattr(args, name):
            raise UserError(f"{name}: not together with from_task_checkpoint, which is the model; give one")


def _read_grid(grid: str | dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(grid, str):
        table = read_yaml(_shipped(grid), "grid")
        grid = table.get("grid", table)  # a grid of its own, or that of a file of options
    if not isinstance(grid or {}, dict):
        raise UserError(f"grid {grid!r}: must be a table of option: values")
    names = [f.name for f in fields(Setting)]
    for name in grid or {}:
        if name not in names:
            raise UserError(f"grid {name}: unknown option; {nearest(str(name), names)}")
    return grid or {}


def _values(name: str, value: Any) -> list[Any]:
    """The values of a grid for one option: a list in the file, or a single value."""
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise UserError(f"grid {name} []: give at least one value")
    return [convert({name: item}, OPTIONS)[name] for item in listed]


def _shipped(name: str) -> Path:
    """The file that a name such as `paper` stands for, or the file itself."""
    shipped = CONFIGS / f"{name}.yaml"
    return shipped if shipped.is_file() and not Path(name).exists() else Path(name)


def describe(args: GlueArguments) -> dict[str, Any]:
    """What decides the figures of a folder of results, besides models, tasks and seeds."""
    return {
        "settings": [asdict(setting) for setting in args.settings()],
        "max_seq_length": args.max_seq_length,
        "load_best_model_at_end": args.load_best_model_at_end,
    }
