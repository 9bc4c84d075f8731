"""Running a frozen model: batches of prompts, parts of a forward pass, activations and perplexity."""
