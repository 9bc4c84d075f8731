"""The libraries people already use, on these ops: one module a library, imported by nobody but its user.

>>> from actscale_fast.integrations import peft
>>> with peft.accelerate(model):
...     trainer.train()
"""
