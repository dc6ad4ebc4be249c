"""
Compiled networks for sampling: `enable_fast` of the pipelines.

`fast_network.py` runs compiled code in place of a network's own forward pass, `cpu.py` and `gpu.py` compile,
`code_cache.py` keeps the code of CPUs for later processes, and `suitability.py` tells which networks can be compiled.
"""
