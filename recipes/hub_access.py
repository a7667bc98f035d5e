"""What a run asks of the Hub before it begins: may it push there, and where does `hub:REPO` lead.

A repository or one revision of it is written `hub:REPO[@REVISION]` wherever a folder could stand.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    get_session,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id

from recipes.checkpointing import MARKER, checkpoint_folders, damage_of, is_complete
from recipes.errors import UserError
from recipes.hub_queue import LAST_CHECKPOINT, read_status
from recipes.hub_session import timeout, without_secrets, words
from recipes.run_record import differences

PREFIX = "hub:"
REVISION = re.compile(r"step-(\d+)")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Seconds without a byte from the Hub before a check is given up.
PATIENCE = 15.0
# Answers that say no, rather than not now.
REFUSED = (401, 403)


# --- Before pushing ---------------------------------------------------------------------------------


class Access(NamedTuple):
    """What the Hub said before the first step."""

    repo_id: str
    """With its namespace, where the Hub could be asked."""
    note: str | None = None
    """Why it was not asked."""
    record: dict[str, Any] | None = None
    """The description of the run that the repository holds already."""


def check_access(repo_id: str, private: bool | None, record: dict[str, Any], run: Path) -> Access:
    """Whether `run` may push to a repository, which is made where it does not exist.

    Args:
        repo_id: With or without its namespace.
        private: Of a repository that is made.
        record: The description of the run, with which a repository that holds one is compared.
        run: Its folder. Where it has pushed there before, a Hub that does not answer is no reason to stop.

    Raises:
        UserError: No token or one that may not write, a bad name, a repository of somebody else or of
            another model, a public one that shall be private, or a Hub that does not answer.
    """
    _check_name("hub_model_id", repo_id, repo_id)
    if constants.HF_HUB_OFFLINE:
        return Access(repo_id, "HF_HUB_OFFLINE is set: nothing is pushed, everything is queued")
    if get_token() is None:
        raise UserError("push_to_hub: no token; log in with: hf auth login, or set HF_TOKEN")
    with timeout(PATIENCE):
        try:
            return _check_online(repo_id, private, record)
        except UserError:
            raise
        except Exception as error:  # no network, a proxy, a server in trouble
            silent = f"{without_secrets(constants.ENDPOINT)} does not answer ({words(error)})"
            known = read_status(run).repo_id or ""
            if known in (repo_id, f"{known.split('/')[0]}/{repo_id}"):
                return Access(known, f"{silent}: pushes are queued")
            raise UserError(
                f"push_to_hub: {silent}; check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to queue "
                "what is pushed"
            ) from error


def _check_name(option: str, value: str, repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{option} {value}: {' '.join(str(error).split())}") from error


def _check_online(repo_id: str, private: bool | None, record: dict[str, Any]) -> Access:
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
    info = api.model_info(repo_id)
    if private and not info.private:
        raise UserError(f"hub_private_repo: {repo_id} is public; make it private, or give another")
    return Access(repo_id, None, _check_contents(repo_id, info, record))


def _check_token(api: HfApi) -> dict[str, Any]:
    """Who the token belongs to."""
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in REFUSED:
            raise UserError(
                f"push_to_hub: {without_secrets(constants.ENDPOINT)} does not know the token; log in with: "
                "hf auth login, or set HF_TOKEN"
            ) from error
        raise
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(f"push_to_hub: the token of {user['name']} may only read; make one that may write")
    return user


def _check_may_write(api: HfApi, repo_id: str, user: dict[str, Any]) -> None:
    """An existing repository is no sign of it."""
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        # A Hub of one's own may not have this question; then the namespace decides.
        names = {user["name"], *(o["name"] for o in user.get("orgs", []) if o.get("roleInOrg") != "read")}
        if error.response.status_code == 404 and repo_id.split("/")[0] in names:
            return
        if error.response.status_code == 404:
            raise UserError(
                f"hub_model_id {repo_id}: belongs neither to {user['name']} nor to one of their organisations"
            ) from error
        raise


def _check_contents(repo_id: str, info: ModelInfo, record: dict[str, Any]) -> dict[str, Any] | None:
    """Refuse a repository with another model: its files would be overwritten. Returns the run it holds."""
    files = {sibling.rfilename for sibling in info.siblings or []}
    if "run.json" in files:
        theirs = _read_json(repo_id, "run.json")
        check_same_on_hub(repo_id, record, theirs)
        return theirs
    if "config.json" in files:
        kind = _read_json(repo_id, "config.json").get("model_type")
        raise UserError(
            f"hub_model_id {repo_id}: holds a model of type {kind} that this run did not make; give another"
        )
    return None


def _read_json(repo_id: str, name: str) -> dict[str, Any]:
    """A small file of a repository, without the retries of a download."""
    response = get_session().get(hf_hub_url(repo_id, name), headers=build_hf_headers())
    hf_raise_for_status(response)
    try:
        return response.json()
    except ValueError as error:
        raise UserError(f"hub_model_id {repo_id}: its {name} is no JSON; give another") from error


def check_same_on_hub(repo_id: str, record: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare a run with the one in its repository, as far as `record` is known.

    Raises:
        UserError: They are not the same.
    """
    try:
        different = differences(record, theirs)
    except (KeyError, TypeError, AttributeError, UserError):
        different = ["its run.json is none of ours"]
    if different:
        raise UserError(
            f"hub_model_id {repo_id}: holds a different run ({'; '.join(different)}); give another"
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
    _check_name(option, name, repo_id)
    return repo_id, revision or None


def fetch_checkpoint(option: str, name: str) -> str | None:
    """Bring a checkpoint with its trainer's state into the cache of this machine.

    Returns:
        A line to say that the Hub did not answer, and what the cache has is taken.

    Raises:
        UserError: There is none, or the Hub does not answer and the cache does not have it.
    """
    repo_id, revision = parse_reference(option, name)
    try:
        with timeout(PATIENCE):
            folder = _folder_on_hub(repo_id, revision)
            if folder:
                patterns = [f"{folder}/*", "metrics.jsonl"]
                snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
        reason = "it did not arrive whole"
    except Exception as error:  # network, rights, names, offline: the cache may have it all the same
        folder, reason = "", words(error)
    if folder is None:
        raise UserError(
            f"{option} {name}: holds no trainer's state of that step; it is pushed with hub_strategy "
            "checkpoint or all_checkpoints"
        )
    cached = _in_cache(repo_id, revision)
    if cached is None or damage_of(cached):
        raise UserError(f"{option} {name}: cannot be loaded from the Hub ({reason})")
    return (
        None if folder else f"{name}: as it was when it was last loaded; the Hub does not answer ({reason})"
    )


def cached_checkpoint(option: str, name: str) -> Path | None:
    """The folder of a checkpoint that `fetch_checkpoint` has brought; its run's metrics lie beside it."""
    return _in_cache(*parse_reference(option, name))


def step_of_checkpoint(folder: Path) -> int:
    """The step of a complete checkpoint, whatever its folder is called."""
    return json.loads((folder / MARKER).read_text(encoding="utf-8"))["step"]


def _folder_on_hub(repo_id: str, revision: str | None) -> str | None:
    """The folder of the checkpoint that a revision stands for."""
    siblings = HfApi().model_info(repo_id, revision=revision).siblings or []
    folders = {
        sibling.rfilename.split("/")[0] for sibling in siblings if sibling.rfilename.endswith(f"/{MARKER}")
    }
    steps = {name: int(match[1]) for name in folders if (match := CHECKPOINT.fullmatch(name))}
    if LAST_CHECKPOINT in folders:
        file = hf_hub_download(repo_id, f"{LAST_CHECKPOINT}/{MARKER}", revision=revision)
        steps[LAST_CHECKPOINT] = step_of_checkpoint(Path(file).parent)
    return _choose(steps, revision)


def _in_cache(repo_id: str, revision: str | None) -> Path | None:
    """The same among what has been downloaded."""
    try:
        # Nothing more than this is known to be there.
        known = {"allow_patterns": ["metrics.jsonl"], "local_files_only": True}
        snapshot = Path(snapshot_download(repo_id, revision=revision, **known))
    except LocalEntryNotFoundError:
        return None
    folders = [f for f in [*checkpoint_folders(snapshot), snapshot / LAST_CHECKPOINT] if is_complete(f)]
    chosen = _choose({folder.name: step_of_checkpoint(folder) for folder in folders}, revision)
    return snapshot / chosen if chosen else None


def _choose(steps: dict[str, int], revision: str | None) -> str | None:
    """Of folders and their steps, the newest; at a revision step-N the one of that step."""
    match = REVISION.fullmatch(revision or "")
    wanted = {name: step for name, step in steps.items() if not match or step == int(match[1])}
    return max(wanted, key=wanted.__getitem__, default=None)


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
    names = [ref.name for ref in refs.tags + refs.branches]
    found = {name: int(match[1]) for name in names if (match := REVISION.fullmatch(name))}
    if not found:
        raise UserError(f"{option} {name}: has no revision step-N; they are pushed with push_to_hub")
    return sorted((step, revision) for revision, step in found.items())
