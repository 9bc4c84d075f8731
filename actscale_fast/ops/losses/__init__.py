"""Losses over rows of logits, and over hidden states times an output head."""
