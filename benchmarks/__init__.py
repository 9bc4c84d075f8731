"""One harness, one file a case: `python -m benchmarks` from the repository's root."""
