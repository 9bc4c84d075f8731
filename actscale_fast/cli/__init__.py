"""The command line `actscale-fast`."""

from .app import main

__all__ = ["main"]
