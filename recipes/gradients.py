"""Measure gradients and norms layer by layer, at initialisation and after warm-up, beside theory.

The gradient probe of Xiong et al. 2020 (arXiv 2002.04745, Fig. 3 and Lemma 2) on small models and the
embedded corpus; no network, about twenty minutes on 2 CPU cores:

    python recipes/gradients.py

Checkpoints or exported models, on the data they were trained on (here that of the default run):

    python recipes/gradients.py --config recipes/configs/default.yaml --output_dir output/gradients-default \\
        --checkpoints output/pretrain/checkpoint-400 output/pretrain/checkpoint-4800 --inits none

Other sizes, other data, one initialisation:

    python recipes/gradients.py --hidden_size 256 --num_attention_heads 4 --intermediate_size 1024 \\
        --depths 6 12 --inits xavier --train_file corpus/ --output_dir output/gradients-mine

It writes report.md with tables and figures, summary.json (means and intervals: every figure and table comes
from it) and gradients.json (all values) into output_dir. Finished measurements and warm-up runs are kept
there and reused: started again, or with more seeds or depths, it makes what is missing. Settings that would
change them need another folder. `--help` lists the probe's own options; those of recipes/pretrain.py are
taken too, and all can stand in the YAML file. Exit codes: 0 done, 2 a mistake in options, data or folders,
130 interrupted.
"""

import sys

from transformers.utils import logging as transformers_logging

from recipes.errors import UserError
from recipes.gradient_arguments import parse_gradient_arguments
from recipes.gradient_report import write_report
from recipes.gradient_study import measure_all


def main() -> int:
    """Parse, call, done."""
    transformers_logging.disable_progress_bar()  # a bar for each model that is loaded
    try:
        args = parse_gradient_arguments()
        print(write_report(args, measure_all(args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command makes what is missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
