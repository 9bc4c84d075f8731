"""Interventions and ops in other libraries: one module per library, imported only by its users.

>>> from actscale_fast.integrations import peft
>>> with peft.accelerate(model):
...     trainer.train()
"""
