"""Pictures show in a notebook once, with and without pyplot, and fit into a caller's axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actscale_fast import plots

CURVES = {"one": ([-1.0, 0.0, 1.0], [1.0, 2.0, 3.0]), "other": ([-1.0, 0.0, 1.0], [3.0, 2.0, 1.0])}


def test_a_figure_shows_itself_as_a_png_and_pyplot_does_not_know_it() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    figure = plots.strengths(CURVES, ylabel="perplexity")
    data, metadata = formatters.DisplayFormatter().format(figure)
    assert data["image/png"].startswith(b"\x89PNG\r\n\x1a\n")
    assert metadata["image/png"] == {"width": 557, "height": 355}  # 5.8 × 3.7 inches
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_curves_are_drawn_into_the_axes_of_a_caller(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    mine = Figure()
    left, right = mine.subplots(1, 2)
    assert plots.strengths(CURVES, tmp_path / "a.png", ylabel="KL", title="here", ax=left) is mine
    assert left.get_title(loc="left") == "here"
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["one", "other"]
    assert not right.has_data()
    assert mine.legends == []
    assert (tmp_path / "a.png").is_file()


def test_anything_but_axes_is_refused() -> None:
    wrong: Any = [1]
    with pytest.raises(TypeError, match="ax: got list, expected a matplotlib Axes"):
        plots.strengths(CURVES, ylabel="KL", ax=wrong)
