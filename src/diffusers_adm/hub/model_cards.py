"""
Model cards for what is pushed to the Hub, from the object itself and from the folder of the run that trained it.

`model_card.md` is their template. The folder of a run holds `train_args.yaml`, `loss_curves.png`, `samples-*.png`, the
measures of the last validation for a diffusion model (`held_out.json`, `image_to_image.json`), an autoencoder
(`reconstruction.json`), a CLIP (`retrieval.json`) or a prior (`prior_similarity.json`) and, once measured,
`bits_per_dim.json` and `frechet.json`: the outputs of `python -m diffusers_adm.evaluation.bits_per_dim` and `...frechet
--json`. What is unknown is left out: a card claims no licence, data or score that is not found there.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, PriorTransformer
from diffusers.utils import PushToHubMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import CLIPModel

from ..conditioning.controlnet import controlnet_format_of, nets_of
from ..conditioning.image_format import ImageFormat, as_size
from ..conditioning.latents import downsampling_factor
from ..conditioning.previews import describe_preview
from ..data.autoencoder_record import load_autoencoder_record
from ..models import (
    AdaGNClassifierModel,
    AdaGNControlNetModel,
    AdaGNMultiControlNetModel,
    GLIDETextModel,
    UnCLIPProjectionModel,
)
from ..pipelines import (
    ADMControlNetPipeline,
    ADMImageToImagePipeline,
    ADMInpaintPipeline,
    ADMSuperResolutionPipeline,
    ADMUnCLIPPipeline,
)
from ..schedulers.noise_schedules import describe_noise_schedule
from .publishing import add_publishing


TEMPLATE = Path(__file__).with_name("model_card.md")
MARK = "<!-- Written by diffusers-adm. Without this line, the next push keeps the text as it is. -->"
DIFFUSERS_MARK = "This model card has been automatically generated."
MEASURED = ("model-index", "metrics", "base_model", "base_model_relation")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Embedded data sets by a part of their path: their description, and the licence of models trained only on them.
KNOWN_DATA = {
    "noto-emoji": (
        "[Noto Emoji](https://github.com/googlefonts/noto-emoji) by Google; image resources under the Apache License "
        "2.0, flags in the public domain or otherwise exempt from copyright",
        "apache-2.0",
    ),
    "twemoji": (
        "[Twemoji](https://github.com/jdecked/twemoji), graphics by Twitter, Inc. and other contributors, under "
        "[CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/)",
        "cc-by-4.0",
    ),
}
# Where a result goes is not part of the recipe.
NO_RECIPE = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_dir", "cache_dir"}
NO_RECIPE |= {"force_resume", "push_to_hub", "hub_model_id", "hub_private_repo"}
# Of frechet.json.
MEASURES = ("frechet_distance", "kernel_distance", "inception_score", "precision", "recall", "accuracy")
SCRIPTS = {
    AdaGNClassifierModel: "train_classifier.py",
    AdaGNControlNetModel: "train_controlnet.py",
    ADMImageToImagePipeline: "train_image_to_image.py",
    ADMSuperResolutionPipeline: "train_super_resolution.py",
    AutoencoderKL: "train_autoencoder.py",
    PriorTransformer: "train_prior.py",
    CLIPModel: "train_clip.py",
}
# Measures in image_to_image.json, with their names in a card.
TRANSLATION_MEASURES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "dice": "Dice coefficient"}
# Those in reconstruction.json.
RECONSTRUCTION_MEASURES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "rfid": "Frechet distance (rFID)"}
# Those in prior_similarity.json: cosine similarities to image embeddings.
PRIOR_MEASURES = {
    "similarity": "of the prediction",
    "best_similarity": "of the best of several predictions",
    "text_similarity": "of the text embedding",
    "shuffled_similarity": "of the prediction for another caption",
    "mean_similarity": "of the mean of the training data",
}
# Those in held_out.json, of the last validation of a diffusion model.
HELD_OUT_MEASURES = {"loss": "Loss", "bits_per_dim": "Bits per dimension", "frechet_distance": "Frechet distance"}
# Those in retrieval.json, which have standard errors.
RETRIEVAL_MEASURES = {
    "text_to_image_recall_at_1": "Text to image recall at 1",
    "text_to_image_recall_at_5": "Text to image recall at 5",
    "image_to_text_recall_at_1": "Image to text recall at 1",
    "image_to_text_recall_at_5": "Image to text recall at 5",
    "zero_shot_accuracy": "Zero-shot accuracy",
}
CLIP_SUMMARY = "Embeds images and texts in one space, in which an image is near to its captions."


class LoraAdapter(PushToHubMixin):
    """
    Low-rank adapter for a U-Net: the change that fine-tuning made to the weights of its base, which it needs.

    Args:
        folder (`str` or `os.PathLike`): Folder of the run that trained it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.config = {"_name_or_path": os.fspath(folder)}


@dataclass
class _Run:
    """What is known of a training run: its arguments (apart from `NO_RECIPE`) and measures."""

    folder: Path | None
    args: Mapping[str, Any]
    bits: Mapping[str, Any] | None
    frechet: Mapping[str, Any] | None
    translation: Mapping[str, Any] | None
    reconstruction: Mapping[str, Any] | None
    prior: Mapping[str, Any] | None
    retrieval: Mapping[str, Any] | None
    held_out: Mapping[str, Any] | None

    @classmethod
    def find(cls, pushed: Any, folder: Path) -> "_Run":
        """Read the folder of the run that trained `pushed`, if it is on this machine."""
        origin = _config(pushed).get("_name_or_path") or getattr(pushed, "_name_or_path", None)
        places = [folder]
        if origin and os.path.isdir(origin):
            places.append(Path(origin))
            if not isinstance(pushed, DiffusionPipeline):  # a component, from the folder of its pipeline
                places.append(Path(origin).resolve().parent)
        names = ("bits_per_dim", "frechet", "image_to_image", "reconstruction", "prior_similarity", "retrieval")
        names += ("held_out",)
        run = next((place for place in places if (place / "train_args.yaml").is_file()), None)
        if run is None:
            return cls(None, {}, *[None] * len(names))
        args = yaml.safe_load((run / "train_args.yaml").read_text(encoding="utf-8"))
        args = {name: value for name, value in args.items() if value is not None and name not in NO_RECIPE}
        paths = [run / f"{name}.json" for name in names]
        return cls(run, args, *(json.loads(path.read_text("utf-8")) if path.is_file() else None for path in paths))

    @property
    def features(self) -> str:
        kind, _, path = self.frechet["settings"]["features"].partition(":")
        return "Inception" if kind == "inception" else f"the classifier {_public(path)}"

    @property
    def translated(self) -> str:
        """The images on which an image to image model was measured, in words."""
        return _measured_images(self.translation)

    @property
    def reconstructed(self) -> str:
        """The same for an autoencoder."""
        return _measured_images(self.reconstruction)

    @property
    def known_data(self) -> list[tuple[str, str]]:
        """The entries of `KNOWN_DATA` for the data of the run; none unless all of them are known."""
        names = ("data_files", "train_data_dir", "dataset_name", "source_data_files", "source_data_dir")
        given = [self.args.get(name) for name in names]
        places = [str(place) for value in given if value for place in ([value] if isinstance(value, str) else value)]
        found = [[part for part in KNOWN_DATA if part in place] for place in places]
        return [KNOWN_DATA[part] for part in dict.fromkeys(sum(found, []))] if all(found) else []


def _config(pushed: Any) -> Mapping[str, Any]:
    """The config of a model of diffusers or transformers."""
    return pushed.config if isinstance(pushed.config, Mapping) else pushed.config.to_dict()


def _measured_images(measures: Mapping[str, Any]) -> str:
    return f"{measures['num_images']} {'held-out' if measures['held_out'] else 'training'} images"


def write_model_card(pushed: Any, folder: str | os.PathLike, repo_id: str, token: str | None = None) -> Path:
    """
    Write `README.md`, and the images that it shows, into a folder that is about to be pushed.

    A card that somebody wrote, in the folder or in the repository, keeps its text and gets the metadata it lacks. A
    card that this function wrote before keeps licence, data and tags; its text, measures and base are replaced.

    Args:
        pushed (pipeline, model or scheduler): The content of the folder. If it was loaded from the folder of a run, or
            `folder` is one, the card describes the run.
        folder (`str` or `os.PathLike`): The folder.
        repo_id (`str`): `user/name`.
        token (`str`, *optional*): For a private repository that has a card.

    Returns:
        `Path`: The card.
    """
    folder = Path(folder)
    path = folder / "README.md"
    card = _existing_card(path, repo_id, token)
    run = _Run.find(pushed, folder)
    data = _metadata(pushed, repo_id, run)
    if card is not None:
        kept = card.data.to_dict()
        if MARK in card.text:
            kept = {name: value for name, value in kept.items() if name not in MEASURED}
        data = ModelCardData(**(data.to_dict() | kept), ignore_metadata_errors=True)
        card.data = data
    if card is None or MARK in card.text or DIFFUSERS_MARK in card.text:
        card = ModelCard.from_template(data, str(TEMPLATE), **_template_variables(pushed, folder, repo_id, run))
        card.text = re.sub(r"\n{3,}", "\n\n", card.text).strip() + "\n"
    card.save(path)
    return path


def _existing_card(path: Path, repo_id: str, token: str | None) -> ModelCard | None:
    if path.is_file():
        card = ModelCard.load(path)
        if DIFFUSERS_MARK not in card.text:
            return card
    try:  # downloaded again: an old copy in the cache would undo later edits
        return ModelCard.load(hf_hub_download(repo_id, "README.md", token=token, force_download=True))
    except LocalEntryNotFoundError:  # the Hub did not answer, which does not mean that there is no card
        raise
    except EntryNotFoundError:
        return None


def _public(value: Any) -> Any:
    """The value, with paths to files or folders of this machine cut to their last two parts."""
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str) or not (os.path.isabs(value) or ".." in Path(value).parts):
        return value
    return "/".join(["...", *[part for part in Path(value).parts if part not in ("..", os.sep)][-2:]])


def _names(places: str | Sequence[str]) -> str:
    """The names of the images that something was measured on: a data set of the Hub, or the ends of paths."""
    return ", ".join(_public([places] if isinstance(places, str) else list(places)))


def _task(pushed: Any) -> str | None:
    """The Hub's name for the task. Class-conditional generation has none of its own and counts as unconditional."""
    from_image = (ADMImageToImagePipeline, ADMInpaintPipeline, ADMSuperResolutionPipeline)
    from_image += (ADMControlNetPipeline, AdaGNControlNetModel)
    if isinstance(pushed, from_image):
        return "image-to-image"
    if isinstance(pushed, AdaGNClassifierModel):
        return "image-classification"
    if isinstance(pushed, (GLIDETextModel, PriorTransformer, UnCLIPProjectionModel)):
        return "feature-extraction"
    if isinstance(pushed, AutoencoderKL):
        return "image-feature-extraction"
    if isinstance(pushed, CLIPModel):
        return "zero-shot-image-classification"
    if isinstance(pushed, ADMUnCLIPPipeline) and not _takes_prompts(pushed) and pushed.image_encoder is not None:
        return "image-to-image"
    if isinstance(pushed, DiffusionPipeline) and _takes_prompts(pushed):
        return "text-to-image"
    return "unconditional-image-generation" if isinstance(pushed, (DiffusionPipeline, ModelMixin)) else None


def _takes_prompts(pipe: DiffusionPipeline) -> bool:
    return pipe.text_encoder is not None or getattr(pipe, "prior", None) is not None


def _metadata(pushed: Any, repo_id: str, run: _Run) -> ModelCardData:
    measured: list[tuple[str, str, str, float]] = []  # data, type, name, value
    if run.bits is not None:
        data = _names(run.bits.get("settings", {}).get("dataset", "held-out images"))
        measured.append((data, "bits_per_dim", "Variational bound (bits per dimension)", run.bits["bits_per_dim"]))
    if run.frechet is not None:
        data, origin = _names(run.frechet["settings"]["reference"]), f"features of {run.features}"
        for measure in MEASURES:
            if run.frechet.get(measure) is not None:
                # Leaderboards compare by the name "fid", which stands for Inception's features only.
                kind = "fid" if (measure, run.features) == ("frechet_distance", "Inception") else measure
                name = f"{measure.replace('_', ' ').capitalize()} ({run.frechet['num_samples']} samples, {origin})"
                measured.append((data, kind, name, run.frechet[measure]))
    for values, names in (
        (run.translation, TRANSLATION_MEASURES),
        (run.reconstruction, RECONSTRUCTION_MEASURES),
        (run.retrieval, RETRIEVAL_MEASURES),
        (run.held_out, {"loss": HELD_OUT_MEASURES["loss"]}),
    ):
        if values is not None:
            names_of_data = ("validation_data_files", "validation_data_dir", "validation_split")
            places = next((run.args[name] for name in names_of_data if run.args.get(name)), None)
            places = places if values["held_out"] else None
            data = _names(places or "training images")
            for measure, name in names.items():
                if measure in values:
                    measured.append((data, measure, f"{name} of {_measured_images(values)}", values[measure]))
    if run.prior is not None:
        data = _names(run.args.get("validation_data_dir", "held-out images"))
        for measure in ("similarity", "text_similarity", "shuffled_similarity"):
            if measure in run.prior:
                name = f"Cosine similarity {PRIOR_MEASURES[measure]} to {run.prior['num_images']} image embeddings"
                measured.append((data, f"cosine_{measure}", name, run.prior[measure]))
    task = _task(pushed)
    results = [
        EvalResult(
            task_type=task or "unconditional-image-generation",
            dataset_type=data,
            dataset_name=data,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for data, kind, name, value in measured
    ]

    name, known = type(pushed).__name__, run.known_data
    data_set, base = (
        value if value and HUB_ID.fullmatch(value) and not os.path.exists(value) else None
        for value in (run.args.get("dataset_name"), run.args.get("pretrained_model_name_or_path"))
    )
    # The licence of pretrained weights applies as well.
    parts = ("pretrained_model", "text_encoder", "image_encoder")
    has_pretrained = any(run.args.get(f"{part}_name_or_path") for part in parts)
    needs_base = isinstance(pushed, (AdaGNControlNetModel, LoraAdapter))
    tags = [f"diffusers:{name}"] if isinstance(pushed, DiffusionPipeline) else []
    is_clip = isinstance(pushed, CLIPModel)
    tags += ["diffusers-adm", "clip" if is_clip else "ablated-diffusion-model", name]
    tags += ["lora"] if isinstance(pushed, LoraAdapter) else []
    return ModelCardData(
        library_name="transformers" if is_clip else "diffusers",
        pipeline_tag=task,
        license=known[0][1] if len(known) == 1 and not has_pretrained else None,
        datasets=[data_set] if data_set else None,
        base_model=base,
        base_model_relation=("adapter" if needs_base else "finetune") if base else None,
        tags=tags,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
    )


def _summary(cls: type) -> str:
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def _template_variables(pushed: Any, folder: Path, repo_id: str, run: _Run) -> dict[str, Any]:
    kinds = {DiffusionPipeline: "pipeline", AdaGNControlNetModel: "controlnet", AdaGNClassifierModel: "classifier"}
    kinds |= {LoraAdapter: "adapter", AutoencoderKL: "autoencoder", CLIPModel: "clip", PriorTransformer: "prior"}
    noise_schedule = pushed.config.get("noise_schedule") if isinstance(pushed, ModelMixin) else None
    recipe = {name: _public(value) for name, value in run.args.items()}
    return {
        "mark": MARK,
        "pushed": pushed,
        "class_name": type(pushed).__name__,
        "kind": next((kind for cls, kind in kinds.items() if isinstance(pushed, cls)), "model"),
        "summary": CLIP_SUMMARY if isinstance(pushed, CLIPModel) else _summary(type(pushed)),
        "repo_id": repo_id,
        "run": run,
        "images": _copy_images(run.folder, folder),
        "base": _public(run.args.get("pretrained_model_name_or_path", "the/base")),
        "variant": _variant(folder),
        "has_code": (folder / "pipeline.py").is_file(),
        "script": next((script for cls, script in SCRIPTS.items() if isinstance(pushed, cls)), "train_adm.py"),
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip() if recipe else "",
        "measures": MEASURES,
        "translation_measures": TRANSLATION_MEASURES,
        "reconstruction_measures": RECONSTRUCTION_MEASURES,
        "prior_measures": PRIOR_MEASURES,
        "clip": _public(run.args.get("clip", "its author")),
        "retrieval_measures": RETRIEVAL_MEASURES,
        "held_out_measures": HELD_OUT_MEASURES,
        "rfid_network": _public((run.reconstruction or {}).get("rfid_network")),
        "source_format": pushed.source_format if isinstance(pushed, ADMImageToImagePipeline) else None,
        "names": _names,
        **_format_variables(pushed, folder, run),
        "factor": downsampling_factor(pushed) if isinstance(pushed, AutoencoderKL) else None,
        "is_for_clean_images": noise_schedule == {},
        "noise_schedule": describe_noise_schedule(noise_schedule) if noise_schedule else "",
    }


def _format_variables(pushed: Any, folder: Path, run: _Run) -> dict[str, Any]:
    """What the card says of size and format of the images; None where the config does not tell."""
    is_pipeline = isinstance(pushed, DiffusionPipeline)
    config = _config(pushed)
    recorded = config.get("image_format")
    if isinstance(pushed, AutoencoderKL):  # whose config has no such entry
        recorded = (load_autoencoder_record(folder) or {}).get("image_format")
    image_format = None if recorded is None else ImageFormat.from_config(recorded, recorded["channels"])
    conditions = config.get("condition_format")
    size = as_size(pushed.unet.config.get("sample_size") if is_pipeline else config.get("sample_size"))
    if isinstance(pushed, CLIPModel):
        size = as_size(pushed.config.vision_config.image_size)
    if size is not None and is_pipeline:  # of latents, if there is an autoencoder
        factor = downsampling_factor(getattr(pushed, "vae", None))
        size = size[0] * factor, size[1] * factor
    why_no_pil = None if image_format is None else image_format.why_no_pil
    call = ""  # the output of other pipelines needs no explanation
    if is_pipeline and (why_no_pil is not None or isinstance(pushed, ADMImageToImagePipeline)):
        call = _call(pushed, why_no_pil is None)
    return {
        "size": None if size is None else "{}x{}".format(*size),  # HEIGHTxWIDTH
        "image_format": image_format,
        "condition_format": None if conditions is None else ImageFormat.from_config(conditions, conditions["channels"]),
        "preview": None if image_format is None else describe_preview(image_format, run.args.get("preview_channels")),
        "why_no_pil": why_no_pil,
        "call": call,
    }


def _call(pipe: DiffusionPipeline, shows_pil: bool) -> str:
    """Code that calls a pipeline on files of its images, as far as it needs any."""
    files: dict[str, ImageFormat] = {}  # by the name of a variable
    arguments = []
    if isinstance(pipe, ADMControlNetPipeline):
        nets = nets_of(pipe.controlnet)
        names = ["image"] if len(nets) == 1 else [f"image_{i}" for i in range(len(nets))]
        files = {name: controlnet_format_of(net) for name, net in zip(names, nets, strict=True)}
        is_list = isinstance(pipe.controlnet, AdaGNMultiControlNetModel)
        arguments = [f"image=[{', '.join(names)}]" if is_list else "image=image"]
    elif _task(pipe) == "image-to-image":
        is_translation = isinstance(pipe, ADMImageToImagePipeline)
        files, arguments = {"image": pipe.source_format if is_translation else pipe.image_format}, ["image=image"]
        if isinstance(pipe, ADMInpaintPipeline):
            files["mask"] = ImageFormat("L", 1)
            arguments += ["mask_image=mask"]
    if _takes_prompts(pipe):
        arguments.append('prompt="..."')
    elif pipe.config.get("id2label"):
        arguments.append(f"class_labels={next(iter(pipe.config['id2label'].values()))!r}")
    if not shows_pil:
        arguments.append('output_type="np"')
    lines = [_reading(name, image_format) for name, image_format in files.items()]
    if any("Image.open" in line for line in lines):
        lines.insert(0, "from PIL import Image")
    if any("np.load" in line for line in lines):
        lines.insert(0, "import numpy as np")
    shape = "" if shows_pil else "  # (batch_size, height, width, channels)"
    return "\n".join([*lines, f"images = pipe({', '.join(arguments)}).images{shape}"])


def _reading(name: str, image_format: ImageFormat) -> str:
    """A line of code that reads images of a format from a file."""
    if name == "mask":
        return 'mask = Image.open("mask.png").convert("L")  # white is inpainted'
    if image_format.is_viewable:
        return f'{name} = Image.open("{name}.png")  # {image_format}'
    return f'{name} = np.load("{name}.npy")  # (height, width, channels), {image_format}'


def _copy_images(run: Path | None, folder: Path) -> set[str]:
    found = {}
    if run is not None:
        samples = sorted(run.glob("samples-*.png")) + sorted(run.glob("samples.png"))
        found = {"samples.png": samples[-1]} if samples else {}
        curves = [run / name for name in ("loss_curves.png", "classifier_curves.png") if (run / name).is_file()]
        found |= {"loss_curves.png": curves[-1]} if curves else {}
    for name, path in found.items():
        (folder / "images").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "images" / name)
    return set(found)


def _variant(folder: Path) -> str:
    """The `variant` argument of `from_pretrained`, if the folder only has weights of a variant."""
    names = [path.name for path in folder.rglob("*.safetensors")]
    found = {match[1] for name in names if (match := re.search(r"\.(\w+?)(-\d+-of-\d+)?\.safetensors$", name))}
    is_plain = any(name.count(".") == 1 for name in names)
    return f', variant="{sorted(found)[0]}"' if found and not is_plain else ""


add_publishing(LoraAdapter, write_model_card)
