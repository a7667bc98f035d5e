"""The launcher's configurations and the Slurm script: they are read, and what they start trains."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

from tests.conftest import ROOT, TINY, accelerate, metrics_of

CONFIGS = sorted((ROOT / "recipes" / "configs" / "accelerate").glob("*.yaml"))
SCRIPT = ROOT / "recipes" / "configs" / "slurm" / "pretrain.sbatch"
DDP = ROOT / "recipes" / "configs" / "accelerate" / "ddp.yaml"

# Runs the command once a node, as srun does, and passes SIGTERM on.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$LOG/srun"; shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2> /dev/null; do wait "$task" || status=$?; done
done
exit "${status:-0}"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$LOG/scontrol"; fi
"""
ACCELERATE = """#!/bin/bash
printf '%s\\n' "$@" > "$LOG/words-$SLURM_NODEID.partial"
trap 'touch "$LOG/stopped-$SLURM_NODEID"; exit 143' TERM
mv "$LOG/words-$SLURM_NODEID.partial" "$LOG/words-$SLURM_NODEID"
while true; do sleep 0.05; done
"""


def launch_arguments(words):
    """As `accelerate launch` understands them, the configuration's under them."""
    parser = launch_command_parser()
    args = parser.parse_args(words)
    args.nondefault = set()
    return _validate_launch_command(args)[0]


def command_in(file):
    """The words of the command in the comment at the head of a file."""
    lines = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return shlex.split(next(line for line in text.splitlines() if line.startswith("accelerate launch")))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_the_launcher_reads_it(file):
    config = load_config_from_file(str(file))  # refuses keys that it does not know
    is_sharded = file.name.startswith("fsdp2")
    assert config.distributed_type == (DistributedType.FSDP if is_sharded else DistributedType.MULTI_GPU)
    assert (config.num_machines > 1) == ("multi_node" in file.name)
    assert config.num_processes == 8 * config.num_machines
    assert yaml.safe_load(file.read_text())["num_processes"] == config.num_processes


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_the_command_at_its_head_is_one(file):
    program, verb, *words = command_in(file)
    args = launch_arguments(words)
    assert ROOT / args.config_file == file
    assert (ROOT / args.training_script).is_file()
    assert args.use_fsdp == file.name.startswith("fsdp2")
    if "multi_node" in file.name:
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, 0)
        assert args.main_process_ip and args.main_process_port == 29500


def test_ddp_trains_on_two_processes(launch, tmp_path):
    command = [
        accelerate(),
        "launch",
        "--config_file",
        str(DDP),
        "--num_processes=2",
        "--main_process_port=0",
    ]
    options = {"output_dir": tmp_path / "run", "max_steps": 2, "per_device_train_batch_size": 4}
    result = launch(launcher=command, env={"ACCELERATE_USE_CPU": "true"}, **options)
    assert result.returncode == 0, result.stderr
    assert "processes   2 on cpu" in result.stdout
    lines = metrics_of(tmp_path / "run", "train_loss")
    assert [line["tokens_seen"] for line in lines] == [2 * 4 * 32, 2 * 2 * 4 * 32]


@pytest.fixture
def slurm(tmp_path):
    """Starts the Slurm script on two nodes of one device, with programs in place of Slurm's."""
    programs, started = tmp_path / "bin", []
    programs.mkdir()

    def start(*words, **others):
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, **others}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LOG": str(tmp_path),
            # Its last digits choose the port.
            "SLURM_JOB_ID": str(10_000 + os.getpid() % 10_000),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        command = ["bash", str(SCRIPT), *words]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True))
        return started[-1]

    yield start
    for process in started:  # where a test has failed, what it started would go on for ever
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    head = SCRIPT.read_text().split("\n\n")[0]
    assert head.startswith("#!/bin/bash\n")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", head, re.MULTILINE))
    # The shell gets the signal, before the limit; the queue takes the job again and keeps what it has said.
    assert options["signal"] == "B:USR1@120"
    assert {"requeue", "open-mode"} <= set(options)
    assert options["ntasks-per-node"] == "1"


def test_each_machine_gets_a_launcher_and_each_launcher_the_signal(slurm, tmp_path):
    process = slurm("--output_dir", "a folder", "--max_steps", "7", accelerate=ACCELERATE)
    words = [tmp_path / f"words-{node}" for node in (0, 1)]
    wait_for(lambda: all(file.exists() for file in words))
    for rank, file in enumerate(words):
        verb, *given = file.read_text().splitlines()
        args = launch_arguments(given)
        assert verb == "launch"
        assert (args.machine_rank, args.num_machines, args.num_processes) == (rank, 2, 2)
        assert (args.main_process_ip, args.main_process_port // 10_000) == ("127.0.0.1", 2)
        assert (ROOT / args.config_file).name == "ddp_multi_node.yaml"
        assert args.training_script == "recipes/pretrain.py"
        assert args.training_script_args == ["--output_dir", "a folder", "--max_steps", "7"]
    assert not (tmp_path / "scontrol").exists()
    process.send_signal(signal.SIGUSR1)
    process.wait(60)
    assert (tmp_path / "stopped-0").exists() and (tmp_path / "stopped-1").exists()
    assert (tmp_path / "scontrol").read_text() == f"requeue {10_000 + os.getpid() % 10_000}\n"


def test_the_slurm_script_names_files_that_there_are():
    text = SCRIPT.read_text()
    names = set(re.findall(r"recipes/[\w/.]+\w", text))
    assert len(names) > 3
    for name in names:
        assert (ROOT / name).is_file(), name


@pytest.mark.slow
def test_two_machines_stop_at_the_signal_and_the_next_job_goes_on(slurm, tmp_path, corpus_dir, cache_dir):
    """Both are this one; the launchers are real."""
    output_dir = tmp_path / "run"
    options = TINY | {"train_file": corpus_dir, "cache_dir": cache_dir, "output_dir": output_dir}
    options |= {"max_steps": 400, "save_steps": 400, "eval_steps": 400, "per_device_train_batch_size": 4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = slurm(*words)
    wait_for(lambda: (output_dir / "metrics.jsonl").exists() and metrics_of(output_dir, "train_loss"))
    process.send_signal(signal.SIGUSR1)
    process.wait(120)
    assert (tmp_path / "scontrol").read_text().startswith("requeue")
    done = len(metrics_of(output_dir, "train_loss"))
    assert (output_dir / f"checkpoint-{done}" / "complete.json").exists()
    assert 0 < done < 400

    (tmp_path / "scontrol").unlink()
    assert slurm(*words).wait(240) == 0
    assert not (tmp_path / "scontrol").exists()
    lines = metrics_of(output_dir, "train_loss")
    assert [line["step"] for line in lines] == list(range(1, 401))
    assert lines[-1]["tokens_seen"] == 400 * 2 * 4 * 32
