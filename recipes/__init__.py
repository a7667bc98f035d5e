"""Pre-training: corpus, tokenizer, token store, masking, optimisation, loop, checkpoints."""
