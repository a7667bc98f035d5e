"""Pre-train BERT with the normalisation where you want it.

The default run: a small Pre-LN BERT on the embedded corpus, about twelve minutes on 2 CPU cores, no network:

    accelerate launch recipes/pretrain.py

On your own text, and Post-LN with its warm-up instead:

    accelerate launch recipes/pretrain.py --train_file corpus/ --output_dir output/mine
    accelerate launch recipes/pretrain.py --norm_placement post --warmup_steps 500 --output_dir output/post

The real thing, BERT-base on Wikipedia and books with 8 GPUs (needs the Hub):

    accelerate launch --multi_gpu --num_processes 8 recipes/pretrain.py \\
        --config recipes/configs/bert_base_wikipedia.yaml

Two processes on CPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 recipes/pretrain.py \\
        --output_dir output/two

Started again, it continues where it stopped, or says that it is finished. `--help` lists all options; each
can stand in the YAML file too. Exit codes: 0 done, 2 a mistake in options, data or folders, 3 the
loss became no number, 130 interrupted; `accelerate launch` turns each failure into 1 and adds a trace of its
own after our line.
"""

import os
import sys

from recipes.command_line import parse_arguments
from recipes.diagnosis import Diverged
from recipes.errors import UserError
from recipes.pretraining import pretrain


def main() -> int:
    """Parse, call, done."""
    try:
        pretrain(parse_arguments())
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint, if any", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
