"""What a run asks of the Hub before it begins: may it push there, and where does `hub:REPO` lead.

A repository or one revision of it is written `hub:REPO[@REVISION]` wherever a folder could stand.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from recipes.checkpointing import MARKER, checkpoint_folders, is_complete
from recipes.errors import UserError
from recipes.hub_queue import read_status
from recipes.hub_session import timeout
from recipes.hub_upload import words
from recipes.run_record import differences

PREFIX = "hub:"
REVISION = re.compile(r"step-(\d+)")
# Seconds without a byte from the Hub before a check is given up.
PATIENCE = 15.0
LAST_CHECKPOINT = "last-checkpoint"
# Answers that say no, rather than not now.
REFUSED = (401, 403)


# --- Before pushing ---------------------------------------------------------------------------------


def check_access(
    repo_id: str, private: bool | None, record: dict[str, Any], run: Path
) -> tuple[str, str | None]:
    """Whether `run` may push to a repository, which is made where it does not exist.

    Args:
        repo_id: With or without its namespace.
        private: Of a repository that is made.
        record: The description of the run, with which a repository that holds one is compared.
        run: Its folder. Where it has pushed before, a Hub that does not answer is no reason to stop.

    Returns:
        The full name, and a line to say where the Hub was not asked.

    Raises:
        UserError: No token or one that may not write, a bad name, a repository of somebody else or of
            another model, or a Hub that does not answer.
    """
    _check_name(repo_id)
    if constants.HF_HUB_OFFLINE:
        return repo_id, "HF_HUB_OFFLINE is set: nothing is pushed, everything is queued"
    if get_token() is None:
        raise UserError("push_to_hub: no token; log in with: hf auth login, or set HF_TOKEN")
    with timeout(PATIENCE):
        try:
            return _check_online(repo_id, private, record), None
        except UserError:
            raise
        except Exception as error:  # no network, a proxy, a server in trouble
            if known := read_status(run).repo_id:
                return known, f"{constants.ENDPOINT} does not answer ({words(error)}): pushes are queued"
            raise UserError(
                f"push_to_hub: {constants.ENDPOINT} does not answer ({words(error)}); check the network and "
                "HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to queue what is pushed"
            ) from error


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"hub_model_id {repo_id}: {' '.join(str(error).split())}") from error


def _check_online(repo_id: str, private: bool | None, record: dict[str, Any]) -> str:
    api = HfApi()
    user = _check_token(api)
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        _check_may_write(api, repo_id, user)
    except HfHubHTTPError as error:
        if error.response.status_code in REFUSED:
            raise UserError(
                f"hub_model_id {repo_id}: the token of {user['name']} may not write there ({words(error)}); "
                "give a repository of your own, or a token with write access to it"
            ) from error
        raise
    _check_contents(api, repo_id, record)
    return repo_id


def _check_token(api: HfApi) -> dict[str, Any]:
    """Who the token belongs to."""
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in REFUSED:
            raise UserError(
                f"push_to_hub: {constants.ENDPOINT} does not know the token; log in with: hf auth login, or "
                "set HF_TOKEN"
            ) from error
        raise
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"push_to_hub: the token of {user['name']} may only read; make one that may write")
    return user


def _check_may_write(api: HfApi, repo_id: str, user: dict[str, Any]) -> None:
    """An existing repository is no sign of it."""
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        # A Hub of one's own may not have this question; then the namespace decides.
        names = {user["name"], *(organisation["name"] for organisation in user.get("orgs", []))}
        if error.response.status_code == 404 and repo_id.split("/")[0] in names:
            return
        if error.response.status_code == 404:
            raise UserError(
                f"hub_model_id {repo_id}: belongs neither to {user['name']} nor to one of their organisations"
            ) from error
        raise


def _check_contents(api: HfApi, repo_id: str, record: dict[str, Any]) -> None:
    """Refuse a repository with another model: its files would be overwritten."""
    files = {sibling.rfilename for sibling in api.model_info(repo_id).siblings or []}
    if "run.json" in files:
        theirs = json.loads(Path(hf_hub_download(repo_id, "run.json")).read_text(encoding="utf-8"))
        try:
            different = differences(record, theirs)
        except (KeyError, TypeError, AttributeError, UserError):
            different = ["its run.json is none of ours"]
        if different:
            raise UserError(
                f"hub_model_id {repo_id}: holds a different run ({'; '.join(different)}); give another"
            )
    elif "config.json" in files:
        config = json.loads(Path(hf_hub_download(repo_id, "config.json")).read_text(encoding="utf-8"))
        raise UserError(
            f"hub_model_id {repo_id}: holds a model of type {config.get('model_type')} that this run did not "
            "make; give another"
        )


# --- hub:REPO[@REVISION] ----------------------------------------------------------------------------


def is_reference(name: Any) -> bool:
    """Whether a value names a repository and not a folder."""
    return isinstance(name, str) and name.startswith(PREFIX)


def parse_reference(option: str, name: str) -> tuple[str, str | None]:
    """Repository and revision, if any, of `hub:REPO[@REVISION]`.

    Raises:
        UserError: It is none; names `option`.
    """
    repo_id, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{option} {name}: {' '.join(str(error).split())}") from error
    return repo_id, revision or None


def fetch_checkpoint(option: str, name: str) -> None:
    """Bring a checkpoint with its trainer's state into the cache of this machine.

    Raises:
        UserError: There is none, or the Hub does not answer and the cache does not have it.
    """
    repo_id, revision = parse_reference(option, name)
    try:
        with timeout(PATIENCE):
            info = HfApi().model_info(repo_id, revision=revision)
            chosen = _newest({sibling.rfilename for sibling in info.siblings or []})
            if chosen:
                patterns = [f"{chosen}/*", "metrics.jsonl"]
                snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    except Exception as error:  # network, rights, names, offline: the cache may have it all the same
        if not _in_cache(repo_id, revision):
            raise UserError(f"{option} {name}: cannot be loaded from the Hub ({words(error)})") from error
        return
    if not chosen:
        raise UserError(
            f"{option} {name}: holds no trainer's state, which is pushed with hub_strategy checkpoint or "
            "all_checkpoints"
        )


def cached_checkpoint(option: str, name: str) -> Path:
    """The folder of a checkpoint that `fetch_checkpoint` has brought; its run's metrics lie beside it.

    Raises:
        UserError: This machine does not have it.
    """
    folder = _in_cache(*parse_reference(option, name))
    if folder is None:
        raise UserError(f"{option} {name}: is not in the cache of this machine; share HF_HOME")
    return folder


def _newest(files: set[str]) -> str | None:
    """The folder of the newest checkpoint among the files of a revision."""
    folders = {name.split("/")[0] for name in files if name.endswith(f"/{MARKER}")}
    numbered = [f for f in folders if f.removeprefix("checkpoint-").isdigit()]
    if LAST_CHECKPOINT in folders:
        return LAST_CHECKPOINT
    return max(numbered, key=lambda folder: int(folder.removeprefix("checkpoint-")), default=None)


def _in_cache(repo_id: str, revision: str | None) -> Path | None:
    try:
        # Nothing more than this is known to be there.
        known = {"allow_patterns": ["metrics.jsonl"], "local_files_only": True}
        snapshot = Path(snapshot_download(repo_id, revision=revision, **known))
    except LocalEntryNotFoundError:
        return None
    last = snapshot / LAST_CHECKPOINT
    complete = [f for f in [*checkpoint_folders(snapshot), last] if is_complete(f)]
    return complete[-1] if complete else None


def step_revisions(option: str, name: str) -> list[tuple[int, str]]:
    """The revisions step-STEP of a repository, in the order of their steps.

    Raises:
        UserError: It has none, or the Hub does not answer.
    """
    repo_id, revision = parse_reference(option, name)
    if revision:
        raise UserError(f"{option} {name}: takes a whole repository; leave @{revision} out")
    try:
        with timeout(PATIENCE):
            refs = HfApi().list_repo_refs(repo_id)
    except Exception as error:  # network, rights, names
        raise UserError(f"{option} {name}: cannot be read from the Hub ({words(error)})") from error
    found = {match[0]: int(match[1]) for ref in refs.tags + refs.branches if (match := _step(ref.name))}
    if not found:
        raise UserError(f"{option} {name}: has no revision step-N; they are pushed with push_to_hub")
    return sorted((step, revision) for revision, step in found.items())


def _step(name: str) -> re.Match | None:
    return REVISION.fullmatch(name)
