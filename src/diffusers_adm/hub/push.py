"""Push the folder of a run: a pipeline, a model or an adapter."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline, ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import CommitInfo, create_repo
from huggingface_hub.utils import validate_repo_id

from ..data.autoencoder_record import AUTOENCODER_NAME
from ..data.labels import ID2LABEL_NAME
from .model_cards import LoraAdapter, write_model_card
from .publishing import drop_local_paths


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    include_code: bool = False,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    variant: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    r"""
    Push the result of a training script or of `save_pretrained`: a pipeline, a single model (a classifier with its
    class names and its noise scheduler, an autoencoder with its record) or an adapter. Its card describes the run.
    Checkpoints and logs are not pushed.

    Args:
        folder (`str` or `Path`): Contains a `model_index.json`, a `config.json`, a folder `classifier`, or
            `pytorch_lora_weights.safetensors`.
        repo_id (`str`): `user/name`.
        include_code (`bool`), private (`bool`, *optional*), create_pr (`bool`), commit_message (`str`, *optional*),
            variant (`str`, *optional*), token (`str`, *optional*): See `push_to_hub`.

    Returns:
        `huggingface_hub.CommitInfo`: With `pr_url` for `create_pr`.

    Raises:
        ValueError: If the folder contains none of these, or for `include_code` without a pipeline.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)  # before anything is loaded
    # Load the variant if the folder has it; otherwise it is only the name to push under.
    is_variant = variant is not None and any(folder.rglob(f"*.{variant}.safetensors"))
    load = {"variant": variant} if is_variant else {}
    if (folder / DiffusionPipeline.config_name).is_file():
        return DiffusionPipeline.from_pretrained(folder, **load).push_to_hub(
            repo_id,
            include_code=include_code,
            private=private,
            create_pr=create_pr,
            commit_message=commit_message,
            variant=variant,
            token=token,
        )
    places = [folder, folder / "classifier"]
    place = next((place for place in places if (place / ModelMixin.config_name).is_file()), None)
    if place is None and not (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        raise ValueError(
            f"{folder} holds neither a model_index.json nor a config.json: no pipeline, model or adapter was saved."
        )
    if include_code:
        raise ValueError(f"{folder} holds no pipeline, and code is only pushed with one. Drop `include_code`.")
    if place is None and variant is not None:
        raise ValueError(f"{folder} holds an adapter, which has no variants. Drop `variant`.")
    pushed = LoraAdapter(folder) if place is None else AutoModel.from_pretrained(str(place), **load)
    repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
    with tempfile.TemporaryDirectory() as staged:
        if place is None:
            shutil.copyfile(folder / LORA_WEIGHT_NAME_SAFE, Path(staged, LORA_WEIGHT_NAME_SAFE))
        else:
            pushed.save_pretrained(staged, variant=variant)
            if (place / ID2LABEL_NAME).is_file():
                shutil.copyfile(place / ID2LABEL_NAME, Path(staged, ID2LABEL_NAME))
            if (place / AUTOENCODER_NAME).is_file():
                shutil.copyfile(place / AUTOENCODER_NAME, Path(staged, AUTOENCODER_NAME))
            if isinstance(pushed, AutoencoderKL):  # a class of diffusers, which would write its own card
                write_model_card(pushed, staged, repo_id, token=token)
                drop_local_paths(Path(staged))
            if (folder / "scheduler").is_dir():
                shutil.copytree(folder / "scheduler", Path(staged, "scheduler"))
        return pushed._upload_folder(staged, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)
