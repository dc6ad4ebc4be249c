"""The process that compiles: `python -m diffusers_adm.compilation.compiler_process FOLDER`."""

import sys
from pathlib import Path

from diffusers_adm.compilation.cpu import compile_request


if __name__ == "__main__":
    compile_request(Path(sys.argv[1]))
