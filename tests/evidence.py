"""What a run leaves on disk: whether it is sound at any moment, and what must equal another run's."""

import hashlib
import json

from tests.conftest import TIMES

# They hold times and folders; what else is in them is compared apart.
NOT_COMPARED = ("run.json", "README.md", "metrics.jsonl", "complete.json")


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read(file):
    return file.read_text() if file.exists() else ""


def timeless(value):
    """Without what the clock wrote."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in (*TIMES, "seconds")}
    return value


def timeless_lines(text):
    return [timeless(json.loads(line)) for line in text.splitlines()]


def is_hidden(file):
    """Locks, and what a killed process did not get to rename or to delete; nobody reads it."""
    return file.name.startswith(".")


def digests(folder, pattern="**/*"):
    """SHA-256 of the files of a folder by path; of JSON that tells times, its content without them."""
    found = {}
    for file in sorted(f for f in folder.glob(pattern) if f.is_file() and not is_hidden(f)):
        if file.name in NOT_COMPARED:
            continue
        is_timed = file.name in ("state.json", "store.json")
        value = timeless(json.loads(read(file))) if is_timed else sha256(file)
        found[str(file.relative_to(folder.parent))] = value
    return found


def samples_of(file):
    """What each update was given, by (step, rank): the last time that it was done is the one that counts."""
    return {(line["step"], line["rank"]): line["samples"] for line in timeless_lines(read(file))}


def left_by(output, cache, last_step):
    """Everything that has to be equal in a finished run and in its cache, by name."""
    return {
        "names": sorted(f.name for f in output.glob("*") if not f.match("checkpoint-*") and not is_hidden(f)),
        "metrics": timeless_lines(read(output / "metrics.jsonl")),
        "results": timeless(json.loads(read(output / "run.json"))["results"]),
        **digests(output, "*"),
        **digests(output / f"checkpoint-{last_step}"),
        **digests(cache),
    }


def revision_at(output, step):
    """What a revision on the Hub has to hold of a checkpoint: weights, moments, metrics before it."""
    folder = output / f"checkpoint-{step}"
    contents = [(folder / name).read_bytes() for name in ("model.safetensors", "trainer/optimizer.pt")]
    return _revision(step, *contents, read(output / "metrics.jsonl"))


def revisions_of(repo):
    """The same by step, of what was pushed with `--hub_strategy all_checkpoints`."""
    found = {}
    for name in repo.tags:
        step, files = int(name.removeprefix("step-")), repo.at(name).files
        contents = [files["model.safetensors"], files[f"checkpoint-{step}/trainer/optimizer.pt"]]
        found[step] = _revision(step, *contents, files["metrics.jsonl"].decode())
    return found


def _revision(step, weights, moments, metrics):
    # One that was stopped at a step that it should have validated at makes up for that when it goes on.
    lines = [line for line in timeless_lines(metrics) if line["step"] < step]
    return hashlib.sha256(weights).hexdigest(), hashlib.sha256(moments).hexdigest(), lines


# --- At any moment ----------------------------------------------------------------------------------


def complete_checkpoints(output):
    """By step, what is wrong with each folder that carries a marker, or None."""
    markers = output.glob("checkpoint-*/complete.json")
    return {int(marker.parent.name.removeprefix("checkpoint-")): damage(marker) for marker in markers}


def damage(marker):
    """None if every file of the folder is as its marker says."""
    folder = marker.parent
    found = {str(f.relative_to(folder)): sha256(f) for f in folder.rglob("*") if f.is_file() and f != marker}
    try:
        expected = json.loads(marker.read_text())["files"]
    except ValueError:
        return f"{folder.name}: its marker cannot be read"
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    return f"{folder.name} is marked complete, but for {', '.join(wrong)}" if wrong or not found else None


def damaged_lines(file):
    """What is wrong with a metrics.jsonl: a line before the last that is no JSON, steps that do not rise."""
    lines, last = read(file).splitlines(), {}
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except ValueError:
            return [f"metrics.jsonl: line {number} is damaged"] if number < len(lines) else []
        kind = next((k for k in ("train_loss", "validation_loss", "diagnosis") if k in line), "other")
        if line["step"] <= last.get(kind, 0):
            return [f"metrics.jsonl: line {number} repeats step {line['step']}"]
        last[kind] = line["step"]
    return []
