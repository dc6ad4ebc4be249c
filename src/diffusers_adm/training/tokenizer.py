"""`python -m diffusers_adm.training.tokenizer`: the command of `diffusers_adm.data.tokenizer`, where it was before."""

from ..commands.errors import run_command
from ..data.tokenizer import main


if __name__ == "__main__":
    run_command(main)
