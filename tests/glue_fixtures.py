"""Results of runs as fine-tuning leaves them, with made-up scores."""

from glue_eval.tasks import TASKS

SETTING = {
    "learning_rate": 5e-5,
    "train_batch_size": 32,
    "num_train_epochs": 3,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
}


def make_model(name="output/pre", step=None, run=None, fingerprint=None, **changes):
    """The description of a model in a result."""
    return {
        "name": name,
        "path": name,
        "fingerprint": fingerprint or f"{abs(hash((name, step))):016x}"[:16],
        "run": run,
        "step": step,
        "from_scratch": False,
        "norm_placement": "pre",
    } | changes


def make_result(task="mrpc", seed=1, score=0.7, model=None, loss=0.5, degenerate=False, **setting):
    """A run in which every metric is `score`."""
    metrics = dict.fromkeys((*TASKS[task].metrics, "score"), score)
    return {
        "format": 1,
        "task": task,
        "model": model or make_model(),
        "setting": SETTING | setting,
        "seed": seed,
        "epoch": 3,
        "load_best_model_at_end": False,
        **metrics,
        "validation_loss": loss,
        "degenerate": degenerate,
        "diverged": score is None,
    }


def make_track(run, placement, scores_by_step, task="mrpc"):
    """Results of the checkpoints of a run: {step: scores of the seeds}."""
    return [
        make_result(
            task,
            seed,
            score,
            make_model(f"{run}/checkpoint-{step}", step, run, norm_placement=placement),
            loss=1 - score,
        )
        for step, scores in scores_by_step.items()
        for seed, score in enumerate(scores, 1)
    ]
