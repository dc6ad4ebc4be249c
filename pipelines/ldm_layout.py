"""
Saved pipelines of latent diffusion (Rombach et al. 2022, https://huggingface.co/papers/2112.10752) as diffusers'
`LDMPipeline` and `LDMTextToImagePipeline` hold them, such as `CompVis/ldm-celebahq-256`: some of their components have
other names.
"""

import json
import os
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import hf_hub_download


# Names of this layout by those of `ADMPipeline`.
LDM_NAMES = {"vae": "vqvae", "text_encoder": "bert"}
# Arguments of `from_pretrained` that choose a file on the Hub.
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")


class LDMComponents(DiffusionPipeline):
    """The components of this layout, to load them as diffusers does: data types, variants, devices, the Hub."""

    _optional_components = ["vqvae", "bert", "tokenizer"]

    # Without types: the components are those of `ADMPipeline`, which has them.
    def __init__(self, unet, scheduler, vqvae, bert, tokenizer):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae, bert=bert, tokenizer=tokenizer)


def has_ldm_layout(cls: type[DiffusionPipeline], path: str | os.PathLike, arguments: dict[str, Any]) -> bool:
    """
    Whether a saved pipeline, in a folder or on the Hub, is of this layout. `arguments` are those of
    `cls.from_pretrained`.
    """
    of_hub = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
    try:
        # Not by `cls.load_config`, which warns of an argument of its own at each download.
        index = path if os.path.isdir(path) else Path(hf_hub_download(str(path), cls.config_name, **of_hub)).parent
        config = json.loads(Path(index, cls.config_name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # diffusers' `from_pretrained`, which is called next, reads the same file and explains its error
    return LDM_NAMES["vae"] in config and "vae" not in config


def load_ldm_layout(
    cls: type[DiffusionPipeline], path: str | os.PathLike, arguments: dict[str, Any]
) -> DiffusionPipeline:
    r"""
    Loads a saved pipeline of this layout as one of this package.

    Args:
        cls (`type`): `ADMPipeline` or a subclass.
        path (`str` or `os.PathLike`), arguments (`dict`): Those of `cls.from_pretrained`. Components among them are
            taken in place of the saved ones.

    Raises:
        ValueError: If a component is neither saved nor given that the class needs.
    """
    modules, options = cls._get_signature_keys(cls)
    given = {name: arguments[name] for name in (*modules, *options) if name in arguments}
    others = {name: value for name, value in arguments.items() if name not in given}
    for name in ("dtype", "torch_dtype"):
        if isinstance(others.get(name), dict):  # by component
            others[name] = {LDM_NAMES.get(component, component): dtype for component, dtype in others[name].items()}
    by_its_name = {LDM_NAMES.get(name, name): value for name, value in given.items()}
    its_modules, _ = LDMComponents._get_signature_keys(LDMComponents)
    replaced = {name: by_its_name[name] for name in its_modules if name in by_its_name}
    loaded = LDMComponents.from_pretrained(path, **replaced, **others)

    saved = {name: getattr(loaded, LDM_NAMES.get(name, name), None) for name in modules}
    components = {**saved, **given}
    missing = [name for name in modules if components[name] is None and name not in cls._optional_components]
    if missing:
        raise ValueError(
            f"{path} holds none of {missing}, which `{cls.__name__}` needs. Pass them to `from_pretrained` by these "
            "names."
        )
    pipe = cls(**components)
    pipe.register_to_config(_name_or_path=loaded.config._name_or_path)
    names = {theirs: ours for ours, theirs in LDM_NAMES.items()}
    for attribute in ("hf_device_map", "quantization_config"):  # which diffusers' `from_pretrained` sets
        if attribute in vars(loaded):
            value = vars(loaded)[attribute]
            if isinstance(value, dict):
                value = {names.get(name, name): entry for name, entry in value.items()}
            setattr(pipe, attribute, value)
    return pipe
