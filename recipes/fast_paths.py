"""What makes an update fast and leaves its result alone: memory that is kept, attention, compiled regions."""

import ctypes

import torch

from bert_ln import BertLnForMaskedLM

# Of glibc's malloc.h: mallopt's names for two of its parameters.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# Beyond it a matrix of scores for each head costs too much memory for what its speed is worth.
LONGEST_WITH_SCORES = 256
MOST_VARIANTS = 64


def keep_memory() -> str:
    """Keep what is freed in one update for the next; returns a few words that say whether that is so.

    Large blocks are otherwise given back to the system when they are freed, and each update pays for a fault
    on every page of its activations and gradients. Only glibc can be told; the process holds its peak.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "freed memory goes back to the system (no glibc)"
    is_told = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)
    return "freed memory is kept for the next update" if is_told else "freed memory goes back to the system"


def choose_attention(
    asked: str | None, device: torch.device, bf16: bool | None, max_seq_length: int, has_mask: bool
) -> tuple[str, str]:
    """The attention kernel, one of `attn_implementation`, and why.

    In bfloat16 on a CPU, PyTorch's fused kernel (sdpa) reaches a fraction of the rate of the two plain matrix
    products (eager): docs/results/speed.md. With a mask the plain way would compute in float32.
    """
    if asked is not None:
        return asked, "as you set"
    if device.type == "cpu" and bf16 and not has_mask and max_seq_length <= LONGEST_WITH_SCORES:
        return "eager", f"faster than sdpa in bfloat16 on a CPU up to length {LONGEST_WITH_SCORES}"
    return "sdpa", "PyTorch's fused kernel"


def compile_regions(model: BertLnForMaskedLM) -> None:
    """Compile each layer, and the head with its loss, in place.

    Layers that are alike share what is compiled, so that the time it takes does not grow with their number;
    the rest of the model is a look-up of embeddings. Shapes change only from stage to stage: each is compiled
    as it is.
    """
    # All layers count as one function: its variants are the stages, and the layers that differ.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    for layer in model.bert.encoder.layer:
        layer.compile(dynamic=False)
    model.score = torch.compile(model.score, dynamic=False)
