"""Many fits at once: a grid of objectives, settings and seeds that share the model's forward passes."""
