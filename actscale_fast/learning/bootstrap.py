"""Bootstrap intervals of means and medians over prompts (Efron 1979: the percentile method)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

#: Resamples, coverage and seed of every interval, so that the same figures always have the same intervals.
RESAMPLES, COVERAGE, SEED = 2000, 0.95, 0
#: Counts that are held at a time.
_AT_ONCE = 1 << 22


def intervals(
    means: Mapping[str, Tensor],
    medians: Mapping[str, Tensor],
    ratios: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
) -> dict[str, tuple[float, float]]:
    """The 95 % bootstrap intervals of some statistics of the same N prompts, which are resampled together.

    A prompt is drawn with everything that was measured on it, N times with replacement; the interval lies between the
    2.5th and the 97.5th percentile of the statistic over 2000 such draws. It covers the choice of prompts, not that of
    training data or seeds. If all prompts agree, as with a share of 0 or 1, its width is 0.

    Args:
        means: by name, the values [N] whose mean is the statistic. NaN: the prompt does not count; a statistic without
            any other value is left out.
        medians: by name, the values [N] whose lower median is the statistic.
        ratios: by name, two times values [N], none of them NaN; the statistic is the mean of the first over that of
            the second.

    Returns:
        (lower end, upper end) by name.
    """
    columns = {name: values.detach().double().cpu() for name, values in (*means.items(), *medians.items())}
    quotients = {name: torch.stack(both).detach().double().cpu() for name, both in ratios.items()}  # [2, N]
    if not columns and not quotients:
        return {}
    n = next(iter((*columns.values(), *quotients.values()))).shape[-1]
    drawn = [
        torch.stack(
            [(_median if name in medians else _mean)(values, counts) for name, values in columns.items()]
            + [(counts @ above) / (counts @ below) for above, below in quotients.values()]
        )
        for counts in _draws(n)
    ]
    tails = torch.tensor([(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], dtype=torch.float64, device="cpu")
    ends = torch.cat(drawn, 1).nanquantile(tails, 1).T.tolist()
    return {
        name: (low, high) for name, (low, high) in zip((*columns, *quotients), ends, strict=True) if low == low
    }  # NaN: no value


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of values [N] that are drawn [draws, N] times, without those that are NaN; [draws]."""
    known = ~values.isnan()
    return (counts @ torch.where(known, values, 0.0)) / (counts @ known.double())


def _median(values: Tensor, counts: Tensor) -> Tensor:
    """The lower median of values [N] that are drawn [draws, N] times; [draws]."""
    values, order = values.sort()
    reached = counts[:, order].cumsum(-1) >= (len(values) + 1) // 2
    return values[reached.double().argmax(-1)]


def _draws(n: int) -> Iterator[Tensor]:
    """How often each of n prompts is drawn, float64 [some, n]; `RESAMPLES` rows in total."""
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    size = max(_AT_ONCE // n, 1)
    for start in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - start)
        drawn = torch.randint(n, (rows, n), generator=generator, device="cpu")
        counts = torch.zeros(rows, n, dtype=torch.float64, device="cpu")
        yield counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
