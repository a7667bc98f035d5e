"""Does pushing slow a step? Training without it, with it, and with a Hub that hangs, in turn.

    python -m tests.push_speed [--rounds 5]

The default model, 120 updates of 2,048 tokens, a checkpoint every 20, pushed as often to a Hub on this
machine, more than any real run does. Tokens a second are the median of the training lines after the first
checkpoint; ratios are to the run without pushing in the same round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import ROOT
from tests.hub_server import TOKEN, Hub

OPTIONS = {
    "max_steps": 120, "save_steps": 20, "logging_steps": 20, "eval_steps": 120, "max_eval_samples": 16,
    "save_total_limit": 2, "hub_min_interval": 0, "hub_exit_timeout": 5, "hub_strategy": "checkpoint",
}  # fmt: skip
ARMS = {"no pushing": None, "pushing": "", "a Hub that hangs": "PUT"}


def speed(arm, folder, cache_dir):
    """Tokens a second of one run, and what was pushed."""
    options = OPTIONS | {"output_dir": folder / "run", "cache_dir": cache_dir}
    with Hub() as hub:
        if ARMS[arm]:
            hub.fail(ARMS[arm], None, "hang")
        if ARMS[arm] is not None:
            options |= {"push_to_hub": True, "hub_model_id": "speed"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        environment = os.environ | hub.environment(folder / "home", TOKEN)
        command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *words]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        pushed = len(hub.repos["writer/speed"].tags) if hub.repos else 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "train_loss" in line]
    return statistics.median(rates[1:]), pushed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    ratios = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            found = {a: speed(a, Path(folder) / f"{number}-{i}", Path(folder)) for i, a in enumerate(ARMS)}
            for arm, (rate, pushed) in found.items():
                ratios[arm].append(rate / found["no pushing"][0])
                print(f"round {number + 1}  {arm:<18}{rate:>8,.0f} tokens/s  {pushed} pushed", flush=True)
    for arm, values in ratios.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{arm:<18}{middle:.3f} of the speed without ({low:.3f} to {high:.3f}, {rounds} rounds)")


if __name__ == "__main__":
    main()
