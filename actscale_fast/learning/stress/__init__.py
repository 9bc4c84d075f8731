"""Stress tests of an intervention at one fixed strength, after the gates of FaithSteer-BENCH (arXiv 2603.18329).

`perturbations` has the rules that change prompts, `behaviours` the unrelated tasks, `plain_text` the perplexity and
divergence on unrelated text, `result` what is measured and the verdicts, and `stress` the call.
"""
