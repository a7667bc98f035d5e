"""Push a run to the Hub, and say what has been pushed.

What is left of a run that was trained with --push_to_hub, after an outage or an end that came too early:

    python recipes/hub.py push --pending output/pretrain

A run that was trained without it, the final model or every checkpoint with the trainer's state:

    python recipes/hub.py push output/pretrain --hub_model_id YOUR_NAME/bert-ln
    python recipes/hub.py push output/pretrain --hub_model_id YOUR_NAME/bert-ln --hub_strategy all_checkpoints

Again after the model card has changed (`glue_eval/run.py --update_model_card` writes scores into it):

    python recipes/hub.py push output/pretrain

What has been pushed and what waits:

    python recipes/hub.py status output/pretrain

The token is that of `hf auth login` or of HF_TOKEN; HF_ENDPOINT names another Hub. Each push is one commit on
main, tagged step-STEP. Exit codes: 0 everything is pushed, 1 something is left in the queue, 2 a mistake in
options or folders, 130 interrupted.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars

from recipes.arguments import CHECKS, HubArguments, check_value
from recipes.checkpointing import checkpoint_folders, is_complete, step_of
from recipes.command_line import Parser, add_option, convert, options_of, refuse_unknown
from recipes.errors import UserError
from recipes.hub_access import check_access
from recipes.hub_queue import Entry, pending, read_status
from recipes.hub_session import set_timeout
from recipes.hub_upload import SILENCE, TRIES, push_pending
from recipes.publishing import default_repository, queue_checkpoint

OPTIONS = {
    name: option
    for name, option in options_of(HubArguments).items()
    if name in ("hub_model_id", "hub_private_repo", "hub_strategy")
}
# Strategies that push every checkpoint, not the newest alone.
EVERY = ("every_save", "all_checkpoints")


def main() -> int:
    """Parse, call, done."""
    try:
        given = _parse()
        run = Path(given.pop("run"))
        _check_run(run)
        if given.pop("command") == "status":
            _show(run)
            return 0
        return _push(run, given.pop("pending"), given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        print(f"error: {error.filename} is gone: the run goes on and prunes; try again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is left stays queued", file=sys.stderr)
        return 130


def _parse() -> dict[str, Any]:
    parser = Parser(
        prog="recipes/hub.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="push a run", allow_abbrev=False)
    push.add_argument("--pending", action="store_true", help="only what is left in the queue")
    for name, option in OPTIONS.items():
        add_option(push, name, option, "end" if name == "hub_strategy" else option.default)
    status = commands.add_parser("status", help="what has been pushed and what waits", allow_abbrev=False)
    for command in (push, status):
        command.add_argument("run", help="output_dir of recipes/pretrain.py")
    given, unknown = parser.parse_known_args()
    refuse_unknown(unknown, [*OPTIONS, "pending"])
    return vars(given)


def _check_run(run: Path) -> None:
    if not (run / "run.json").is_file():
        raise UserError(f"run {run}: holds no run (no run.json); give the output_dir of recipes/pretrain.py")


def _show(run: Path) -> None:
    status, left = read_status(run), pending(run)
    print(f"repository  {status.repo_id or 'none yet'}")
    for name, commit in (status.pushed or {}).items():
        print(f"pushed      {name}  {commit}")
    for entry in left:
        print(f"waiting     {entry.name}, for {entry.repo_id}")
    if status.error:
        print(f"last error  {status.error}")


def _push(run: Path, only_pending: bool, given: dict[str, Any]) -> int:
    if not only_pending:
        _queue(run, {"hub_strategy": "end"} | convert(given, OPTIONS))
    elif given:
        raise UserError(f"{next(iter(given))}: not together with pending, which pushes what was queued")
    if not pending(run):
        print(f"{run}: nothing waits to be pushed")
        return 0
    set_timeout(SILENCE)
    if not sys.stderr.isatty():
        disable_progress_bars()
    return 0 if push_pending(run, partial(print, flush=True), TRIES) else 1


def _queue(run: Path, options: dict[str, Any]) -> None:
    """Queue the newest checkpoint of a run, or all of them."""
    for name in OPTIONS:
        if name in CHECKS:
            check_value(name, options.get(name), CHECKS[name])
    complete = [folder for folder in checkpoint_folders(run) if is_complete(folder)]
    if not complete:
        raise UserError(f"run {run}: holds no complete checkpoint")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    strategy, private = options["hub_strategy"], options.get("hub_private_repo")
    wanted = options.get("hub_model_id") or read_status(run).repo_id or default_repository(run)
    access = check_access(wanted, private, record, run)
    if access.note:
        print(access.note)
    chosen = complete if strategy in EVERY else complete[-1:]
    there = (read_status(run).pushed or {}) if read_status(run).repo_id == access.repo_id else {}
    for folder in chosen:
        # All of them are wanted here, whichever files they bring; those before the newest only once.
        entry = Entry(step_of(folder), access.repo_id, private, strategy, keep=strategy in EVERY, last=True)
        if folder == chosen[-1] or entry.name not in there:
            is_final = entry.step == record["options"]["max_steps"] and (run / "README.md").exists()
            queue_checkpoint(entry, folder, record.get("results") if is_final else None)


if __name__ == "__main__":
    sys.exit(main())
