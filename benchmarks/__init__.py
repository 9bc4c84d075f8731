"""One harness, one file a case: `python -m benchmarks` from the repository's root."""

import sys
from pathlib import Path

# `python -m benchmarks` puts the checkout first on the path; the installed package, which has the compiled kernels,
# comes before its sources.
_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT in sys.path:
    sys.path.remove(_ROOT)
    sys.path.append(_ROOT)
