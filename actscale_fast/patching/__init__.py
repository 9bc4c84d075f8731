"""How an intervention is applied to a model: to follow one edit, read patch, hooks, forward_context, edits."""
