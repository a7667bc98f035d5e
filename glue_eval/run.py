"""Fine-tune a model on GLUE and say how well it does, with the spread over seeds.

The newest checkpoint of the default pre-training run on one task; data from the Hub or its cache:

    python glue_eval/run.py --task mrpc

Any encoder, a folder or a Hub id; every task; six seeds as in the paper; data from a folder, no network:

    python glue_eval/run.py --task all --model_name_or_path DIR_OR_REPO --seeds 6 --data_dir DIR

Every checkpoint of one or several pre-training runs, score and loss against step:

    python glue_eval/run.py --task mrpc,rte --run_dir output/pre,output/post --output_dir output/trajectory
    python glue_eval/run.py --task mrpc --run_dir hub:NAME/REPO --output_dir output/hub-trajectory

The paper's grid (Xiong et al. 2020, appendix A.3), or one of your own:

    python glue_eval/run.py --task mrpc --config paper --output_dir output/glue-paper
    python glue_eval/run.py --task mrpc --grid my_grid.yaml --output_dir output/glue-mine

It writes results.json, results.md and figures into output_dir, and one file for each run under runs/. Started
again it does what is missing, so more seeds, tasks and models can be added to a folder; other settings need
another folder. `--help` lists all options; each can stand in the YAML file of --config too. Exit codes: 0
done, 1 a run failed, 2 a mistake in options, data or folders, 130 interrupted.
"""

import os
import sys

from glue_eval.arguments import parse_glue_arguments
from glue_eval.evaluation import evaluate
from recipes.errors import UserError


def main() -> int:
    """Parse, call, done."""
    try:
        return 1 if evaluate(parse_glue_arguments()) else 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command does what is missing", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
