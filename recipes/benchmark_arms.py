"""One way of training, measured in a process of its own: tokens a second, peak memory, the ceiling beside."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertEmbeddings

from bert_ln import BertLnForMaskedLM
from recipes.arguments import PretrainingArguments, model_config
from recipes.batches import Batch, TrainingBatches, with_all_positions
from recipes.budget import Peak, matmul_rate, training_flops
from recipes.command_line import build_arguments
from recipes.dropout import restore_dropout
from recipes.fast_paths import compile_regions, keep_memory
from recipes.launch import choose_precision, set_threads
from recipes.masking import Masker
from recipes.optimization import build_optimizer
from recipes.preparation import PreparedData, prepare_data
from recipes.pretraining import build_model
from recipes.stages import build_stages
from recipes.stock_recipe import train_stock
from recipes.training import Trainer

WARM_UP, LEAST_UPDATES = 2, 3


@dataclass(frozen=True)
class Arm:
    """A way of training: stock or ours, options unlike the benchmark's, and what is switched off."""

    name: str
    kind: str = "ours"
    """`ours` or `stock` (as they come), and words behind: `compiled`; for stock also `bf16` and `eager`."""
    options: dict[str, Any] = field(default_factory=dict)
    without: str | None = None
    """cheap_dropout, keep_memory, narrow_layer, shared_embeddings or sparse_head."""


class Clock:
    """Times updates; in the place of the `StopRequest` of our loop, which it ends."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.marks, self.agreed = seconds, [], False

    def ask(self) -> None:
        """Before an update: nothing."""

    def answer(self) -> bool:
        """After an update: note the time; return whether it is enough."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        timed = self.marks[WARM_UP - 1 :]
        is_enough = len(timed) > LEAST_UPDATES and timed[-1] - timed[0] > self.seconds
        self.agreed = broadcast_object_list([is_enough])[0]  # all processes end together
        return self.agreed

    @property
    def seconds_per_update(self) -> float:
        """The mean, without the first updates."""
        timed = self.marks[WARM_UP - 1 :]
        return (timed[-1] - timed[0]) / (len(timed) - 1)


def measure(arm: Arm, options: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Train for `seconds` after the first updates, on blocks that are in the cache already.

    Returns:
        tokens_per_second of all processes; of this one mfu (of the operations that the arm's model needs, by
        the mean of the bf16 ceilings just before and just after), ceiling in FLOP/s, peak_bytes above the
        process before there was a model, and updates that were made.
    """
    set_threads()
    args = build_arguments(options | arm.options)
    accelerator = Accelerator(mixed_precision="bf16" if "bf16" in arm.kind else "no")
    data = prepare_data(args, build_stages(args), accelerator)
    device, clock, is_ours = accelerator.device, Clock(seconds), arm.kind.startswith("ours")
    ceilings = [ceiling(device)]
    before = _begin_peak(device)
    torch.manual_seed(args.seed)
    if is_ours:
        train_ours(args, data, accelerator, clock, arm)
    else:
        switches = arm.kind.split()
        train_stock(args, data.tokenizer, data.stores[0], accelerator, switches, lambda _: clock.answer())
    peak_bytes = _peak(device) - before
    ceilings.append(ceiling(device))
    mean_ceiling = sum(ceilings) / 2
    tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.max_seq_length
    rate = tokens * accelerator.num_processes / clock.seconds_per_update
    # The stock head works everywhere, and so does its last layer.
    share = args.mlm_probability if is_ours and arm.without != "sparse_head" else 1.0
    flops = training_flops(_config(args), args.max_seq_length, share)
    return {
        "tokens_per_second": rate,
        "mfu": rate / accelerator.num_processes * flops / mean_ceiling,
        "ceiling": mean_ceiling,
        "peak_bytes": peak_bytes,
        "updates": len(clock.marks),
    }


def ceiling(device: torch.device) -> float:
    """What a bf16 matrix product that is large enough for the device reaches now, in FLOP/s."""
    return matmul_rate(device, torch.bfloat16, 8192 if device.type == "cuda" else 1024)


def _config(args: PretrainingArguments) -> Any:
    return model_config(args, vocab_size=args.vocab_size, pad_token_id=0)


def train_ours(
    args: PretrainingArguments,
    data: PreparedData,
    accelerator: Accelerator,
    stop: Any,
    arm: Arm = Arm("ours"),
    evaluate: Callable[[PreTrainedModel], None] = lambda model: None,
) -> BertLnForMaskedLM:
    """The recipe's own loop, data and all, without what `arm` switches off; returns the model.

    `stop` has the methods of a `StopRequest` that the loop calls, and ends it; `evaluate` is called every
    `eval_steps`.
    """
    if arm.without != "keep_memory":
        keep_memory()
    args.bf16, _ = choose_precision(args.bf16, accelerator.device)
    model = build_model(args, _config(args), accelerator.device)
    _switch_off(arm.without, model)
    if args.torch_compile or "compiled" in arm.kind:
        compile_regions(model)
    optimizer = build_optimizer(model, args)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    stages = build_stages(args)
    masker, place = Masker(data.tokenizer, args), (accelerator.process_index, accelerator.num_processes)
    batches = TrainingBatches(data.stores, data.weights, masker, args, stages, *place)
    if arm.without == "sparse_head":
        batches = DenseBatches(batches)
    calls = {
        "report": lambda line: None,
        "evaluate": lambda state: evaluate(model),
        "save": lambda state: None,
    }
    peak = Peak(1.0, "not asked for")
    Trainer(
        args, accelerator, wrapped, model, optimizer, batches, stages, peak, args.bf16, **calls, stop=stop
    ).train()
    return model


def _switch_off(what: str | None, model: BertLnForMaskedLM) -> None:
    if what == "narrow_layer":
        model._needs_all_positions = lambda asked: True
    if what == "shared_embeddings":
        embeddings = model.bert.embeddings
        embeddings.forward = MethodType(BertEmbeddings.forward, embeddings)
    if what == "cheap_dropout":
        restore_dropout(model)
    if what == "sparse_head":
        model.config.sparse_prediction = False


@dataclass
class DenseBatches:
    """The same batches with a label for every token, as the stock collator makes them."""

    batches: TrainingBatches

    def updates(self, *args: Any) -> Iterator[list[Batch]]:
        """As `TrainingBatches.updates`."""
        for micro_batches in self.batches.updates(*args):
            yield [with_all_positions(batch) for batch in micro_batches]


def _begin_peak(device: torch.device) -> int:
    """Forget the peak of memory so far, where that is possible; return what is in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")
    return psutil.Process().memory_info().rss


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])
