"""Evaluation: perplexity, lm-eval tasks and efficiency, each with its convention and hardware."""
