"""The practice checkpoint's workshop: problems, tokenizer, training loop, evaluation."""
