"""Every check of one architecture."""

from __future__ import annotations

import contextlib

from .fits import check_fit, fit_runs
from .generation import check_generate
from .overrides import CANNOT_RUN
from .sites import check_site
from .subject import Subject
from .verdicts import CANNOT_ACT, NAMED, REFUSED, RIGHT, SITES, Row, attempt


def check(model_type: str, name: str) -> Row:
    """Every check of one architecture."""
    row = Row(model_type, name)
    if model_type in CANNOT_RUN:
        row.made = CANNOT_RUN[model_type]
        return row
    try:
        subject = Subject(model_type, name)
    except Exception as error:  # whatever the reason, the row says it
        row.made = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return row
    row.dtype = str(subject.dtype).removeprefix("torch.")
    for site in SITES:
        row.sites[site] = check_site(subject, site)
    for site, verdict in row.sites.items():
        if verdict.verdict == CANNOT_ACT:
            fitted = attempt(lambda site=site: fit_runs(subject, site))  # type: ignore[misc]
            verdict.detail += (
                "; fit refuses" if fitted.verdict == REFUSED else "; fit learns nothing and does not say so"
            )
    usable = [(site, {}) for site in SITES if row.sites[site].verdict == RIGHT]
    usable += [(site, row.sites[site].paths) for site in SITES if row.sites[site].verdict == NAMED]
    if usable:
        with contextlib.suppress(Exception):  # where padding cannot be tried, the checks say so themselves
            subject.allow_padding()
        site, paths = usable[0]
        row.generate = attempt(lambda: check_generate(subject, site, paths))
        row.fit = attempt(lambda: check_fit(subject, site, paths))
    return row
