"""Makes a package unknown, as where it is not installed."""

import sys

sys.modules["matplotlib_inline"] = None
