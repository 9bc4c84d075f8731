"""What comes of a check: a verdict, and a row of them for each architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

SITES = ("head", "attn_out", "mlp_out", "residual")
RIGHT, REFUSED, CANNOT_ACT, NAMED = "right", "refused", "cannot act", "right when named"
WRONG, CRASH, UNCHECKED = "WRONG", "CRASH", "unchecked"
_NAMED = (ValueError, TypeError, RuntimeError, NotImplementedError)


@dataclass
class Verdict:
    """What came of one check."""

    verdict: str
    detail: str = ""
    paths: dict[str, str] = field(default_factory=dict)  # that had to be named

    def __str__(self) -> str:
        return f"{self.verdict}: {self.detail}" if self.detail else self.verdict


@dataclass
class Row:
    """All verdicts of one architecture."""

    model_type: str
    name: str
    made: str = ""  # why it could not be made, or nothing
    dtype: str = ""
    sites: dict[str, Verdict] = field(default_factory=dict)
    generate: Verdict = field(default_factory=lambda: Verdict(""))
    fit: Verdict = field(default_factory=lambda: Verdict(""))

    @property
    def verdicts(self) -> list[Verdict]:
        return [*self.sites.values(), self.generate, self.fit]


def attempt(action: Callable[[], Verdict]) -> Verdict:
    """The verdict, or what an exception makes of it."""
    try:
        return action()
    except _NAMED as error:
        text = " ".join(str(error).split())
        return (
            Verdict(REFUSED, text[:500])
            if _raised_by_package(error)
            else Verdict(CRASH, f"{type(error).__name__}: {text}"[:500])
        )
    except Exception as error:  # every other class is an unnamed error by itself
        return Verdict(CRASH, f"{type(error).__name__}: {' '.join(str(error).split())}"[:400])


def _raised_by_package(error: BaseException) -> bool:
    """Whether the error was raised in the package's own code, not below it."""
    trace = error.__traceback__
    last = ""
    while trace is not None:
        last = trace.tb_frame.f_code.co_filename
        trace = trace.tb_next
    return "actscale_fast" in last
