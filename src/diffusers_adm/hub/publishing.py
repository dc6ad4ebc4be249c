"""
What the classes of this package add to diffusers' `push_to_hub`: a model card, and for pipelines `include_code=True`.

These mixins are part of the files that go to machines without this package, where its other modules are missing. So
they find those by name when they are needed, and not by an import statement, which the exporter would follow.
"""

import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import PushToHubMixin
from huggingface_hub import CommitInfo, create_repo, try_to_load_from_cache


def _of_package(name: str) -> types.ModuleType | None:
    """A module of this package, or None where a shipped file is all there is of it."""
    package = "diffusers_adm"
    return importlib.import_module(f"{package}.{name}") if __name__.startswith(f"{package}.") else None


class ModelCardMixin(PushToHubMixin):
    """Writes the model card of what is pushed."""

    def _upload_folder(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> CommitInfo:
        # What diffusers calls last, whichever way something is pushed. Its own generic card lies in the folder by then.
        cards = _of_package("hub.model_cards")
        if cards is not None and not subfolder:
            cards.write_model_card(self, working_dir, repo_id, token=token)
        _drop_local_paths(Path(working_dir))
        return super()._upload_folder(
            working_dir,
            repo_id,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            subfolder=subfolder,
        )


def _drop_local_paths(folder: Path) -> None:
    """Configs note where they were loaded from. A folder on somebody's machine is nobody else's matter."""
    for path in [*folder.rglob("model_index.json"), *folder.rglob("*config.json")]:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue
        for key in ("_name_or_path", "name_or_path"):
            place = content.get(key)
            if isinstance(place, str) and (os.path.isabs(place) or os.path.exists(place)):
                del content[key]
                path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class PublishedModelMixin(ModelCardMixin):
    """
    Besides the card: weights that came from the Hub are loaded only if they are what the Hub has, and weights are only
    saved under names that `from_pretrained` knows.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Saves the model as [`ModelMixin.save_pretrained`] does, with its arguments.

        Raises:
            ValueError: As of diffusers; if the model has a LoRA.
        """
        _check_no_adapter(
            {"the model": self}, "`save_lora_adapter(folder)`", "`unload_lora()`", "`fuse_lora()` and `unload_lora()`"
        )
        super().save_pretrained(  # type: ignore[misc]
            save_directory,
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
            use_flashpack=use_flashpack,
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Any:
        r"""
        Loads a model as [`ModelMixin.from_pretrained`] does.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A repository on the Hub, or a folder.
            kwargs: As of diffusers.

        Raises:
            OSError: As of diffusers; if a weight file in the Hub's cache has another SHA-256 than on the Hub.
        """
        subfolder = kwargs.get("subfolder") or ""
        if pretrained_model_name_or_path is not None and os.path.isdir(pretrained_model_name_or_path):
            _check_cached_weights(Path(pretrained_model_name_or_path) / subfolder)  # e.g. for a pipeline
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = try_to_load_from_cache(
            str(pretrained_model_name_or_path),
            f"{subfolder}/{cls.config_name}".lstrip("/"),
            cache_dir=kwargs.get("cache_dir"),
            revision=kwargs.get("revision"),
        )
        if isinstance(config, str):
            _check_cached_weights(Path(config).parent)
        return loaded


def _check_no_adapter(networks: dict[str, torch.nn.Module], save_alone: str, unload: str, fuse: str) -> None:
    """
    Raises a `ValueError` if one of `networks`, by their names, has a LoRA, also a fused one that was not unloaded. PEFT
    renames the layers that it adapts, so `from_pretrained` would start them at random.
    """
    for name, network in networks.items():
        renamed = next((key for key, _ in network.named_parameters() if ".base_layer." in key), None)
        if renamed is not None:
            raise ValueError(
                f"`save_pretrained` cannot save a LoRA: {name} has one loaded, and `from_pretrained` would not find "
                f"the weights that it has renamed, such as {renamed}. Save the LoRA alone with {save_alone}, or call "
                f"{fuse} first to save the sum of both, or {unload} to save the weights without it."
            )


def _check_cached_weights(folder: Path) -> None:
    # The client itself compares nothing but sizes. Large files lie in its cache as links to files named by their hash.
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        blob = path.resolve()
        if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{64}", blob.name):
            continue
        with open(blob, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != blob.name:
            raise OSError(
                f"{path} has the SHA-256 {actual}, but that of the file on the Hub is {blob.name}: it was damaged on "
                f"its way or altered since, and is not used. Delete {blob} and load again."
            )


class PublishedPipelineMixin(ModelCardMixin):
    """Saves and pushes a pipeline, with its code if that is wanted."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        include_code: bool = False,
        **kwargs: Any,
    ) -> None:
        r"""
        Saves the pipeline as [`DiffusionPipeline.save_pretrained`] does.

        Args:
            save_directory (`str` or `os.PathLike`), safe_serialization (`bool`), variant (`str`, *optional*),
                max_shard_size (`int` or `str`, *optional*), use_flashpack (`bool`): As of diffusers.
            push_to_hub (`bool`): Whether to push the folder as well, with a model card.
            include_code (`bool`): Whether to write the code of pipeline and components beside their weights. Where this
                package is not installed, the repository then loads with `DiffusionPipeline.from_pretrained(repository,
                custom_pipeline="pipeline", trust_remote_code=True)`; where it is, as any other and with the installed
                code. A pipeline that was loaded in the former way always gets its code.
            kwargs: For `push_to_hub`: `repo_id` (by default the name of the folder), `commit_message`, `private`,
                `token` and `create_pr`.

        Raises:
            ValueError: If a network has a LoRA.
        """
        self._save(
            save_directory,
            include_code=include_code,
            push_to_hub=push_to_hub,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            use_flashpack=use_flashpack,
            **kwargs,
        )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        include_code: bool = False,
        max_shard_size: int | str | None = None,
    ) -> CommitInfo:
        r"""
        Pushes the pipeline, with a model card, to a repository on the Hub, which is made if it does not exist.

        Args:
            repo_id (`str`): `user/name`, or `name` for the owner of the token.
            commit_message (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*), create_pr
                (`bool`), safe_serialization (`bool`), variant (`str`, *optional*): As of diffusers.
            include_code (`bool`), max_shard_size (`int` or `str`, *optional*): As of `save_pretrained`.

        Returns:
            `huggingface_hub.CommitInfo`: With `pr_url` and `pr_revision` for `create_pr`.

        Raises:
            ValueError: If a network has a LoRA.
            huggingface_hub.errors.HfHubHTTPError: If the Hub refuses: no or a wrong token, no right to write there.
                Nothing has been uploaded then.
        """
        with tempfile.TemporaryDirectory() as folder:
            return self._save(
                folder,
                include_code=include_code,
                push_to_hub=True,
                repo_id=repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
            )

    def _save(
        self,
        save_directory: str | os.PathLike,
        *,
        include_code: bool,
        push_to_hub: bool,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> CommitInfo | None:
        _check_no_adapter(
            {f"`{name}`": part for name, part in self.components.items() if isinstance(part, torch.nn.Module)},
            "`save_lora_weights(folder, ...)`",
            "`unload_lora_weights()`",
            "`fuse_lora()` and `unload_lora_weights()`",
        )
        if push_to_hub:
            # First of all, so that a wrong token shows before anything is written.
            repo_id = repo_id or Path(save_directory).resolve().name
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        super().save_pretrained(save_directory, **kwargs)
        if include_code or _is_shipped(type(self)):
            self._write_code(Path(save_directory))
        if push_to_hub:
            return self._upload_folder(
                save_directory, repo_id, token=token, commit_message=commit_message, create_pr=create_pr
            )
        return None

    def _write_code(self, folder: Path) -> None:
        """Adds the code to a saved pipeline: one file a component, named in the index in place of its library."""
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        _write_code_file(type(self), folder / "pipeline.py")
        for name, component in self.components.items():
            cls = type(getattr(component, "_orig_mod", component))  # below what `torch.compile` wraps around it
            if cls.__module__.startswith("diffusers_adm.") or _is_shipped(cls):
                file = folder / name / f"{cls.__module__.rpartition('.')[2]}.py"
                _write_code_file(cls, file)
                index[name] = [file.stem, cls.__name__]
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_shipped(cls: type) -> bool:
    return cls.__module__.startswith("diffusers_modules.")  # where diffusers puts code from repositories


def _write_code_file(cls: type, path: Path) -> None:
    hub = _of_package("hub.export")
    if _is_shipped(cls) or hub is None:
        shutil.copyfile(inspect.getfile(cls), path)
    else:
        hub.export_class_file(cls, path)
