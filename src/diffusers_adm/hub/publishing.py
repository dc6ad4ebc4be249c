"""
Methods for the Hub that are added to networks, schedulers and pipelines from outside: see `add_publishing`.

The exporter puts this module into the files that it writes. So it imports nothing from this package; model cards and
the exporter itself, which need the package, are passed in.
"""

import functools
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import CommitInfo, create_repo


def add_publishing(
    cls: type,
    write_card: Callable[..., object] | None = None,
    write_code: Callable[[type, Path], object] | None = None,
) -> None:
    """
    Give a network, scheduler or pipeline its methods for the Hub. Its subclasses inherit them.

    Whatever is pushed gets a model card and loses the paths of this machine. A network with a LoRA is not saved,
    because `from_pretrained` could not find its weights. A pipeline takes `include_code=True`, and one that was loaded
    by the code in its repository keeps that code. All this comes from outside, so that a class inherits nothing from
    `hub`, and its module imports nothing from there.

    Args:
        cls (`type`): A subclass of `ModelMixin`, `SchedulerMixin` or `DiffusionPipeline`. If it has the methods
            already, nothing changes.
        write_card (callable, *optional*): `write_model_card`. Without it, diffusers' card is pushed.
        write_code (callable, *optional*): `export_class_file`. Without it, a pipeline ships the file it comes from.
    """
    if hasattr(cls, "_publishes"):
        return
    cls._publishes = True  # type: ignore[attr-defined]
    if issubclass(cls, diffusers.DiffusionPipeline):
        _add_pipeline_methods(cls, write_code)
    elif issubclass(cls, diffusers.ModelMixin):
        _refuse_adapters(cls)
    upload = cls._upload_folder  # type: ignore[attr-defined]

    @functools.wraps(upload)  # the last call of diffusers, however something is pushed
    def _upload_folder(
        self: Any, working_dir: str | os.PathLike, repo_id: str, token: str | None = None, *args: Any, **kwargs: Any
    ) -> CommitInfo:
        if write_card is not None and not kwargs.get("subfolder"):
            write_card(self, working_dir, repo_id, token=token)
        drop_local_paths(Path(working_dir))
        return upload(self, working_dir, repo_id, token, *args, **kwargs)

    cls._upload_folder = _upload_folder  # type: ignore[attr-defined]


def _refuse_adapters(cls: Any) -> None:
    save = cls.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        unload = "`unload_lora()`"
        _check_no_adapter({"the model": self}, "`save_lora_adapter(folder)`", unload, f"`fuse_lora()` and {unload}")
        save(self, *args, **kwargs)

    cls.save_pretrained = save_pretrained


def _check_no_adapter(networks: dict[str, torch.nn.Module], save_alone: str, unload: str, fuse: str) -> None:
    """
    Raise a `ValueError` if one of `networks`, keyed by their names, has a LoRA, even a fused one. PEFT renames the
    layers that it adapts, so `from_pretrained` would initialise them at random.
    """
    for name, network in networks.items():
        renamed = next((key for key, _ in network.named_parameters() if ".base_layer." in key), None)
        if renamed is not None:
            raise ValueError(
                f"`save_pretrained` cannot save a LoRA: {name} has one loaded, and `from_pretrained` would not find "
                f"the weights that it has renamed, such as {renamed}. Save only the LoRA with {save_alone}, or call "
                f"{fuse} first to save the sum of both, or {unload} to save the weights without it."
            )


def drop_local_paths(folder: Path) -> None:
    """Remove from configs the folder that they were loaded from, which exists only on this machine."""
    for path in [*folder.rglob("model_index.json"), *folder.rglob("*config.json")]:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue
        for key in ("_name_or_path", "name_or_path"):
            place = content.get(key)
            if isinstance(place, str) and (os.path.isabs(place) or os.path.exists(place)):
                del content[key]
                path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_pipeline_methods(cls: Any, write_code: Callable[[type, Path], object] | None) -> None:
    save = cls.save_pretrained

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        include_code: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo | None:
        r"""
        Save the pipeline as [`DiffusionPipeline.save_pretrained`] does.

        Args:
            save_directory (`str` or `os.PathLike`), safe_serialization (`bool`), variant (`str`, *optional*),
                max_shard_size (`int` or `str`, *optional*): See [`DiffusionPipeline.save_pretrained`].
            push_to_hub (`bool`): Whether to push the folder as well, with a model card.
            use_flashpack (`bool`): See [`DiffusionPipeline.save_pretrained`].
            include_code (`bool`): Whether to write the code of the pipeline and its components alongside the weights.
                Where this package is not installed, the repository then loads with
                `DiffusionPipeline.from_pretrained(repository, custom_pipeline="pipeline", trust_remote_code=True)`;
                where it is, as any other and with the installed code. A pipeline that was loaded in the former way
                always keeps its code.
            repo_id (`str`, *optional*): For `push_to_hub`; defaults to the name of the folder.
            commit_message (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*), create_pr
                (`bool`): For `push_to_hub`.

        Returns:
            `huggingface_hub.CommitInfo`: For `push_to_hub`, otherwise `None`.

        Raises:
            ValueError: If a network has a LoRA.
        """
        _check_no_adapter(
            {f"`{name}`": part for name, part in self.components.items() if isinstance(part, torch.nn.Module)},
            "`save_lora_weights(folder, ...)`",
            "`unload_lora_weights()`",
            "`fuse_lora()` and `unload_lora_weights()`",
        )
        if push_to_hub:  # first, so that a wrong token is found before anything is written
            repo_id = repo_id or Path(save_directory).resolve().name
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        save(self, save_directory, safe_serialization, variant, max_shard_size, use_flashpack=use_flashpack)
        if include_code or _is_shipped(type(self)):
            _add_code(self, Path(save_directory), write_code)
        if not push_to_hub:
            return None
        return self._upload_folder(
            save_directory, repo_id, token=token, commit_message=commit_message, create_pr=create_pr
        )

    def push_to_hub(
        self: Any,
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
        Push the pipeline, with a model card, to a repository on the Hub. The repository is created if necessary.

        Args:
            repo_id (`str`): `user/name`, or `name` for the owner of the token.
            commit_message (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*), create_pr
                (`bool`), safe_serialization (`bool`), variant (`str`, *optional*): See `PushToHubMixin.push_to_hub`.
            include_code (`bool`), max_shard_size (`int` or `str`, *optional*): See `save_pretrained`.

        Returns:
            `huggingface_hub.CommitInfo`: With `pr_url` and `pr_revision` for `create_pr`.

        Raises:
            ValueError: If a network has a LoRA.
            huggingface_hub.errors.HfHubHTTPError: If the Hub refuses the token or denies write access. Nothing has been
                uploaded then.
        """
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(
                folder,
                safe_serialization,
                variant,
                max_shard_size,
                push_to_hub=True,
                include_code=include_code,
                repo_id=repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
            )

    for method in (save_pretrained, push_to_hub):
        method.__qualname__ = f"{cls.__name__}.{method.__name__}"
        setattr(cls, method.__name__, method)


def _add_code(pipe: Any, folder: Path, write_code: Callable[[type, Path], object] | None) -> None:
    """Add the code to a saved pipeline: one file per component, which the index names in place of a library."""

    def write(cls: type, path: Path) -> None:
        if write_code is None or _is_shipped(cls):
            shutil.copyfile(inspect.getfile(cls), path)
        else:
            write_code(cls, path)

    write(type(pipe), folder / "pipeline.py")
    index_file = folder / pipe.config_name
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for name, component in pipe.components.items():
        cls = type(getattr(component, "_orig_mod", component))  # inside the wrapper of `torch.compile`
        if cls.__module__.startswith("diffusers_adm.") or _is_shipped(cls):
            file = folder / name / f"{cls.__module__.rpartition('.')[2]}.py"
            write(cls, file)
            index[name] = [file.stem, cls.__name__]
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_shipped(cls: type) -> bool:
    return cls.__module__.startswith("diffusers_modules.")  # where diffusers puts code from repositories
