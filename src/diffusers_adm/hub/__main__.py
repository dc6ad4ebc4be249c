"""
Pushes to the Hugging Face Hub. The pipeline, model or adapter in the folder of a run:

    python -m diffusers_adm.hub push FOLDER USER/NAME

and, from a clone of the repository, the Space with its models:

    python -m diffusers_adm.hub push-space USER/NAME
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..commands.arguments import HUB_TOKEN, program_name
from ..commands.errors import CommandError, add_debug_argument, is_mistake, run_command
from .push import push_folder
from .space import push_space


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: `push FOLDER USER/NAME`, or `push-space USER/NAME`."""
    program = program_name("diffusers_adm.hub")
    parser = argparse.ArgumentParser(program, description="Push to the Hugging Face Hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="Push a pipeline, a model or an adapter from the folder of a run.")
    push.set_defaults(run=push_folder)
    push.add_argument("folder", type=Path, help="Folder of the run.")
    push.add_argument("--include_code", action="store_true", help="Make it load without this package as well.")
    push.add_argument("--variant", help="Infix for the names of the weight files, e.g. fp16.")
    space = commands.add_parser("push-space", help="Push the Space from a clone of the repository.")
    space.set_defaults(run=push_space)
    space.add_argument("--models", type=Path, metavar="FOLDER", help="Folder of models. Default: spaces/model.")
    for command in (push, space):
        command.add_argument("repo_id", metavar="user/name", help="Name of the repository on the Hub.")
        command.add_argument("--private", action="store_true", default=None, help="Create it as a private repository.")
        command.add_argument("--create_pr", action="store_true", help="Open a pull request.")
        command.add_argument("--commit_message", help="Commit message.")
        command.add_argument("--token", help="Hub token. Default: that of `hf auth login`, or $HF_TOKEN.")
        add_debug_argument(command)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")
    del options["command"], options["debug"]
    if options["token"] is not None and not HUB_TOKEN.fullmatch(options["token"]):
        parser.error("--token holds characters that no token has")  # the client's message would show the token
    try:
        commit = run(**options)
    except Exception as error:
        if isinstance(error, ValueError) and not is_mistake(error):  # from a library, about a name or a variant
            raise CommandError(str(error)) from error
        # HfHubHTTPError is an OSError. If nothing answers, the error is one of the client's HTTP library.
        if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
            raise CommandError(str(error), exit_code=1) from error
        raise
    print(commit.pr_url or commit.commit_url)


if __name__ == "__main__":
    run_command(main)
