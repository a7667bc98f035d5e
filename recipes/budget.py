"""What training costs in floating-point operations, and how many the hardware can do."""

import math
import time
from dataclasses import dataclass

import torch

from bert_ln import BertLnConfig
from bert_ln.modeling_bert_ln import can_narrow
from recipes.stages import Stage

# Dense bf16 tensor-core peaks of the vendors' data sheets, in FLOP/s, by a part of the device's name.
BF16_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# The share of the peak that the estimate before the first step assumes.
ASSUMED_MFU = 0.4


@dataclass(frozen=True)
class Peak:
    """Operations per second that one process could do at best."""

    flops: float
    source: str


def training_flops(config: BertLnConfig, max_seq_length: int, predicted_share: float) -> float:
    """Floating-point operations of training on one token (forward and backward = 3 x forward).

    Matrix products only, 2 operations for a multiply-add. Per layer: 4 d^2 for query, key, value and output,
    2 d d_ff for the feed-forward block, 2 L d for scores and weighted sum; the head, d^2 + d V, for the
    share of tokens that is predicted, and so the last feed-forward block where other tokens do not need it.
    (Kaplan et al. 2020, "Scaling Laws", Table 1, with a sparse head.)
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    attention, feed_forward = 4 * d * d + 2 * max_seq_length * d, 2 * d * config.intermediate_size
    head = (d * d + d * config.vocab_size) * predicted_share
    spared = (1 - predicted_share) * feed_forward if can_narrow(config) else 0
    return 3 * 2 * (layers * (attention + feed_forward) - spared + head)


def total_flops(
    config: BertLnConfig, stages: list[Stage], predicted_share: float, num_processes: int, first_step: int = 0
) -> float:
    """Operations of all updates from `first_step` on, over all processes."""
    total = 0.0
    for stage in stages:
        steps = max(0, stage.first_step + stage.steps - max(first_step, stage.first_step))
        tokens = steps * stage.tokens_per_update(num_processes)
        total += tokens * training_flops(config, stage.max_seq_length, predicted_share)
    return total


def peak_of(device: torch.device, bf16: bool) -> Peak:
    """The data sheet's bf16 peak of a known GPU, else the rate of a large matrix product measured now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in BF16_PEAKS.items():
            if part in name:
                return Peak(flops, f"{name}, dense bf16 of its data sheet")
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Peak(matmul_rate(device, dtype), f"a 1024 x 1024 {dtype} matrix product, measured now")


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """The best rate of a `size` x `size` matrix product within a second, in FLOP/s."""
    # Zeros draw no random numbers.
    a = torch.zeros(size, size, device=device, dtype=dtype)
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < 1:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
