"""Boundless DAS (arXiv 2305.08809): interchanges in a learned subspace. No other folder imports this one."""

from .boundless_das import BoundlessDAS
from .fit_interchange import InterchangeResult, fit_interchange
from .sources import source_activations

__all__ = ["BoundlessDAS", "InterchangeResult", "fit_interchange", "source_activations"]
