"""The end of a run on the Hub: a repository that is made before the training, and pushed to after it."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi

from ..training.arguments import TrainingArguments


logger = get_logger(__name__)


def prepare_repository(accelerator: Accelerator, training_args: TrainingArguments) -> None:
    """
    Makes the repository that `push_to_hub` asks for, and checks that this user may write there. Collective.

    Raises:
        ValueError: On all processes, if the Hub refuses or cannot be reached.
    """
    if not training_args.push_to_hub:
        return
    refusal = None
    if accelerator.is_main_process:
        repo_id, hub = _repo_id(training_args), HfApi(token=training_args.hub_token)
        try:
            made = hub.create_repo(repo_id, private=training_args.hub_private_repo or None, exist_ok=True)
            hub.auth_check(made.repo_id, write=True)  # it may be somebody else's
        except Exception as error:  # whatever it is, the other processes must hear of it
            refusal = (
                f"`push_to_hub` was given, but the repository {repo_id!r} cannot be made or written to: {error}\nLog "
                "in with `hf auth login`, set $HF_TOKEN or pass `--hub_token`, for a token that may write; name the "
                "repository with `--hub_model_id user/name`; or drop `--push_to_hub`."
            )
    (refusal,) = broadcast_object_list([refusal])
    if refusal is not None:
        raise ValueError(refusal)


def push_result(accelerator: Accelerator, training_args: TrainingArguments) -> None:
    """
    Pushes what the run has saved in its folder, with a model card, if `push_to_hub` asks for it. For all processes; the
    main one does it.

    Raises:
        RuntimeError: If it fails. The folder stays as it is, and the message says how to push it by hand.
    """
    # Here, since that module imports from this package.
    from .push import push_folder

    if not (training_args.push_to_hub and accelerator.is_main_process):
        return
    folder, repo_id = training_args.output_dir, _repo_id(training_args)
    private = training_args.hub_private_repo or None
    try:
        commit = push_folder(folder, repo_id, private=private, token=training_args.hub_token)
    except Exception as error:  # nothing is hidden: it is raised again, with what to do
        raise RuntimeError(
            f"The result could not be pushed to {repo_id}: {error}\nIt is saved in {folder} all the same. Push it with "
            f"`python -m diffusers_adm.hub push {folder} {repo_id}`."
        ) from error
    logger.info(f"Pushed the result: {commit.commit_url}")


def _repo_id(training_args: TrainingArguments) -> str:
    return training_args.hub_model_id or Path(training_args.output_dir).resolve().name
