"""Self-speculative decoding: the model without some of its parts drafts, the whole one verifies."""
