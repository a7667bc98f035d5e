"""Predictions of recipes/estimate.py beside published runs: python -m tests.published_runs [FIGURE.png]

Without a figure's name nothing is written.
"""

import sys
from dataclasses import dataclass

from recipes.budget import ASSUMED_MFU
from recipes.cost_model import update_of
from recipes.estimate import estimate, parse

LARGE = "--num_hidden_layers 24 --hidden_size 1024 --num_attention_heads 16 --intermediate_size 4096"
# Pairs of sequences packed into a block of 512: 156.7 M sequences in 78.4 M blocks.
PACKED = 512 * 78.4 / 156.7
MLPERF = f"{LARGE} --max_seq_length 512 --per_device_train_batch_size 48 --global_batch_size"
NVIDIA = f"{LARGE} --per_device_train_batch_size 32 --hardware a100 --global_batch_size"


@dataclass(frozen=True)
class Run:
    """What was published, and the options that describe it."""

    name: str
    options: str
    devices: int
    tokens_per_second: float
    """On all devices; those of a block's padding too, where the publication counts them."""
    like: str | None = None
    """The run whose MFU, as it was published, is taken for one device."""

    def estimate(self):
        """At the MFU that is assumed."""
        return estimate(
            *parse(["--stages", "none", "--max_steps", "1000", *self.options.split()]), self.devices
        )

    def predict(self, mfu=ASSUMED_MFU):
        """Tokens per second."""
        return speed(self.estimate(), mfu)

    def mfu(self):
        """With which the prediction is what was published."""
        e, low, high = self.estimate(), 0.0, 1.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            seconds = update_of(e.model, e.plans[0], e.hardware, middle).seconds
            low, high = (
                (middle, high) if e.plans[0].tokens / seconds < self.tokens_per_second else (low, middle)
            )
        return high


def speed(e, mfu):
    return e.plans[0].tokens / update_of(e.model, e.plans[0], e.hardware, mfu).seconds


MLPERF_8, NVIDIA_128, NVIDIA_512 = "MLPerf v3.1, 8 x H100", "NVIDIA, 1 x A100, 128", "NVIDIA, 1 x A100, 512"
RUNS = [
    # training_results_v3.1: throughput and configuration of each submission.
    Run(MLPERF_8, f"{MLPERF} 384", 8, 7_832 * PACKED),
    Run("MLPerf v3.1, 64 x H100", f"{MLPERF} 2304", 64, 53_541 * PACKED, like=MLPERF_8),
    Run("MLPerf v3.1, 3,472 x H100", f"{MLPERF} 6944", 3472, 759_000 * PACKED, like=MLPERF_8),
    Run("MLPerf v5.0, 8 x H200", f"{MLPERF} 384 --hardware h200", 8, 8_125 * PACKED, like=MLPERF_8),
    # NVIDIA/DeepLearningExamples, README: an A100, and eight with as much for each.
    Run(NVIDIA_128, f"{NVIDIA} 8192 --max_seq_length 128", 1, 580 * 128),
    Run("NVIDIA, 8 x A100, 128", f"{NVIDIA} 65536 --max_seq_length 128", 8, 4_591 * 128, like=NVIDIA_128),
    Run(NVIDIA_512, f"{NVIDIA} 4096 --max_seq_length 512", 1, 210 * 512),
    Run("NVIDIA, 8 x A100, 512", f"{NVIDIA} 32768 --max_seq_length 512", 8, 1_657 * 512, like=NVIDIA_512),
    # mosaicml/examples: 286.72 M samples in 11.5 hours.
    Run(
        "BERT-base of transformers as run by MosaicML, 8 x A100",
        "--hardware a100 --global_batch_size 4096 --max_seq_length 128 --per_device_train_batch_size 128",
        8,
        286.72e6 * 128 / (11.5 * 3600),
    ),
]


def table():
    """A row each, in Markdown."""
    mfus = {run.name: run.mfu() for run in RUNS if run.like is None}
    yield "| run | tokens/s, published | at 40 % MFU | ratio | at its own MFU | ratio |"
    yield "|---|---|---|---|---|---|"
    for run in RUNS:
        assumed, mfu = run.predict(), mfus[run.like or run.name]
        row = f"| {run.name} | {run.tokens_per_second:,.0f} | {assumed:,.0f} | "
        row += f"{assumed / run.tokens_per_second:.2f} | "
        if run.like is None:
            yield row + f"{mfu:.1%} makes it so | |"
        else:
            found = run.predict(mfu)
            yield row + f"{found:,.0f} at {mfu:.1%} | {found / run.tokens_per_second:.2f} |"


def draw(file):
    """Speed of BERT-base and BERT-large on 1 to 1,024 H100, length 128, by global batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    for axes, (name, options) in zip(figure.subplots(1, 2), (("BERT-base", ""), ("BERT-large", LARGE))):
        for blocks in (256, 1024, 4096, 16384):
            numbers = [2**i for i in range(11) if 2**i <= blocks]
            words = f"{options} --global_batch_size {blocks} --max_seq_length 128"
            rates = [Run("", words, n, 0).predict() for n in numbers]
            axes.plot(
                numbers, [rate / n / rates[0] for n, rate in zip(numbers, rates)], marker=".", label=blocks
            )
        axes.set(title=f"{name}, length 128", xlabel="H100, 8 a node", ylabel="share of one H100's speed")
        axes.set(xscale="log", xticks=[1, 8, 64, 512], xticklabels=["1", "8", "64", "512"], ylim=(0, 1.05))
    axes.legend(title="blocks an update", frameon=False)
    figure.savefig(file)


if __name__ == "__main__":
    print("\n".join(table()))
    for word in sys.argv[1:]:
        draw(word)
