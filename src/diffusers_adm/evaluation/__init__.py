"""
Measures of trained models. Importing it needs the core dependencies alone; what draws curves or reads data imports
`matplotlib` and `datasets` (the `train` extra) when it is called.
"""

# The name is the function from here on; the sub-package of the same name, which is what `python -m` runs, is loaded.
from .bits_per_dim import BitsPerDim, bits_per_dim


__all__ = ["BitsPerDim", "bits_per_dim"]
