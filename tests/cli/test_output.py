"""How results are printed."""

from __future__ import annotations

import pytest

from actscale_fast.cli.output import print_table


def test_a_table_in_a_file_is_not_folded_unless_it_is_very_wide(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("", ["first", "second"], [["a", "b" * 150]], right=False)
    assert "b" * 150 in capsys.readouterr().out
    print_table("", ["first", "second"], [["a", "b" * 300]], right=False)
    printed = capsys.readouterr().out
    assert printed.count("b") == 300
    assert "b" * 300 not in printed
