"""The repository of a training run on the Hub: made before the training, pushed to after it."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi

from ..training.arguments import TrainingArguments
from .push import push_folder


logger = get_logger(__name__)


def prepare_repository(accelerator: Accelerator, training_args: TrainingArguments) -> None:
    """
    Creates the repository for `push_to_hub`, and checks that this user may write there. Collective: if the Hub refuses
    or cannot be reached, all processes raise a `ValueError`.
    """
    if not training_args.push_to_hub:
        return
    refusal = None
    if accelerator.is_main_process:
        repo_id, hub = _repo_id(training_args), HfApi(token=training_args.hub_token)
        try:
            made = hub.create_repo(repo_id, private=training_args.hub_private_repo or None, exist_ok=True)
            hub.auth_check(made.repo_id, write=True)  # it may belong to another user
        except Exception as error:  # whatever it is, all processes must raise it
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
    With `push_to_hub`, pushes the result in the folder of the run, with a model card. Called by all processes; the main
    one pushes. If that fails, the message of the `RuntimeError` says how to push the folder by hand.
    """
    if not (training_args.push_to_hub and accelerator.is_main_process):
        return
    folder, repo_id = training_args.output_dir, _repo_id(training_args)
    private = training_args.hub_private_repo or None
    try:
        commit = push_folder(folder, repo_id, private=private, token=training_args.hub_token)
    except Exception as error:
        raise RuntimeError(
            f"The result could not be pushed to {repo_id}: {error}\nIt is saved in {folder} all the same. Push it with "
            f"`python -m diffusers_adm.hub push {folder} {repo_id}`."
        ) from error
    logger.info(f"Pushed the result: {commit.commit_url}")


def _repo_id(training_args: TrainingArguments) -> str:
    return training_args.hub_model_id or Path(training_args.output_dir).resolve().name
