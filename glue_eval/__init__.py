"""Fine-tuning of checkpoints on GLUE."""
