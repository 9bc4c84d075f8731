"""The logger "actscale_fast", for what is not a result: downloads, conversions, warnings of the command line."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("actscale_fast")


class StderrHandler(logging.Handler):
    """Writes "actscale-fast: …" to what is stderr at that moment."""

    #: Says which of several processes is writing.
    speaker = ""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        print(f"actscale-fast: {self.speaker}{level}{record.getMessage()}", file=sys.stderr, flush=True)


def notice(text: str) -> None:
    """Log one line at the level INFO; on stderr if the program has not set up logging itself.

    `logging.getLogger("actscale_fast").setLevel("WARNING")` silences it.
    """
    if not logger.hasHandlers():
        show_on_stderr()
    logger.info(text)


def show_on_stderr(level: int = logging.INFO) -> None:
    """Let the logger write to stderr; a level that was set before stays."""
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        logger.addHandler(StderrHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(level)
