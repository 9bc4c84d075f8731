"""Every causal architecture of the installed transformers, at a tiny size, against an oracle of its own."""
