"""Recovery of a pruned model's quality by a short training run."""
