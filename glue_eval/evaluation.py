"""From options to results: read everything that can be wrong, then train what is missing, then report."""

import os
from dataclasses import dataclass
from pathlib import Path

from glue_eval.arguments import GlueArguments, describe
from glue_eval.card import update_card
from glue_eval.data import Examples, fingerprint, load_task
from glue_eval.encoding import encode_task
from glue_eval.finetuning import Job
from glue_eval.jobs import choose_device, plan_workers, run_jobs, wait_for_others
from glue_eval.models import Model, Source, find_sources, inspect_model, load_tokenizer
from glue_eval.report import result_line, screen, table_lines, write_report
from glue_eval.results import Results, summarise
from glue_eval.submission import check_folder, check_submission, write_submission
from glue_eval.tasks import TASKS, Task
from recipes.errors import UserError
from recipes.launch import check_num_processes, choose_precision


@dataclass(frozen=True)
class Data:
    """A task's splits and what identifies them."""

    task: Task
    examples: dict[str, Examples]
    fingerprint: str


def evaluate(args: GlueArguments) -> list[str]:
    """Fine-tune what was asked for and report; returns a line for each run that failed.

    Raises:
        UserError: A mistake in options, models, data or folders; before anything is trained.
    """
    bf16, precision = choose_precision(args.bf16, choose_device())
    results = Results(Path(args.output_dir))
    results.check(settings := describe(args) | {"bf16": bf16, "data": {}})
    results.all()  # a damaged file shows before training
    sources = find_sources(args)
    _check_targets(args, sources)
    data = read_data(args)
    settings["data"] = {name: each.fingerprint for name, each in data.items()}
    results.check(settings)
    models = [inspect_model(source, args.tasks[0], args.max_seq_length) for source in sources]
    jobs = plan_jobs(args, models, data, bf16)
    workers = plan_workers(jobs, args.parallel_runs)
    check_num_processes(workers.world_size, None)
    missing = [job for job in jobs if not results.has(job, args.save_model)]
    again = sum(results.file(job).exists() for job in missing)
    if workers.rank == 0:
        print(*screen(models, jobs, missing, again, precision, workers, args), "", sep="\n")
        results.begin(settings)
    failed = run_jobs(jobs, workers, results, args.save_model, result_line)
    if workers.rank == 0:
        if workers.world_size > 1 and not failed:
            wait_for_others(jobs, results, args.save_model)
        finish(args, results, jobs, complete=not failed)
    return failed


def _check_targets(args: GlueArguments, sources: list[Source]) -> None:
    """Refuse a card or a submission that could not be written in the end."""
    for source in sources if args.update_model_card else ():
        if not (Path(source.path).is_dir() and os.access(source.path, os.W_OK)):
            raise UserError(f"update_model_card: {source.where} is no folder that can be written to")
    if args.submission:
        check_folder(Path(args.submission), args.tasks)


def read_data(args: GlueArguments) -> dict[str, Data]:
    """The splits that are needed, read and checked."""
    data = {}
    for task in args.tasks:
        splits = ["train", *task.validation] if task.metrics else []
        splits += list(task.files) if args.submission else []
        examples = load_task(task, args.data_dir, splits, args.allow_other_sizes)
        labelled = {name: rows for name, rows in examples.items() if name not in task.files}
        data[task.name] = Data(task, examples, fingerprint(labelled or examples))
    return data


def plan_jobs(args: GlueArguments, models: list[Model], data: dict[str, Data], bf16: bool) -> list[Job]:
    """Every run that was asked for: model, task, setting, seed."""
    jobs = []
    for model in models:
        folders = {name: _encode(args, model, each) for name, each in data.items()}
        for task in (task for task in args.tasks if task.metrics):
            common = {
                "task": task,
                "model": model,
                "data": folders[task.name],
                "train_examples": len(data[task.name].examples["train"].labels),
                "bf16": bf16,
                "load_best_model_at_end": args.load_best_model_at_end,
                "predicted": _predicted(args, task, folders),
            }
            jobs += [
                Job(setting=setting, seed=seed, **common)
                for setting in args.settings()
                for seed in range(1, args.seeds + 1)
            ]
    return jobs


def _encode(args: GlueArguments, model: Model, data: Data) -> Path:
    tokenizer = load_tokenizer(model.source)
    # The splits that are there decide the contents of the folder, so they are part of what it is.
    identity = fingerprint(data.examples) + "-".join(sorted(data.examples))
    return encode_task(
        data.examples, identity, tokenizer, model.max_length, model.token_types, args.cache_dir
    )


def _predicted(args: GlueArguments, task: Task, folders: dict[str, Path]) -> dict[str, Path]:
    """Unlabelled splits that a run of this task predicts: its own, and for MNLI the diagnostic set's."""
    if not args.submission:
        return {}
    names = [task.name, *(["ax"] if task.name == "mnli" and "ax" in folders else [])]
    return {f"{name}/{split}": folders[name] for name in names for split in TASKS[name].files}


def finish(args: GlueArguments, results: Results, jobs: list[Job], complete: bool) -> None:
    """Everything that follows from the finished runs: tables, figures; card and submission of all of them."""
    asked = [results.read(file) for job in jobs if (file := results.file(job)).exists()]
    print("", *table_lines(summarise(asked)), sep="\n")
    for file in write_report(summarise(results.all()), results.settings(), results.output_dir):
        print(f"wrote {file}")
    if args.update_model_card and complete:
        update_cards(jobs, results)
    if args.submission and complete:
        submit(Path(args.submission), results, jobs, args.allow_other_sizes)


def update_cards(jobs: list[Job], results: Results) -> None:
    """Write each model's selected results into the card in its folder."""
    for path in dict.fromkeys(job.model.source.path for job in jobs):
        own = [results.read(results.file(job)) for job in jobs if job.model.source.path == path]
        selected = [entry for entry in summarise(own) if entry["selected"]]
        print(f"wrote {update_card(Path(path), selected)}")


def submit(folder: Path, results: Results, jobs: list[Job], other_sizes: bool) -> None:
    """Write the server's files from the run with the best validation score of each task, and check them."""
    for task in dict.fromkeys(job.task.name for job in jobs):
        own = [job for job in jobs if job.task.name == task and results.predictions(job)]
        if not own:
            print(f"{task}: every run diverged; nothing to submit")
            continue
        best = max(own, key=lambda job: _score(results, job))
        found = results.predictions(best)
        for name in dict.fromkeys(key.partition("/")[0] for key in found):
            splits = {split: found[f"{name}/{split}"] for split in TASKS[name].files}
            idx = {split: found[f"{name}/{split}/idx"] for split in TASKS[name].files}
            for file in write_submission(folder, TASKS[name], splits, idx):
                print(f"wrote {file} (of seed {best.seed}, the best on the validation split)")
    if folder.exists():
        print(*check_submission(folder, other_sizes), sep="\n")


def _score(results: Results, job: Job) -> float:
    score = results.read(results.file(job))["score"]
    return float("-inf") if score is None else score
