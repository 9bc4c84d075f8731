"""How an intervention is applied to a model; docs/architecture/patching.md follows a patch file by file."""
