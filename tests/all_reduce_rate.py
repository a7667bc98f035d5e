"""How fast gradients travel between the processes that accelerate launches; see docs/scaling.md."""

import time

import torch
from accelerate import Accelerator

from recipes.cost_model import BUCKET_BYTES, all_reduce_bytes


def main(repeats=20):
    accelerator = Accelerator()
    for size in (4, 2**20, BUCKET_BYTES, 16 * BUCKET_BYTES):
        tensor, best = torch.zeros(size // 4, device=accelerator.device), float("inf")
        for _ in range(repeats):
            accelerator.wait_for_everyone()
            start = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            tensor[0].item()  # it has arrived
            best = min(best, time.perf_counter() - start)
        rate = all_reduce_bytes(size, accelerator.num_processes) / best
        accelerator.print(
            f"{size:>11,} bytes {1e6 * best:>9,.0f} microseconds {rate / 1e9:>8.2f} GB/s sent by each"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
