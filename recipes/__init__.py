"""Pre-training: corpus, tokenizer, token store, masking, optimisation, loop, checkpoints."""

import os

# Who started this process, noted before anything that takes time is imported.
PARENT = os.getppid()
