"""A pre-training run from its options to its results: prepare, say what it costs, train, hand over."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from transformers import BertConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from bert_ln import BertLnConfig, BertLnForMaskedLM
from recipes import console, sharding
from recipes.arguments import PretrainingArguments, model_config
from recipes.batches import BlockReader, TrainingBatches
from recipes.budget import peak_of
from recipes.checkpointing import (
    NotWritten,
    TrainState,
    find_checkpoint,
    is_complete,
    prune,
    save_checkpoint,
    step_of,
    write_final_model,
    written_or_removed,
)
from recipes.diagnosis import Diverged, diagnose, last_diagnosis
from recipes.dropout import cheapen_dropout
from recipes.errors import Failure, UserError
from recipes.fast_paths import choose_attention, compile_regions, keep_memory
from recipes.files import FolderLock, is_aside, write_json, write_text
from recipes.hub_access import (
    cached_checkpoint,
    check_access,
    check_same_on_hub,
    fetch_checkpoint,
    is_reference,
    step_of_checkpoint,
)
from recipes.hub_queue import read_status
from recipes.launch import (
    check_num_processes,
    choose_precision,
    describe_hardware,
    failures,
    set_threads,
)
from recipes.loss_figure import FIGURE, draw_loss
from recipes.masking import Masker
from recipes.model_card import model_card
from recipes.optimization import build_optimizer
from recipes.preparation import prepare_data
from recipes.publishing import Publisher, default_repository
from recipes.run_record import Metrics, check_same_run, describe_run, differences
from recipes.sampling import Samples
from recipes.stages import Stage, block_lengths, build_stages, remaining_tokens
from recipes.stopping import Stopped, StopRequest
from recipes.token_store import unigram_cross_entropy
from recipes.tracking import Tracker, check_tracker
from recipes.training import NotFinite, Trainer
from recipes.validation import Validation

# Figures of the last validation among the results; None where the run diverged.
RESULTS = ("validation_loss", "validation_accuracy", "below_unigram_cross_entropy")
# What the loop was built for; of FSDP the second (`sharding.check_launcher`).
DISTRIBUTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
)


def pretrain(args: PretrainingArguments) -> None:
    """Train, or continue, or report on, the run that `args` describes.

    Raises:
        UserError: Anything that is wrong with the options, the data or the output folder.
        Diverged: The loss was no number; said so in run.json, and no final model is written.
        Stopped: A signal or `max_train_time` ended it; a checkpoint is saved where training had begun.
        Failure: The disk or another process does not do its work any more.
    """
    transformers_logging.disable_progress_bar()  # a bar for each saved checkpoint
    stop, threads = StopRequest(args.max_train_time), set_threads()
    # While processes look for each other a signal must end them as ever: no handler of ours would be called.
    accelerator = _build_accelerator(args)
    if accelerator.device.type == "cpu":
        threads += f"; {keep_memory()}"
    stop.connect(accelerator, args.ddp_timeout)
    with stop.watching():
        check_num_processes(accelerator.num_processes, args.num_processes)
        run = Run(args, accelerator, build_stages(args), stop)
        with run.lock, failures(accelerator):
            run.check_output_dir()
            run.check_hub()
            run.prepare()
            if run.show_finished():
                accelerator.wait_for_everyone()
                stop.disconnect()
                return
            run.build()
            run.resume()
            run.say_cost(threads)
            run.train()
            run.finish()


def _build_accelerator(args: PretrainingArguments) -> Accelerator:
    check_tracker(args.report_to)
    sharding.check_launcher()
    accelerator = Accelerator(
        # Autocast is the loop's own affair (validation runs without), whatever the launcher says.
        mixed_precision="no",
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout)),
        ],
    )
    kind = accelerator.distributed_type
    if kind not in DISTRIBUTED:
        allowed = ", ".join(kind.value for kind in DISTRIBUTED)
        raise UserError(f"the launcher's distributed_type {kind.value}: allowed: {allowed}")
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"the launcher's gradient_accumulation_steps {accelerator.gradient_accumulation_steps}: the loop "
            "divides by masked tokens itself; give --gradient_accumulation_steps to recipes/pretrain.py"
        )
    return accelerator


@dataclass
class Run:
    """One pre-training run and its folder."""

    args: PretrainingArguments
    accelerator: Accelerator
    stages: list[Stage]
    stop: StopRequest
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.args.output_dir)
        self.lock = FolderLock(self.output_dir)
        self.metrics = Metrics(self.output_dir / "metrics.jsonl")
        self.tracker = Tracker(self.args.report_to, self.accelerator, self.output_dir)
        self.publisher: Publisher | None = None  # on the main process of a run that is pushed
        self.on_hub: dict[str, Any] | None = None  # the run that its repository holds
        self.bf16, self.precision = choose_precision(self.args.bf16, self.accelerator.device)
        self.args.bf16 = self.bf16

    def print(self, *lines: str) -> None:
        """Print on the main process, at once."""
        if self.accelerator.is_main_process:
            print(*lines, sep="\n", flush=True)

    # ---------------------------------------------------------------- before training

    def check_output_dir(self) -> None:
        """Refuse a folder of another run before any work is done for this one."""
        self.record = describe_run(self.args, self.stages, self.accelerator.num_processes)
        self.found = check_same_run(self.output_dir, self.record)
        state = None if self.found is None else "results" in self.found
        _check_agreement(state, "processes found different runs; share output_dir")
        self.metrics.lines()  # a damaged file shows before any work
        if self.found and "results" not in self.found:
            self._together(self._lock)

    def _lock(self) -> None:
        """Keep other runs out of the folder, which must exist."""
        if self.accelerator.is_main_process:
            self.lock.acquire()

    def check_hub(self) -> None:
        """Ask the Hub what the run needs of it, before any work is done; a main process does."""
        if self.found is None or "results" not in self.found:
            self._together(self._ask_hub)

    def _together(self, action: Callable[[], None]) -> None:
        """Do something on this process; what is refused on one, all raise."""
        error = None
        try:
            action()
        except UserError as refusal:
            error = str(refusal)
        for refusal in gather_object([error]):
            if refusal:
                raise UserError(refusal)

    def _ask_hub(self) -> None:
        args, requested = self.args, self.args.resume_from_checkpoint
        if is_reference(requested) and self.accelerator.is_local_main_process:
            self._fetch(requested)
        if args.push_to_hub and self.accelerator.is_main_process:
            wanted = args.hub_model_id or default_repository(self.output_dir)
            access = check_access(wanted, args.hub_private_repo, self.record, self.output_dir)
            self.publisher, self.on_hub = Publisher(args, access.repo_id), access.record
            note = access.note
            if access.record and read_status(self.output_dir).repo_id != access.repo_id:
                note = f"{access.repo_id} holds this run already: its revisions are replaced one by one"
            self.print(*([f"{'hub':<12}{note}"] if note else []))

    def _fetch(self, reference: str) -> None:
        """Bring a checkpoint from the Hub, which need not answer where there is one here already."""
        try:
            note = fetch_checkpoint("resume_from_checkpoint", reference)
        except UserError as error:
            if find_checkpoint(self.output_dir, None)[0] is None:
                raise
            note = str(error)
        self.print(*([f"{'hub':<12}{note}"] if note else []))

    def _check_on_hub(self) -> None:
        """The run that the repository holds, now that the data are known."""
        if self.on_hub:
            check_same_on_hub(self.publisher.repo_id, self.record, self.on_hub)

    def prepare(self) -> None:
        """Tokenizer, token stores, validation blocks, and the description of the run."""
        args, accelerator = self.args, self.accelerator
        self.data = prepare_data(args, self.stages, accelerator)
        for store in self.data.stores:
            for length in block_lengths(args, self.stages):
                store.check(length)
        self.masker = Masker(self.data.tokenizer, args)
        reader = BlockReader(self.data.stores, "validation", self.masker)
        self.validation = Validation(reader, args.max_seq_length, args.max_eval_samples)
        self.unigram_cross_entropy = unigram_cross_entropy(
            self.data.stores, self.data.tokenizer.all_special_ids, self.data.weights
        )
        self.config = model_config(
            args,
            vocab_size=self._vocab_size(),
            pad_token_id=self.data.tokenizer.pad_token_id,
        )
        self.record = describe_run(
            args,
            self.stages,
            accelerator.num_processes,
            **self.data.fingerprints(),
            mask_fingerprint=self.validation.mask_fingerprint,
            unigram_cross_entropy=self.unigram_cross_entropy,
            model_config=_architecture(self.config),
        )
        # Folders that are not shared between machines would show here.
        identity = [self.data.fingerprints(), self.validation.mask_fingerprint]
        _check_agreement(identity, "the prepared data differs between processes; share cache_dir")
        self.found = check_same_run(self.output_dir, self.record)
        self._together(self._check_on_hub)

    def _vocab_size(self) -> int:
        """Rows of the embedding: the tokenizer's, or more where it was loaded and more were asked for."""
        asked, needed = self.args.vocab_size, len(self.data.tokenizer)
        if asked is None or not (self.args.tokenizer_name or self.args.token_store):
            return needed  # a small text may give a smaller vocabulary than was asked for
        if asked < needed:
            raise UserError(f"vocab_size {asked}: the tokenizer has {needed} entries; give at least as many")
        return asked

    def show_finished(self) -> bool:
        """Where the run is finished already, print its results and say so."""
        if self.found is None or "results" not in self.found:
            return False
        results = self.found["results"]
        if results["validation_loss"] is None:
            raise Diverged(console.diverged_line(self.output_dir, results["step"]))
        self.print(f"{self.output_dir} holds this run, finished: nothing to do.")
        self.print(*console.queue_lines(self.output_dir))
        self.print(*console.results_lines(self.output_dir, results))
        return True

    def build(self) -> None:
        """Model, optimiser and batches, as Accelerate wants them."""
        args, accelerator = self.args, self.accelerator
        set_seed(args.seed)
        self.model = build_model(args, self.config, accelerator.device)
        if args.torch_compile:
            compile_regions(self.model)
        if is_sharded := sharding.is_wanted():
            sharding.shard(self.model, accelerator)
        optimizer = build_optimizer(self.model, args)
        if is_sharded:
            wrapped, optimizer = self.model, accelerator.prepare_optimizer(optimizer)
        else:
            wrapped, optimizer = accelerator.prepare(self.model, optimizer)
        self.peak = peak_of(accelerator.device, self.bf16)
        self.record["parameters"] = sum(p.numel() for p in self.model.parameters())
        self.record["attention"] = self.model.config._attn_implementation
        self.record["hardware"] = describe_hardware(accelerator.device, accelerator.num_processes)
        batches = TrainingBatches(
            self.data.stores,
            self.data.weights,
            self.masker,
            args,
            self.stages,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.samples_per_epoch = batches.orders[0].samples_per_epoch
        self.trainer = Trainer(
            args,
            accelerator,
            wrapped,
            self.model,
            optimizer,
            batches,
            self.stages,
            self.peak,
            self.bf16,
            report=self._report,
            evaluate=self._evaluate,
            save=self._save,
            report_skipped=self._report_skipped,
            stop=self.stop,
        )

    def resume(self) -> None:
        """Put the newest complete checkpoint in place, if there is one."""
        self._together(self._make_output_dir)
        requested = self.args.resume_from_checkpoint
        if is_reference(requested):
            requested = self._newer_of_hub(requested)
        folder, passed_over = find_checkpoint(self.output_dir, requested)
        self.print(*passed_over)
        if folder is None:
            if requested or self.found:
                self.print(f"No complete checkpoint in {self.output_dir}: starting from the beginning.")
        else:
            self._check_checkpoint(folder)
            self.trainer.state = self._load(folder)
            self.print(f"Continuing from {folder}.")
        step = self.trainer.state.step
        _check_agreement(step, "processes found different checkpoints; share output_dir")
        if self.accelerator.is_main_process:
            write_json(self.output_dir / "run.json", self.record)
            if folder is not None and folder.parent != self.output_dir:
                self.metrics.continue_from(folder.parent / "metrics.jsonl", step)
            self.metrics.cut_back(step)
            self.validation.save(self.output_dir / "validation_masks.safetensors")
            if self.publisher:
                self.publisher.resume(folder)
        self.tracker.start(self.args.to_dict(), self.metrics, step)

    def _make_output_dir(self) -> None:
        """Take the folder, unless another run has taken it since it was looked at."""
        if self.accelerator.is_main_process:
            self.lock.acquire()
            check_same_run(self.output_dir, self.record)
            for file in filter(is_aside, self.output_dir.iterdir()):  # of a process that was killed
                file.unlink()

    def _newer_of_hub(self, reference: str) -> str | None:
        """The checkpoint from the Hub, or None where the folder has one that is as new."""
        here, _ = find_checkpoint(self.output_dir, None)
        there = cached_checkpoint("resume_from_checkpoint", reference)
        if here and (there is None or step_of(here) >= step_of_checkpoint(there)):
            self.print(f"{reference} is passed over: {here} is as new or newer.")
            return None
        if there is None:
            raise UserError(f"resume_from_checkpoint {reference}: not on this machine; share HF_HOME")
        return str(there)

    def _check_checkpoint(self, folder: Path) -> None:
        try:
            different = differences(self.record, json.loads((folder / "trainer" / "run.json").read_text()))
        except (ValueError, KeyError, TypeError, AttributeError):
            different = ["its run.json is not readable"]
        if different:
            raise UserError(
                f"resume_from_checkpoint {folder}: is of a different run ({'; '.join(different)})"
            )

    def say_cost(self, threads: str) -> None:
        """One screen: what is about to happen and what it will take."""
        self.print(*console.cost_screen(self, threads))

    # ---------------------------------------------------------------- during training

    def train(self) -> None:
        """The loop, until it has come to its end, has diverged, or is asked to stop."""
        with self.stop.deferred():
            while True:
                try:
                    self._train()
                    break
                except NotFinite as error:
                    if not self._roll_back(error.step):
                        self._end_diverged()
                        step = self.trainer.state.step
                        raise Diverged(console.diverged_line(self.output_dir, step)) from error
            if self.stop.agreed:
                self._end_stopped()

    def _train(self) -> None:
        trainer = self.trainer
        if self._owes_validation():
            self._evaluate(trainer.state)
        if trainer.state.step == self.args.max_steps and not self.stop.agreed:
            last = self.output_dir / f"checkpoint-{self.args.max_steps}"
            if not broadcast_object_list([is_complete(last)])[0]:
                self._save(trainer.state)  # it came from elsewhere
        if not self.stop.agreed:
            trainer.train()

    def _owes_validation(self) -> bool:
        """Whether the run was stopped after an update that is validated, before it was."""
        step = self.trainer.state.step
        measured = [line["step"] for line in self.metrics.lines() if "validation_loss" in line]
        owes = step > 0 and self.trainer.is_due(self.args.eval_steps) and step not in measured
        return broadcast_object_list([owes])[0]  # as the main process sees the file

    def _roll_back(self, step: int) -> bool:
        """Go back to the newest checkpoint, and on with the data after update `step`, if that is possible.

        Nothing in it depends on where the run was interrupted, or on when the update was noticed.
        """
        args, state, batches = self.args, self.trainer.state, self.trainer.batches
        too_many = state.nonfinite_updates > args.max_nonfinite_updates
        if args.nonfinite_update != "rollback" or too_many:
            return False
        # As the main process sees the folder.
        found, _ = find_checkpoint(self.output_dir, None, only_scheduled=True)
        folder = broadcast_object_list([found])[0]
        if folder is None:
            return False
        blocks = _blocks(batches.samples(step - 1))
        earlier = self._load(folder)
        earlier.nonfinite_updates = state.nonfinite_updates
        earlier.data_offset = state.data_offset + step - earlier.step
        self.trainer.state = earlier
        self.stop.reason = None  # asked for again after an update: a step back is no progress
        self.print(console.skipped_line(step, blocks), f"{'':<14}going back to {folder}, on with other data")
        if self.accelerator.is_main_process:
            self.metrics.cut_back(earlier.step)
        line = {"step": earlier.step + 1, "rolled_back_from": step, "data_offset": earlier.data_offset}
        line["nonfinite_updates"] = earlier.nonfinite_updates
        self._record(line | {"corpus_block_epoch": blocks})
        return True

    def _report_skipped(self, steps: list[int]) -> None:
        """Say and record which updates were not made, and on which blocks."""
        for step in steps:
            blocks = _blocks(self.trainer.batches.samples(step - 1))
            self.print(console.skipped_line(step, blocks))
            self._record({"step": step, "skipped": "not finite", "corpus_block_epoch": blocks})

    def _end_stopped(self) -> None:
        """Leave after a checkpoint has been saved; what is not pushed yet stays queued."""
        self.accelerator.wait_for_everyone()
        self.stop.disconnect()
        self.tracker.finish()
        raise Stopped(self.stop.reason, self.trainer.state.step)

    def _end_diverged(self) -> None:
        """Record that training ended without a number; the checkpoints before it stay."""
        if self.accelerator.is_main_process:
            before, _ = last_diagnosis(self.metrics.lines())
            if before != "diverged":
                self.metrics.append({"step": self.trainer.state.step, "diagnosis": "diverged"})
            results = self._results() | dict.fromkeys(RESULTS)
            write_json(self.output_dir / "run.json", self.record | {"results": results})
        self._leave()

    def _report(self, line: dict[str, Any]) -> None:
        line["below_unigram_cross_entropy"] = self.unigram_cross_entropy - line["train_loss"]
        tokens = remaining_tokens(self.stages, self.accelerator.num_processes, line["step"])
        self.print(console.training_line(line, self.args.max_steps, tokens))
        self._record(line)

    def _evaluate(self, state: TrainState) -> None:
        began = time.perf_counter()
        values = self._validate()
        if values is None:  # asked to stop meanwhile
            return
        values["validation_seconds"] = time.perf_counter() - began
        self.print(console.validation_line(state.step, values, self.unigram_cross_entropy))
        below = self.unigram_cross_entropy - values["validation_loss"]
        self._record({"step": state.step, **values, "below_unigram_cross_entropy": below})
        if not math.isfinite(values["validation_loss"]):  # the same on every process
            state.nonfinite_updates += 1
            raise NotFinite(state.step)
        if self.accelerator.is_main_process:
            self._notice(state.step)

    def _notice(self, step: int) -> None:
        """Say and record it when what the losses show has changed."""
        lines = self.metrics.lines()
        before, _ = last_diagnosis(lines)
        now = diagnose(lines, self.unigram_cross_entropy, self.args.max_steps, self.args.warmup_steps)
        if now != before:
            self.print(console.notice_line(step, now, before))
            self.metrics.append({"step": step, "diagnosis": now})

    def _validate(self) -> dict[str, Any] | None:
        batch_size = self.args.per_device_eval_batch_size
        return self.validation(self.model, self.accelerator, batch_size, cut_short=self.stop.is_urgent)

    def _record(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.metrics.append(line)
        self.tracker.log(line)

    def _load(self, folder: Path) -> TrainState:
        return sharding.load(folder, self.model, self.trainer.optimizer, self.args)

    def _whole(self) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
        """Model and optimiser as the main process writes them; every process takes part."""
        is_main = self.accelerator.is_main_process
        return sharding.gathered(self.model, self.trainer.optimizer, self.args, keep=is_main)

    def _save(self, state: TrainState) -> None:
        model, optimizer = self._whole()
        if not self.accelerator.is_main_process:
            return
        try:
            folder = self._write_checkpoint(state, model, optimizer)
        except NotWritten as error:
            words = f"step {state.step:>7,}  {self.output_dir}: checkpoint not saved ({error})"
            if state.step == self.args.max_steps or self.stop.agreed:
                raise Failure(f"{words}; mend it, and the same command continues") from error
            self.print(f"{words}; training goes on, and the next one is tried")
            return
        self.print(f"step {state.step:>7,}  saved {folder}")
        if self.publisher:
            self.publisher.save(folder)
        try:
            prune(self.output_dir, self.args.save_total_limit, newest=state.step)
        except OSError as error:
            self.print(f"step {state.step:>7,}  an old checkpoint cannot be deleted ({error})")

    def _write_checkpoint(
        self, state: TrainState, model: PreTrainedModel, optimizer: torch.optim.Optimizer
    ) -> Path:
        with written_or_removed():
            self.metrics.sync()  # a checkpoint never knows more than the file
        scheduled = self.trainer.is_due(self.args.save_steps)
        folder, tokenizer = self.output_dir, self.data.tokenizer
        return save_checkpoint(folder, state, model, tokenizer, optimizer, self.record, scheduled)

    # ---------------------------------------------------------------- after training

    def finish(self) -> None:
        """The final model in the folder itself, its card, the results, and what to do next."""
        model, _ = self._whole()
        if self.accelerator.is_main_process:
            results = self._results()
            write_final_model(self.output_dir, model, self.data.tokenizer)
            has_figure = draw_loss(self.metrics.lines(), self.output_dir / FIGURE)
            name = self.publisher.repo_id if self.publisher else default_repository(self.output_dir)
            card = model_card(name.split("/")[-1], self.record, results, has_figure)
            write_text(self.output_dir / "README.md", card)
            if self.publisher:
                self.publisher.finish(results)
            write_json(self.output_dir / "run.json", self.record | {"results": results})
            self.print(*console.results_lines(self.output_dir, results))
        self._leave()

    def _leave(self) -> None:
        """End together, then wait for the last push alone."""
        # A process that leaves while another still talks to it makes that one crash.
        self.accelerator.wait_for_everyone()
        self.stop.disconnect()
        self.tracker.finish()
        if self.publisher:
            self.publisher.wait()

    def _results(self) -> dict[str, Any]:
        """What was measured last, and what it took."""
        state, lines = self.trainer.state, self.metrics.lines()
        validations = [line for line in lines if "validation_loss" in line]
        diagnosis, since = last_diagnosis(lines)
        return {
            "step": state.step,
            **{name: validations[-1][name] if validations else None for name in RESULTS},
            "tokens_seen": state.tokens_seen,
            "elapsed_seconds": state.elapsed_seconds,
            "validation_seconds": sum(line.get("validation_seconds", 0.0) for line in validations),
            "nonfinite_updates": state.nonfinite_updates,
            "diagnosis": diagnosis,
            "diagnosis_step": since,
        }


def build_model(args: PretrainingArguments, config: BertLnConfig, device: torch.device) -> PreTrainedModel:
    """A freshly initialised model in float32, set up for training on `device`, where it is not yet."""
    length = max(stage.max_seq_length for stage in build_stages(args))
    has_mask = args.isolate_documents or config.attention_window is not None
    kernel, _ = choose_attention(args.attn_implementation, device, args.bf16, length, has_mask)
    config._attn_implementation = kernel
    model = BertLnForMaskedLM(config)
    model.config.sparse_prediction = True
    if device.type == "cpu":
        cheapen_dropout(model, has_mask)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def _blocks(samples: Samples) -> list[list[int]]:
    """Corpus, block and epoch of each sample."""
    return np.stack([samples.corpus, samples.block, samples.epoch], axis=1).tolist()


def _check_agreement(value: Any, otherwise: str) -> None:
    """Raise on every process unless `value` is the same on all."""
    values = gather_object([json.dumps(value, sort_keys=True)])
    if len(set(values)) > 1:
        raise UserError(otherwise)


def _architecture(config: BertLnConfig) -> dict[str, Any]:
    """The fields that say what the model computes."""
    names = [*BertConfig.__annotations__, *BertLnConfig.__annotations__]
    return {name: getattr(config, name) for name in names if name != "sparse_prediction"}
