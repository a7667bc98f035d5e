"""Trackers: a run's curves in tensorboard, trackio or wandb, through Accelerate.

metrics.jsonl is the record and a tracker gets a copy. What it lacks of a run that goes on is filled in from
there, what it holds already is not sent twice, and when it fails, training goes on without it.
"""

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from recipes.errors import UserError
from recipes.files import write_json
from recipes.hub_session import words
from recipes.run_record import Metrics

Line = dict[str, Any]
PROJECT = "bert-ln"
# wandb would record the command line, the code, the git remote, the host, the hardware and what is printed,
# and wait for a server without end. Each has an environment variable, which goes before ours.
WANDB_SETTINGS = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "finish_timeout": 60.0,
    "host": "",
    "symlink": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


def check_tracker(name: str) -> None:
    """Refuse a tracker that cannot work, before anything is read or built.

    Raises:
        UserError: It is not installed, or wandb has neither a key nor word to stay offline.
    """
    if name == "none":
        return
    if find_spec(name) is None:
        raise UserError(f"report_to {name}: not installed; pip install {name}")
    if name == "wandb" and os.environ.get("RANK", "0") == "0":
        _check_wandb_key()


def _check_wandb_key() -> None:
    """Without a key wandb asks for one where somebody sits, and ends the run where nobody does."""
    import wandb

    try:
        online = wandb.setup().settings.mode in ("online", "run", "shared")
        ready = not online or wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:
        raise UserError(f"report_to wandb: {_in_a_line(error)}") from error
    if not ready:
        raise UserError(
            "report_to wandb: no API key; run `wandb login`, set WANDB_API_KEY, "
            "or set WANDB_MODE=offline to keep the curves in output_dir"
        )


@dataclass
class Tracker:
    """The tracker of one run; silent on all processes but the main one, and where there is none."""

    name: str
    accelerator: Accelerator
    output_dir: Path

    def start(self, options: dict[str, Any], metrics: Metrics, step: int) -> None:
        """Begin, or continue from `step`, and hand over what `metrics` has and the tracker has not."""
        if self.name != "none" and self.accelerator.is_main_process:
            self._guard(lambda: self._start(options, metrics, step))

    def log(self, line: Line) -> None:
        """The numbers of a line, unless the tracker holds them from before an interruption."""
        if self.accelerator.trackers:
            self._guard(lambda: self._log(line))

    def finish(self) -> None:
        """Close the tracker, and with it what Accelerate opened."""
        for tracker in self.accelerator.trackers[:]:
            self._guard(tracker.finish)
        self.accelerator.trackers.clear()
        self.accelerator.end_training()

    def _guard(self, action: Callable[[], None]) -> None:
        """Do something that must not stop training: a failure is one line, and the end of the tracker."""
        try:
            action()
        except Exception as error:
            print(
                f"report_to {self.name}: off from here, metrics.jsonl has every number ({_in_a_line(error)})",
                flush=True,
            )
            self.accelerator.trackers.clear()

    def _start(self, options: dict[str, Any], metrics: Metrics, step: int) -> None:
        project, keywords, config = PROJECT, {}, _flat(options)
        if self.name == "tensorboard":
            known = (self.output_dir / PROJECT).exists()
            # Readers pass over what was written from here on before the interruption.
            keywords = {"purge_step": step + 1} if known else {}
            config = None if known else config
        elif self.name == "trackio":
            # Read once, when trackio is first imported.
            os.environ.setdefault("TRACKIO_DIR", str(self.output_dir.absolute() / "trackio"))
            keywords = {"name": f"{self.output_dir.name}-{self._run_id()}", "resume": "allow"}
            keywords |= {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False}
        else:
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            keywords = _wandb_keywords(self.output_dir, self._run_id())
        self._open(project, config, keywords)
        self.holds = self._what_it_holds(step if keywords else 0)
        for line in metrics.lines():
            self._log(line)

    def _open(self, project: str, config: dict[str, Any] | None, keywords: dict[str, Any]) -> None:
        try:
            self.accelerator.init_trackers(project, config=config, init_kwargs={self.name: keywords})
        except Exception as error:
            if self.name != "wandb":
                raise
            import wandb

            print(
                f"report_to wandb: offline; `wandb sync` can send it later ({_in_a_line(error)})", flush=True
            )
            wandb.teardown()  # its server process would say that the run's id is in use
            self.accelerator.trackers.clear()
            keywords = keywords | {"mode": "offline"}
            self.accelerator.init_trackers(project, config=config, init_kwargs={self.name: keywords})

    def _run_id(self) -> str:
        """The name under which the tracker finds this run again."""
        file = self.output_dir / "tracking.json"
        if not file.exists():
            write_json(file, {"run_id": uuid.uuid4().hex[:8]})
        return json.loads(file.read_text(encoding="utf-8"))["run_id"]

    def _what_it_holds(self, step: int) -> Callable[[Line], bool]:
        """Whether the tracker has a line from before; with tensorboard, those up to `step`."""
        run = self.accelerator.trackers[0].tracker
        if self.name == "tensorboard":
            return lambda line: line["step"] <= step
        if self.name == "wandb":
            # All numbers of a step are one row there, and it takes rows in order only.
            first = run.step
            return lambda line: line["step"] < first
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(run.project, run.name, run_id=run.id)
        held = {(row["step"], _is_validation(row)) for row in rows}
        # The rows of a Space or a server are not here: all that is known of them is the last update.
        first = 0 if rows else run._next_step
        return lambda line: line["step"] < first or (line["step"], _is_validation(line)) in held

    def _log(self, line: Line) -> None:
        # A step can have a training line and a validation line, with numbers of the same name in both.
        prefix = "validation_" if _is_validation(line) else ""
        numbers = {
            prefix + name.removeprefix(prefix): value
            for name, value in line.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        if numbers and not self.holds(line):
            self.accelerator.log(numbers, step=line["step"])


def _is_validation(line: Line) -> bool:
    return "validation_loss" in line


def _wandb_keywords(output_dir: Path, run_id: str) -> dict[str, Any]:
    """What `wandb.init` gets; the user's environment goes first."""
    own = os.environ.get
    return {
        "id": own("WANDB_RUN_ID", run_id),
        "name": own("WANDB_NAME", output_dir.name),
        "dir": own("WANDB_DIR", str(output_dir)),
        "resume": own("WANDB_RESUME", "allow"),
        "settings": {k: v for k, v in WANDB_SETTINGS.items() if _wandb_variable(k) not in os.environ},
    }


def _wandb_variable(setting: str) -> str:
    return f"WANDB_{setting.removeprefix('x').upper()}"


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {words(error)}"


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options and fields of the model in one table of plain values, which is what tensorboard takes."""
    options = options | options["model"]
    del options["model"]
    return {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in options.items()}
