"""The tests' own Hub for the client in this process, a clock that never sleeps, and what a run would push."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import constants
from huggingface_hub.utils import _http, close_session

from recipes.hub_queue import Entry, add_entry
from tests.hub_server import TOKEN, Hub

MODEL = "writer/model"


@contextmanager
def hub_for_this_process(monkeypatch, tmp_path, tokens=None):
    """A Hub without Xet, though the client would speak it, and nobody's token but the writer's."""
    with Hub(tokens) as hub:
        set_endpoint(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield hub
        close_session()


def set_endpoint(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


class Forever(BaseException):
    """What no pusher takes for a failed push."""


class Clock:
    """Stands in for the module `time`: to sleep moves it on. `events` maps times to what happens then.

    Whoever sleeps very often would never end.
    """

    def __init__(self):
        self.now, self.naps, self.events = 1_000_000.0, [], {}

    def time(self):
        return self.now

    monotonic = time

    def sleep(self, seconds):
        self.naps.append(seconds)
        if len(self.naps) > 20_000:
            raise Forever
        self.now += seconds
        for when in sorted(when for when in self.events if when <= self.now):
            self.events.pop(when)()


def no_sleep_in_the_client(monkeypatch):
    """What huggingface_hub itself waits between its own tries."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))


def checkpoint_files(step):
    """By their paths; every byte tells the step."""
    return {
        "config.json": json.dumps({"model_type": "bert_ln", "step": step}).encode(),
        "model.safetensors": b"weights at step %d, " % step * 40,
        "vocab.txt": b"[PAD]\n[MASK]\n",
    }


def texts(step):
    card = f"---\nlibrary_name: transformers\ntags:\n- bert\n---\n\n# Step {step}\n"
    metrics = "".join(json.dumps({"step": s, "train_loss": 9.0 - s / 100}) + "\n" for s in range(1, step + 1))
    return {"README.md": card, "metrics.jsonl": metrics, "run.json": json.dumps({"at": step}) + "\n"}


def expected_files(step):
    """What an entry made by `queue` holds, by path in the repository."""
    return checkpoint_files(step) | {name: text.encode() for name, text in texts(step).items()}


def write_files(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def queue(run, step, repo_id=MODEL, private=None, strategy="every_save", **options):
    """What a run does with the checkpoint of a step."""
    checkpoint = run / f"checkpoint-{step}"
    if not checkpoint.exists():
        write_files(checkpoint, checkpoint_files(step))
    files = [(checkpoint / path, Path(path)) for path in checkpoint_files(step)]
    add_entry(run, Entry(step, repo_id, private, strategy, **options), files, texts(step))


def read_folder(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
