"""Puts the helpers of neighbouring folders on the path: pytest adds a test's own folder alone."""

import sys
from pathlib import Path


sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("schedulers", "training")]
