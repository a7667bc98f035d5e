"""What a person reads: the screen before the first step, the lines during training, and what comes next."""

import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants
from transformers import PreTrainedModel

from bert_ln.modeling_bert_ln import can_narrow
from recipes.budget import ASSUMED_MFU, total_flops
from recipes.diagnosis import CAUSES
from recipes.dropout import CheapDropout
from recipes.fast_paths import choose_attention
from recipes.hub_queue import hub_folder, pending, push_command
from recipes.hub_session import without_secrets
from recipes.sharding import is_sharded
from recipes.stages import remaining_tokens

if TYPE_CHECKING:
    from recipes.pretraining import Run


def cost_screen(run: "Run", threads: str) -> list[str]:
    """What is about to happen and what it will take."""
    args, processes, peak, v = run.args, run.accelerator.num_processes, run.peak, run.validation
    step, entropy = run.trainer.state.step, run.unigram_cross_entropy
    flops = total_flops(run.config, run.stages, args.mlm_probability, processes, step)
    seconds = flops / (peak.flops * processes * ASSUMED_MFU)
    tokens = remaining_tokens(run.stages, processes, 0)
    per_update = ", then ".join(f"{stage.tokens_per_update(processes):,}" for stage in run.stages)
    epochs = tokens / (run.samples_per_epoch * run.stages[0].max_seq_length)
    parts = ", each holds a part of the weights (FSDP2)" if is_sharded(run.model) else ""
    data = [line for store in run.data.stores for line in store.report(args.max_seq_length).splitlines()]
    return [
        f"model       {_describe_model(run.model)}",
        *(f"data        {line}" for line in data),
        f"updates     {args.max_steps:,} of {per_update} tokens = {tokens / 1e6:.1f} M tokens, "
        f"{epochs:.2f} epochs",
        f"cost        {flops:.3g} FLOP left; about {clock(seconds)} at {ASSUMED_MFU:.0%} of "
        f"{peak.flops / 1e9:,.0f} GFLOP/s ({peak.source})",
        f"processes   {processes} on {run.accelerator.device}, {threads}{parts}",
        f"precision   {run.precision}",
        f"attention   {_describe_attention(run)}",
        f"compute     {_describe_compute(run)}",
        f"validation  {v.blocks} blocks, {v.masked_tokens:,} masked tokens, masks {v.mask_fingerprint}",
        *_hub(run),
        *_notes(args.model.get("norm_placement"), args.warmup_steps),
        f"loss        expected at first ln V = {math.log(run.config.vocab_size):.2f}; "
        f"without context at best {entropy:.2f} (unigram cross-entropy)",
        "",
    ]


def _hub(run: "Run") -> list[str]:
    if run.publisher is None:
        return []
    address = f"{without_secrets(constants.ENDPOINT)}/{run.publisher.repo_id}"
    how = f"hub_strategy {run.args.hub_strategy}, at most every {run.args.hub_min_interval:g} s"
    return [f"hub         {address}, {how}, in the background"]


def _notes(norm_placement: str | None, warmup_steps: int) -> list[str]:
    if norm_placement == "post" and not warmup_steps:
        return ["note        Post-LN without warmup_steps may learn nothing but word frequencies"]
    return []


def training_line(line: dict[str, Any], max_steps: int, tokens_left: int) -> str:
    """A line of metrics.jsonl for people, with the time left."""
    return (
        f"step {line['step']:>7,}/{max_steps:,}  loss {line['train_loss']:.4f}  "
        f"lr {line['learning_rate']:.2e}  grad {line['grad_norm']:.2f}  "
        f"{line['tokens_per_second']:,.0f} tokens/s  MFU {line['mfu']:.0%}  "
        f"left {clock(tokens_left / line['tokens_per_second'])}"
    )


def validation_line(step: int, values: dict[str, Any], unigram_cross_entropy: float) -> str:
    """The validation loss beside what a model without context could reach."""
    below = _below(unigram_cross_entropy - values["validation_loss"], unigram_cross_entropy)
    return (
        f"step {step:>7,}  validation loss {values['validation_loss']:.4f}, {below}; "
        f"accuracy {values['validation_accuracy']:.1%}"
    )


def skipped_line(step: int, blocks: list[list[int]]) -> str:
    """Which update was not made for want of a finite gradient, and on what it was."""
    some = ", ".join(f"{block} of corpus {corpus}" for corpus, block, _ in blocks[:4])
    more = f" and {len(blocks) - 4} more (metrics.jsonl)" if len(blocks) > 4 else ""
    return f"step {step:>7,}  skipped: loss or gradient not finite, on blocks {some}{more}"


def notice_line(step: int, diagnosis: str | None, before: str | None) -> str:
    """What the losses show since this validation, with its known causes."""
    if diagnosis is None:
        return f"step {step:>7,}  no more {before}"
    return f"step {step:>7,}  {diagnosis}: {CAUSES[diagnosis]}"


def diverged_line(output_dir: Path, step: int) -> str:
    """Why a run without a number at its end is over."""
    return (
        f"{output_dir}: diverged; the loss or a gradient was not finite by update {step}: "
        f"{CAUSES['diverged']}. "
        "Its checkpoints are kept; start anew in another output_dir"
    )


def results_lines(output_dir: Path, results: dict[str, Any]) -> list[str]:
    """How the run ended, and what to run next."""
    below = results["below_unigram_cross_entropy"]
    share = results.get("validation_seconds", 0.0) / results["elapsed_seconds"]
    return [
        "",
        f"validation loss {results['validation_loss']:.4f} after {results['step']:,} updates and "
        f"{clock(results['elapsed_seconds'])} ({share:.1%} of it in validations): "
        f"{_below(below, results['validation_loss'] + below)}",
        f"{'model':<12}{output_dir} (from_pretrained loads it)",
        *next_commands(output_dir),
    ]


def queue_lines(output_dir: Path) -> list[str]:
    """What has not reached the Hub, and the command that sends it."""
    left = ", ".join(entry.name for entry in pending(output_dir))
    return [f"{'not pushed':<12}{left}; send it with: {push_command(output_dir)}"] if left else []


def next_commands(output_dir: Path) -> list[str]:
    """What to run next; only what there is, and no push where the run has been pushed."""
    root, binaries = Path(__file__).parent.parent, Path(sys.executable).parent
    here = Path(os.path.relpath(root))
    folder = shlex.quote(str(output_dir))
    config = "recipes/configs/bert_base_wikipedia.yaml"
    gpus = " launch --multi_gpu --num_processes 8"
    commands = [
        (
            "fine-tune",
            root / "glue_eval/run.py",
            f"{here / 'glue_eval/run.py'} --task mrpc --model_name_or_path {folder}",
        ),
        ("at scale", root / config, f"{here / 'recipes/pretrain.py'} --config {here / config}"),
        (
            "push",
            root / "recipes/hub.py",
            f"{here / 'recipes/hub.py'} push {folder} --hub_model_id YOUR_NAME/bert-ln",
        ),
    ]
    programs = {
        "fine-tune": sys.executable,
        "at scale": f"{binaries}/accelerate{gpus}",
        "push": sys.executable,
    }
    return [
        f"{name:<12}{_as_typed(programs[name])} {words}"
        for name, needed, words in commands
        if needed.exists() and not (name == "push" and hub_folder(output_dir).exists())
    ]


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, with days where there are any."""
    days, seconds = divmod(round(seconds), 86400)
    time = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{days} days {time}" if days else time


def _below(difference: float, unigram_cross_entropy: float) -> str:
    side = "below" if difference >= 0 else "above"
    return f"{abs(difference):.2f} {side} the unigram cross-entropy {unigram_cross_entropy:.2f}"


def _describe_model(model: PreTrainedModel) -> str:
    c, parameters = model.config, sum(p.numel() for p in model.parameters())
    layers = ", ".join(f"{name} {_word(value)}" for name, value in c.layers.items())
    return (
        f"{parameters / 1e6:.1f} M parameters: {c.num_hidden_layers} layers x {c.hidden_size}, "
        f"{c.num_attention_heads} heads, vocabulary {c.vocab_size}, {layers}, initializer {c.initializer}"
    )


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def _describe_compute(run: "Run") -> str:
    """What is not computed as it is written."""
    where = "head and last feed-forward block" if can_narrow(run.config) else "head"
    compiled = "layers and head compiled" if run.args.torch_compile else "not compiled"
    optim = "muon for matrices, fused adamw for the rest" if run.args.optim == "muon" else run.args.optim
    line = f"{where} at masked positions only; {compiled} (torch_compile, as you set or by default); {optim}"
    cheap = any(isinstance(module, CheapDropout) and module.p for module in run.model.modules())
    return f"{line}; dropout from 16 random bits (on a CPU)" if cheap else line


def _describe_attention(run: "Run") -> str:
    model, isolated = run.model, run.args.isolate_documents
    length = max(stage.max_seq_length for stage in run.stages)
    asked, has_mask = run.args.attn_implementation, isolated or model.config.attention_window is not None
    kernel, why = choose_attention(asked, run.accelerator.device, run.bf16, length, has_mask)
    mask = "block-diagonal mask, one block a document" if isolated else "no mask: blocks are full"
    if window := model.config.attention_window:
        what = "before" if model.config.attention_window_causal else "around"
        mask = f"a window of {window} positions {what}, global: {model.config.attention_window_global}"
        mask += ", within each document" if isolated else ""
    return f"{kernel} ({why}), {mask}"


def _as_typed(program: str) -> str:
    """The program as a user in the current folder would type it."""
    return program.removeprefix(f"{Path.cwd()}/")
