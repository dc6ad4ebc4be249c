"""Push the folder of a run: a pipeline, a model or an adapter."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline, ModelMixin, PriorTransformer
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import CommitInfo, create_repo, upload_folder
from huggingface_hub.utils import validate_repo_id
from transformers import CLIPModel

from ..data.autoencoder_record import AUTOENCODER_NAME
from ..data.clip_models import CLIP_FILES
from ..data.labels import ID2LABEL_NAME
from .model_cards import LoraAdapter, write_model_card
from .publishing import drop_local_paths


# Folders of a prior, as parts of a pipeline.
PRIOR_FOLDER, BESIDE_PRIOR = "prior", ("prior_scheduler", "prior_text_encoder", "prior_tokenizer")


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
    class names and its noise scheduler, an autoencoder with its record, a CLIP with its tokenizer and preprocessing, a
    prior with its scheduler and text encoder) or an adapter. Its card describes the run. Checkpoints and logs are not
    pushed.

    Args:
        folder (`str` or `Path`): Contains a `model_index.json`, a `config.json`, a folder `classifier` or `prior`,
            or `pytorch_lora_weights.safetensors`.
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
    places = [folder, folder / "classifier", folder / PRIOR_FOLDER]
    place = next((place for place in places if (place / ModelMixin.config_name).is_file()), None)
    if place is None and not (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        raise ValueError(
            f"{folder} holds neither a model_index.json nor a config.json: no pipeline, model or adapter was saved."
        )
    if include_code:
        raise ValueError(f"{folder} holds no pipeline, and code is only pushed with one. Drop `include_code`.")
    if place is None and variant is not None:
        raise ValueError(f"{folder} holds an adapter, which has no variants. Drop `variant`.")
    is_clip = place is not None and _is_clip(place)
    if place is None:
        pushed = LoraAdapter(folder)
    else:
        pushed = (CLIPModel if is_clip else AutoModel).from_pretrained(str(place), **load)
    repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
    with tempfile.TemporaryDirectory() as staged:
        if place is None:
            shutil.copyfile(folder / LORA_WEIGHT_NAME_SAFE, Path(staged, LORA_WEIGHT_NAME_SAFE))
        else:
            subfolder = PRIOR_FOLDER if isinstance(pushed, PriorTransformer) and place != folder else ""
            pushed.save_pretrained(Path(staged, subfolder), variant=variant)
            for name in BESIDE_PRIOR if subfolder else ():
                if (folder / name).is_dir():
                    shutil.copytree(folder / name, Path(staged, name))
            if (place / ID2LABEL_NAME).is_file():
                shutil.copyfile(place / ID2LABEL_NAME, Path(staged, ID2LABEL_NAME))
            if (place / AUTOENCODER_NAME).is_file():
                shutil.copyfile(place / AUTOENCODER_NAME, Path(staged, AUTOENCODER_NAME))
            for name in CLIP_FILES if is_clip else ():
                if (place / name).is_file():
                    shutil.copyfile(place / name, Path(staged, name))
            # Of other libraries, which would write their own card.
            if isinstance(pushed, (AutoencoderKL, CLIPModel, PriorTransformer)):
                write_model_card(pushed, staged, repo_id, token=token)
                drop_local_paths(Path(staged))
            if (folder / "scheduler").is_dir():
                shutil.copytree(folder / "scheduler", Path(staged, "scheduler"))
        if is_clip:
            upload = {"commit_message": commit_message, "create_pr": create_pr, "token": token}
            return upload_folder(repo_id=repo_id, folder_path=staged, **upload)
        return pushed._upload_folder(staged, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)


def _is_clip(place: Path) -> bool:
    config = json.loads((place / ModelMixin.config_name).read_text(encoding="utf-8"))
    return config.get("model_type") == "clip"
