"""The progress bar of a sweep."""

from __future__ import annotations

from typing import Self


class SweepBar:
    """A progress bar over all steps that also counts finished fits; earlier steps do not affect the time left."""

    def __init__(self, total: int, n_fits: int, show: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=total, desc="sweep", disable=not show, unit="step", dynamic_ncols=True)
        self.done, self.n_fits = 0, n_fits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, steps: int) -> None:
        self.bar.update(steps)

    def skip(self, steps: int) -> None:
        if not self.bar.disable:
            self.bar.initial += steps
            self.bar.n += steps
            self.bar.refresh()

    def fits_done(self) -> None:
        self.done += 1
        self.bar.set_postfix_str(f"{self.done}/{self.n_fits} fits", refresh=False)
