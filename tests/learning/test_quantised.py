"""Quantised models give what plain models with the same weights give, or are refused by name: docs/quantised.md."""

from __future__ import annotations

import re

import pytest
from quantised_cases import FUNCTIONS, QUANTISERS, CannotLoadError, kept, outcome

#: What is refused; all else is right.
REFUSED = {
    "merge": "model: (the weight of )?layer 0's projection is a .*expected",
    "activations": "model: .* computes an output without a gradient from an input that has one",
}


@pytest.mark.parametrize("function", [*FUNCTIONS, "resume"])
@pytest.mark.parametrize("name", QUANTISERS)
def test_a_quantised_model_is_right_or_refused(name: str, function: str) -> None:
    pytest.importorskip(QUANTISERS[name][0])
    try:
        kept(name)
    except CannotLoadError as error:
        pytest.skip(f"{name} does not work here: {error}")
    found = outcome(name, function)
    learns = function not in ("patch", "generate", "evaluate", "merge")
    if function == "merge":
        assert_refused(found, REFUSED["merge"])
    elif learns and name.endswith("and activations"):
        assert_refused(found, REFUSED["activations"])
    else:
        assert found == "right"


def assert_refused(found: str, reason: str) -> None:
    kind, _, message = found.partition(": ")
    assert kind == "refused"
    assert re.match(reason, message), message
