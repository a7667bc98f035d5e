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
can stand in the YAML file too. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save a checkpoint and stop, and so does
--max_train_time. Exit codes: 0 done, or stopped as --max_train_time says; 1 the disk or a process failed; 2 a
mistake in options, data or folders; 3 the loss became no number; 128 + n stopped by signal n (130, 143, 138,
129). `accelerate launch` turns each failure into 1 and adds a trace of its own after our line.
"""

import os
import sys
from typing import NoReturn

from recipes.command_line import parse_arguments
from recipes.diagnosis import Diverged
from recipes.errors import Failure, UserError
from recipes.files import is_storage_error
from recipes.pretraining import pretrain
from recipes.stopping import Stopped


def main() -> int:
    """Parse, call, done."""
    try:
        pretrain(parse_arguments())
    except UserError as error:
        return _say(f"error: {error}", 2)
    except Failure as error:
        _fail(str(error))
    except OSError as error:
        if not is_storage_error(error):
            raise
        _fail(f"{error}; mend it, and the same command continues")
    except Diverged as error:
        return _say(str(error), 3)
    except Stopped as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted: the same command continues from the last checkpoint, if any", 130)
    return 0


def _fail(line: str) -> NoReturn:
    """End at once, on each process with its own line: an orderly end could wait for what is gone."""
    print(f"error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _say(line: str, exit_code: int) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
