"""`python -m actscale_fast.cli`, the same as `actscale-fast`."""

import sys

from .app import main

sys.exit(main())
