"""What the command line says when it refuses something."""

from __future__ import annotations

import pytest

from actscale_fast.cli import main


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a quiet command that fails with status 1."""
    capsys.readouterr()
    assert main([*words, "--quiet"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line
