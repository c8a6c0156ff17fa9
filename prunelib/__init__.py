"""prunelib: structured pruning of large language models, as a library."""

__version__ = "0.1.0"
