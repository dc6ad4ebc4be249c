"""
Model cards of what is pushed to the Hub, from the object itself and from the folder of the run that trained it.

A run's folder holds `train_args.yaml`, `loss_curves.png`, `samples-*.png` and, once measured, `bits_per_dim.json` and
`frechet.json`: what `python -m diffusers_adm.evaluation.bits_per_dim` writes, and what `...frechet --json` prints. What
is not known is left out: a card claims no licence, data or score that nothing here tells.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import PushToHubMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..models import AdaGNClassifierModel, AdaGNControlNetModel, GLIDETextModel
from ..pipelines import ADMControlNetPipeline, ADMInpaintPipeline, ADMSuperResolutionPipeline
from ..schedulers.noise_schedules import describe_noise_schedule
from .publishing import add_publishing


MARK = "<!-- Written by diffusers-adm. Without this line, the next push keeps the text as it is. -->"
DIFFUSERS_MARK = "This model card has been automatically generated."
MEASURED = ("model-index", "metrics", "base_model", "base_model_relation")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Embedded data sets by a part of their path: what to say about them, and the licence of models trained on them alone.
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
# Where a run's result goes is no part of its recipe.
NO_RECIPE = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_dir", "cache_dir"}
NO_RECIPE |= {"force_resume", "push_to_hub", "hub_model_id", "hub_private_repo"}
CURVES = ("loss_curves.png", "classifier_curves.png")
MEASURES = ("frechet_distance", "inception_score", "precision", "recall", "accuracy")  # of frechet.json
SCRIPTS = {
    AdaGNClassifierModel: "train_classifier.py",
    AdaGNControlNetModel: "train_controlnet.py",
    ADMSuperResolutionPipeline: "train_super_resolution.py",
}


class LoraAdapter(PushToHubMixin):
    """
    Low-rank adapter for a U-Net: what fine-tuning added to the weights of its base, which it needs.

    Args:
        folder (`str` or `os.PathLike`): Of the run that trained it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.config = {"_name_or_path": os.fspath(folder)}


def write_model_card(pushed: Any, folder: str | os.PathLike, repo_id: str, token: str | None = None) -> Path:
    """
    Writes `README.md`, and the pictures that it shows, into a folder that is about to be pushed.

    A card that somebody wrote, in the folder or in the repository, keeps its text; it gets the metadata it lacks. Of a
    card that this function wrote before, licence, data and tags stay; measures and base are those of this time.

    Args:
        pushed (pipeline, model or scheduler): What the folder holds. Where it was loaded from the folder of a run, or
            `folder` is one, the card tells of the run.
        folder (`str` or `os.PathLike`): The folder.
        repo_id (`str`): `user/name`.
        token (`str`, *optional*): For a private repository that has a card.

    Returns:
        `Path`: The card.
    """
    folder = Path(folder)
    path = folder / "README.md"
    existing = _existing_card(path, repo_id, token)
    run = _find_run(pushed, folder)
    args = _read_args(run)
    data = _metadata(pushed, repo_id, run, args)
    if existing is not None:
        kept = existing.data.to_dict()
        if MARK in existing.text:  # what was measured goes with the text, which is written anew
            kept = {name: value for name, value in kept.items() if name not in MEASURED}
        data = ModelCardData(**(data.to_dict() | kept), ignore_metadata_errors=True)
    is_ours = existing is None or MARK in existing.text or DIFFUSERS_MARK in existing.text
    text = _text(pushed, folder, repo_id, run, args) if is_ours else existing.text
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n").save(path)
    return path


def _existing_card(path: Path, repo_id: str, token: str | None) -> ModelCard | None:
    if path.is_file():
        card = ModelCard.load(path)
        if DIFFUSERS_MARK not in card.text:
            return card
    try:  # anew: an old copy in the cache would undo what somebody wrote since
        return ModelCard.load(hf_hub_download(repo_id, "README.md", token=token, force_download=True))
    except LocalEntryNotFoundError:  # the Hub did not answer, which does not mean that there is no card
        raise
    except EntryNotFoundError:
        return None


def _find_run(pushed: Any, folder: Path) -> Path | None:
    """The folder of the run that trained it, if it is on this machine."""
    origin = pushed.config.get("_name_or_path") or getattr(pushed, "_name_or_path", None)
    places = [folder]
    if origin and os.path.isdir(origin):
        places.append(Path(origin))
        if not isinstance(pushed, DiffusionPipeline):  # a part, from the folder of its pipeline
            places.append(Path(origin).resolve().parent)
    return next((place for place in places if (place / "train_args.yaml").is_file()), None)


def _read_args(run: Path | None) -> dict[str, Any]:
    """The recipe of a run: arguments that were given a value. They may hold paths, see `_public`."""
    if run is None:
        return {}
    import yaml

    args = yaml.safe_load((run / "train_args.yaml").read_text(encoding="utf-8"))
    return {name: value for name, value in args.items() if value is not None and name not in NO_RECIPE}


def _public(value: Any) -> Any:
    """Of the path to a file or folder on somebody's machine, the end alone."""
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str) or not (os.path.isabs(value) or ".." in Path(value).parts):
        return value
    return "/".join(["...", *[part for part in Path(value).parts if part not in ("..", os.sep)][-2:]])


def _read_measured(run: Path | None, name: str) -> Mapping[str, Any] | None:
    path = run / name if run is not None else None
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None


def _names(places: str | Sequence[str]) -> str:
    """Of the images that something was measured on: a data set of the Hub, or the ends of paths."""
    return ", ".join(_public([places] if isinstance(places, str) else list(places)))


def _eval_results(pushed: Any, run: Path | None) -> list[EvalResult]:
    found: list[tuple[str, str, str, float]] = []  # data, type, name, value
    if (bits := _read_measured(run, "bits_per_dim.json")) is not None:
        data = _names(bits.get("settings", {}).get("dataset", "held-out images"))
        found.append((data, "bits_per_dim", "Variational bound (bits per dimension)", bits["bits_per_dim"]))
    if (frechet := _read_measured(run, "frechet.json")) is not None:
        data, features, images = _names(frechet["settings"]["reference"]), _features(frechet), frechet["num_samples"]
        for measure in MEASURES:
            if frechet.get(measure) is not None:
                # The name that leaderboards compare by is for Inception's features alone.
                kind = "fid" if (measure, features) == ("frechet_distance", "Inception") else measure
                name = f"{measure.replace('_', ' ').capitalize()} ({images} samples, features of {features})"
                found.append((data, kind, name, frechet[measure]))
    return [
        EvalResult(
            task_type=_task(pushed) or "unconditional-image-generation",
            dataset_type=data,
            dataset_name=data,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for data, kind, name, value in found
    ]


def _features(frechet: Mapping[str, Any]) -> str:
    kind, _, path = frechet["settings"]["features"].partition(":")
    return "Inception" if kind == "inception" else f"the classifier {_public(path)}"


def _known_data(args: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of the data: nothing, unless all of it is known."""
    given = [args.get(name) for name in ("data_files", "train_data_dir", "dataset_name")]
    places = [str(place) for value in given if value for place in ([value] if isinstance(value, str) else value)]
    found = [[part for part in KNOWN_DATA if part in place] for place in places]
    return [KNOWN_DATA[part] for part in dict.fromkeys(sum(found, []))] if all(found) else []


def _task(pushed: Any) -> str | None:
    """The Hub's word. It has none for "by class", which is counted with what needs no input but noise."""
    if isinstance(pushed, (ADMInpaintPipeline, ADMSuperResolutionPipeline, ADMControlNetPipeline)):
        return "image-to-image"
    if isinstance(pushed, AdaGNControlNetModel):
        return "image-to-image"
    if isinstance(pushed, AdaGNClassifierModel):
        return "image-classification"
    if isinstance(pushed, GLIDETextModel):
        return "feature-extraction"
    if isinstance(pushed, DiffusionPipeline):
        return "unconditional-image-generation" if pushed.text_encoder is None else "text-to-image"
    return "unconditional-image-generation" if isinstance(pushed, ModelMixin) else None


def _metadata(pushed: Any, repo_id: str, run: Path | None, args: Mapping[str, Any]) -> ModelCardData:
    known = _known_data(args)
    data_set, base = args.get("dataset_name"), args.get("pretrained_model_name_or_path")
    is_hub_id = {
        value: bool(value and HUB_ID.fullmatch(value) and not os.path.exists(value)) for value in (data_set, base)
    }
    foreign = base or args.get("text_encoder_name_or_path")  # weights of others are in it, whose terms count, too
    tags = ["diffusers-adm", "ablated-diffusion-model", type(pushed).__name__]
    if isinstance(pushed, DiffusionPipeline):
        tags.insert(0, f"diffusers:{type(pushed).__name__}")
    if isinstance(pushed, LoraAdapter):
        tags.append("lora")
    results = _eval_results(pushed, run)
    is_beside_base = isinstance(pushed, (AdaGNControlNetModel, LoraAdapter))
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=_task(pushed),
        license=known[0][1] if len(known) == 1 and not foreign else None,
        datasets=[data_set] if is_hub_id[data_set] else None,
        base_model=base if is_hub_id[base] else None,
        base_model_relation=("adapter" if is_beside_base else "finetune") if is_hub_id[base] else None,
        tags=tags,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
    )


def _text(pushed: Any, folder: Path, repo_id: str, run: Path | None, args: Mapping[str, Any]) -> str:
    parts = [MARK, f"# {repo_id.rpartition('/')[2]}", _description(pushed)]
    pictures = _copy_pictures(run, folder)
    if "samples.png" in pictures:
        parts.append("![Samples](images/samples.png)")
    parts += ["## How to load it", _loading(pushed, folder, repo_id, args)]
    if args:
        script = next((script for cls, script in SCRIPTS.items() if isinstance(pushed, cls)), "train_adm.py")
        import yaml

        recipe = yaml.safe_dump(
            {name: _public(value) for name, value in args.items()}, sort_keys=False, allow_unicode=True
        ).strip()
        parts += [
            "## Training",
            f"With diffusers-adm, `train_args.yaml` holding the recipe below:\n\n```bash\naccelerate launch "
            f"training/{script} --config train_args.yaml\n```",
            f"<details><summary>train_args.yaml</summary>\n\n```yaml\n{recipe}\n```\n\n</details>",
        ]
    if "loss_curves.png" in pictures:
        parts.append("![Loss](images/loss_curves.png)")
    parts += _measured(run)
    parts += ["## Limits", _limits(pushed)]
    if args:
        known = [text for text, _ in _known_data(args)]
        named = _public(args.get("dataset_name")) or "images of its author's, whose rights this card does not know"
        parts += ["## Data", f"Trained on {'; '.join(known) or named}."]
    return "\n\n".join(parts)


def _measured(run: Path | None) -> list[str]:
    lines = []
    if (bits := _read_measured(run, "bits_per_dim.json")) is not None:
        lines.append(
            f"Variational bound: {bits['bits_per_dim']:.3f} ± {bits['bits_per_dim_standard_error']:.3f} bits per "
            f"dimension (mean and standard error of {bits['num_images']} images, {bits['num_timesteps']} timesteps)."
        )
    if (frechet := _read_measured(run, "frechet.json")) is not None:
        values = [f"{name.replace('_', ' ')} {frechet[name]:.4g}" for name in MEASURES if frechet.get(name) is not None]
        lines.append(
            f"By the features of {_features(frechet)}: {', '.join(values)} ({frechet['num_samples']} samples against "
            f"{frechet['num_reference']} images of {_names(frechet['settings']['reference'])}). Compare them with "
            "figures of the same features, numbers and images alone."
        )
    return ["## Measured", *lines] if lines else []


def _copy_pictures(run: Path | None, folder: Path) -> set[str]:
    if run is None:
        return set()
    grids = sorted(run.glob("samples-*.png")) + sorted(run.glob("samples.png"))
    found = {"samples.png": grids[-1]} if grids else {}
    for name in CURVES:
        if (run / name).is_file():
            found["loss_curves.png"] = run / name
    for name, path in found.items():
        (folder / "images").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "images" / name)
    return set(found)


def _description(pushed: Any) -> str:
    described = (type(pushed).__doc__ or "").strip().split("\n\n")[0]
    described = " ".join(line.strip() for line in described.splitlines())
    lines = [f"`{type(pushed).__name__}` of diffusers-adm. {described}"]
    if isinstance(pushed, DiffusionPipeline):
        unet = pushed.unet.config
        lines.append(f"{unet.sample_size}x{unet.sample_size} {'latents' if pushed.vae is not None else 'pixels'}.")
        if pushed.id2label:
            lines.append("Classes: " + ", ".join(f"{number} {name}" for number, name in pushed.id2label.items()) + ".")
    if isinstance(pushed, ModelMixin):
        lines.append(f"{sum(parameter.numel() for parameter in pushed.parameters()):,} parameters.")
    return "\n\n".join(lines)


def _variant(folder: Path) -> str:
    """What `from_pretrained` must be told besides the name, where the weights are those of a variant alone."""
    names = [path.name for path in folder.rglob("*.safetensors")]
    found = {match[1] for name in names if (match := re.search(r"\.(\w+?)(-\d+-of-\d+)?\.safetensors$", name))}
    is_plain = any(name.count(".") == 1 for name in names)
    return f', variant="{sorted(found)[0]}"' if found and not is_plain else ""


def _loading(pushed: Any, folder: Path, repo_id: str, args: Mapping[str, Any]) -> str:
    name, base = type(pushed).__name__, _public(args.get("pretrained_model_name_or_path", "the/base"))
    variant = _variant(folder)
    if isinstance(pushed, AdaGNControlNetModel):
        return (
            f"It works beside its base, `{base}`:\n\n```python\nfrom diffusers_adm import ADMControlNetPipeline, {name}"
            f'\n\ncontrolnet = {name}.from_pretrained("{repo_id}"{variant})\n'
            f'pipe = ADMControlNetPipeline.from_pretrained("{base}", controlnet=controlnet)\n```'
        )
    if isinstance(pushed, LoraAdapter):
        return (
            f"Into its base, `{base}`:\n\n```python\nimport diffusers_adm  # registers the classes with diffusers\n"
            f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{base}")\n'
            f'pipe.load_lora_weights("{repo_id}")\n```'
        )
    if not isinstance(pushed, DiffusionPipeline):
        return (
            f'```python\nfrom diffusers_adm import {name}\n\nmodel = {name}.from_pretrained("{repo_id}"{variant})\n```'
        )
    loaded = (
        "```python\nimport diffusers_adm  # registers the classes with diffusers\nfrom diffusers import "
        f'DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{repo_id}"{variant})\n```'
    )
    if (folder / "pipeline.py").is_file():
        loaded += (
            "\n\nWithout diffusers-adm, by the code in this repository:\n\n```python\nfrom diffusers import "
            f'DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained(\n    "{repo_id}"{variant}, '
            'custom_pipeline="pipeline", trust_remote_code=True\n)\n```'
        )
    return loaded


def _limits(pushed: Any) -> str:
    noise_schedule = pushed.config.get("noise_schedule") if isinstance(pushed, ModelMixin) else None
    is_classifier = isinstance(pushed, AdaGNClassifierModel)
    if is_classifier and noise_schedule == {}:
        return (
            "It was trained on clean images, to judge samples. It can neither steer sampling nor classify photographs."
        )
    limits = (
        "It draws what its training data show, at their size, and nothing else reliably: their gaps and biases are its "
        "own. Look at what it draws before you use it."
    )
    if is_classifier:
        limits = "It was made to steer sampling on noisy images, not to classify photographs."
    if noise_schedule:
        described = describe_noise_schedule(noise_schedule)
        limits += f" It was trained on the noise schedule {described}, and works with models of that schedule only."
    return limits


add_publishing(LoraAdapter, write_model_card)
