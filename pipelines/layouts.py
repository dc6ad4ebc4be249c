"""
Saved pipelines of diffusers whose components have other names than those of this package: those of latent diffusion
(Rombach et al. 2022, https://huggingface.co/papers/2112.10752), `LDMPipeline` and `LDMTextToImagePipeline`, such as
`CompVis/ldm-celebahq-256`; and those of unCLIP, `UnCLIPPipeline` and `UnCLIPImageVariationPipeline`, such as
`kakaobrain/karlo-v1-alpha`.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import hf_hub_download

from diffusers_adm.models.unclip_projection import UnCLIPProjectionModel
from diffusers_adm.schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler


# Arguments of `from_pretrained` that choose a file on the Hub.
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")


class LDMComponents(DiffusionPipeline):
    """The components of this layout, to load them as diffusers does: data types, variants, devices, the Hub."""

    _optional_components = ["vqvae", "bert", "tokenizer"]

    # Without types: the components are those of `ADMPipeline`, which has them.
    def __init__(self, unet, scheduler, vqvae, bert, tokenizer):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae, bert=bert, tokenizer=tokenizer)


class UnCLIPComponents(DiffusionPipeline):
    """The components of both pipelines of unCLIP; see [`LDMComponents`]."""

    _optional_components = [
        "text_encoder",
        "tokenizer",
        "prior",
        "prior_scheduler",
        "image_encoder",
        "feature_extractor",
        "super_res_first",
        "super_res_last",
        "super_res_scheduler",
    ]

    def __init__(
        self,
        decoder,
        decoder_scheduler,
        text_proj,
        text_encoder,
        tokenizer,
        prior,
        prior_scheduler,
        image_encoder,
        feature_extractor,
        super_res_first,
        super_res_last,
        super_res_scheduler,
    ):
        super().__init__()
        self.register_modules(
            decoder=decoder,
            decoder_scheduler=decoder_scheduler,
            text_proj=text_proj,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            prior=prior,
            prior_scheduler=prior_scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            super_res_first=super_res_first,
            super_res_last=super_res_last,
            super_res_scheduler=super_res_scheduler,
        )

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # diffusers has no public class for `text_proj`, and looks for the one of the index (`["unclip", ...]`) where it
        # is no more. The U-Nets and schedulers of the index have equivalents here.
        index = super()._dict_from_json_file(*args, **kwargs)
        for name, entry in index.items():
            if isinstance(entry, list) and entry[-1] in UNCLIP_CLASSES:
                index[name] = [__name__.partition(".")[0], UNCLIP_CLASSES[entry[-1]]]
        return index


# Classes of this package by those of the index of a saved pipeline.
UNCLIP_CLASSES = {
    "UnCLIPTextProjModel": "UnCLIPProjectionModel",
    "UnCLIPScheduler": "LearnedVarianceDDPMScheduler",
    "UNet2DConditionModel": "AdaGNUNet2DModel",
    "UNet2DModel": "AdaGNUNet2DModel",
}


def own_component(component: Any) -> Any:
    """
    A component of unCLIP as this package has it: the projection and the schedulers of diffusers' pipelines become those
    of this package, with the same weights and the same steps; others stay as they are.
    """
    name = type(component).__name__
    if name == "UnCLIPScheduler":
        return LearnedVarianceDDPMScheduler.from_config(component.config)
    if name == "UnCLIPTextProjModel":
        projection = UnCLIPProjectionModel.from_config(component.config)
        projection.load_state_dict(component.state_dict(), assign=True)
        return projection.train(component.training)
    return component


@dataclass(frozen=True)
class Layout:
    """
    The names of the components of a kind of saved pipelines.

    Attributes:
        names (`dict`): Names there by names here, of the components whose names differ.
        marker (`str`): The name here of a component that such a pipeline has under its other name.
        components (`type`): A pipeline with its names.
        convert (`Callable`): Makes components of this package from its ones.
    """

    names: Mapping[str, str]
    marker: str
    components: type[DiffusionPipeline]
    convert: Callable[[Any], Any] = field(default=lambda component: component)


LDM_LAYOUT = Layout({"vae": "vqvae", "text_encoder": "bert"}, "vae", LDMComponents)
UNCLIP_LAYOUT = Layout(
    {"unet": "decoder", "scheduler": "decoder_scheduler", "image_projection": "text_proj"},
    "unet",
    UnCLIPComponents,
    own_component,
)


def has_layout(
    layout: Layout, cls: type[DiffusionPipeline], path: str | os.PathLike, arguments: dict[str, Any]
) -> bool:
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
    return layout.names[layout.marker] in config and layout.marker not in config


def load_layout(
    layout: Layout, cls: type[DiffusionPipeline], path: str | os.PathLike, arguments: dict[str, Any]
) -> DiffusionPipeline:
    r"""
    Loads a saved pipeline of this layout as one of this package.

    Args:
        layout (`Layout`): The layout.
        cls (`type`): `ADMPipeline` or a subclass.
        path (`str` or `os.PathLike`), arguments (`dict`): Those of `cls.from_pretrained`. Components among them are
            taken in place of the saved ones.

    Raises:
        ValueError: If a component is neither saved nor given that the class needs.
    """
    renamed = layout.names
    modules, options = cls._get_signature_keys(cls)
    given = {name: arguments[name] for name in (*modules, *options) if name in arguments}
    others = {name: value for name, value in arguments.items() if name not in given}
    for name in ("dtype", "torch_dtype"):
        if isinstance(others.get(name), dict):  # by component
            others[name] = {renamed.get(component, component): dtype for component, dtype in others[name].items()}
    by_its_name = {renamed.get(name, name): value for name, value in given.items()}
    its_modules, _ = layout.components._get_signature_keys(layout.components)
    replaced = {name: by_its_name[name] for name in its_modules if name in by_its_name}
    loaded = layout.components.from_pretrained(path, **replaced, **others)

    saved = {name: layout.convert(getattr(loaded, renamed.get(name, name), None)) for name in modules}
    components = {**saved, **given}
    missing = [name for name in modules if components[name] is None and name not in cls._optional_components]
    if missing:
        raise ValueError(
            f"{path} holds none of {missing}, which `{cls.__name__}` needs. Pass them to `from_pretrained` by these "
            "names."
        )
    pipe = cls(**components)
    pipe.register_to_config(_name_or_path=loaded.config._name_or_path)
    names = {theirs: ours for ours, theirs in renamed.items()}
    for attribute in ("hf_device_map", "quantization_config"):  # which diffusers' `from_pretrained` sets
        if attribute in vars(loaded):
            value = vars(loaded)[attribute]
            if isinstance(value, dict):
                value = {names.get(name, name): entry for name, entry in value.items()}
            setattr(pipe, attribute, value)
    return pipe
