"""
Generates many images with one pipeline, in several processes, and continues interrupted runs.

Every image has its own seed, and is written as soon as it is finished.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from ...commands.errors import CommandError
from ...conditioning.image_format import ImageFormat, ImageMode
from ...data.fingerprints import hash_config, hash_plain, hash_tensors, hash_tokenizer
from ...data.pixels import alpha_of_opaque
from ...data.seeding import derive_seed
from ...measures.common import make_bar
from ...models.config_checks import check_choice
from ...ops.finiteness import explain_not_finite, not_finite
from ...pipelines.pipeline_adm import PIL_OUTPUT_MODES
from ..common import require, versions


OutputFormat = Literal["png", "tiff", "npz"]

# Files next to the images: settings, labels, and all images in one file.
SETTINGS_NAME, METADATA_NAME, NPZ_NAME = "sampling.json", "metadata.jsonl", "samples.npz"
IMAGE_NAME = re.compile(r"(\d{6,})\.(png|tiff|npy)")  # .npy: before they are packed, for what PNG does not hold
# Prefix of unfinished files; hidden from readers of the folder.
WRITING_PREFIX = ".writing-"
# Arguments of the pipeline that are not settings of a run: made for each batch, or without effect on the images.
RESERVED = (
    *("prompt", "class_labels", "batch_size", "num_images_per_prompt", "generator", "latents", "output_type"),
    *("return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
# Maximum length of a value in an error message.
SHOWN_LENGTH = 80


def sample_images(
    pipe: Any,
    num_images: int,
    output_dir: str | os.PathLike,
    *,
    class_labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    output_format: OutputFormat | None = None,
    pipeline_options: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    progress_bar: bool = True,
) -> Path:
    r"""
    Generates images into a folder, in the processes of Accelerate, and continues an interrupted run.

    All noise of image i comes from a CPU generator seeded with a hash of `seed` and i. So an image does not depend on
    batch size, number of processes and earlier runs (except for rounding, if the device computes batches of another
    size in another order), and a larger `num_images` extends a smaller set.

    Args:
        pipe ([`ADMPipeline`]): The pipeline, on its device; in each process.
        num_images (`int`): Number of images, over all processes.
        output_dir (`str` or `os.PathLike`): Folder for `000000.png` and so on, the same for all processes. With labels
            or prompts, it also gets `metadata.jsonl` at the end: `file_name` and, if there are, `label`, `label_name`
            and `text` of each image, as read by the `imagefolder` of `datasets`. `sampling.json` holds the settings.
        class_labels (sequence of `int`, *optional*): Image i is of class `class_labels[i % len(class_labels)]`.
        prompts (sequence of `str`, *optional*): Image i is generated for `prompts[i % len(prompts)]`.
        batch_size (`int`, defaults to 32): Images per process and batch.
        seed (`int`, defaults to 0): Random seed of the noise.
        output_format (`str`, *optional*): `"png"`: grey of 8 or 16 bits, colours of 8; `"tiff"`: any image, written by
            `tifffile`; `"npz"`: any image; at the end they are moved into `samples.npz`, as expected by
            guided-diffusion's scripts (`arr_0` of shape `(num_images, height, width, channels)`; `arr_1`: the class
            labels, if any). `None`: `"png"` if that holds images of the pipeline's format, else `"tiff"`. Files hold
            values of the data (`pipe.image_format`) in its dtype, and alpha in the whole range of this dtype; those of
            a pipeline whose config has no format are 8-bit.
        pipeline_options (mapping, *optional*): Further arguments of the pipeline's call, the same for all images; plain
            values.
        accelerator (`accelerate.Accelerator`, *optional*): Shares the images between its processes, and runs the
            networks in its precision. Every process must call this function.
        progress_bar (`bool`, defaults to `True`): Show a progress bar in the main process, for its share of the images.

    Returns:
        `Path`: The folder, or the `.npz` file in it.

    Raises:
        ValueError: If the folder holds images of other settings (the message lists the differences) or more than
            `num_images`; for arguments out of range, and an output format that cannot hold the images.
        ImportError: For TIFF files without `tifffile`.
        TypeError: For `pipeline_options` that are not plain values.
        OSError: If the folder cannot be created, read or written; in all processes, if it is so in the first.
        RuntimeError: If an image holds a value that is not a number.
    """
    # 1. check
    options = dict(pipeline_options or {})
    image_format = _recorded_format(pipe)
    output_format = _settle_output_format(output_format, image_format)
    _check_arguments(pipe, num_images, class_labels, prompts, batch_size, options)
    if image_format is None and getattr(pipe, "image_channels", None) is not None:
        _check_channels(pipe.image_channels, output_format)
    conditions: dict[str, list[Any]] = {}
    if class_labels is not None:
        conditions["class_labels"] = [int(label) for label in class_labels]
    if prompts is not None:
        conditions["prompt"] = list(prompts)
    rank, num_processes, autocast = 0, 1, contextlib.nullcontext
    if accelerator is not None:
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        autocast = accelerator.autocast

    # 2. which images are missing; one process looks, before any image is generated
    folder = Path(output_dir)
    plan: list[Any] = [None, None]
    if rank == 0:
        try:
            settings = {
                "seed": seed,
                "output_format": output_format,
                "class_labels": conditions.get("class_labels"),
                "prompts": conditions.get("prompt"),
                "mixed_precision": "no" if accelerator is None else accelerator.mixed_precision,
                "image_format": None if image_format is None else image_format.to_config(),
                **_pipeline_settings(pipe, options),
            }
            # As read back from the file, where tuples are lists.
            plan[0] = _plan(folder, num_images, json.loads(json.dumps(settings)), pipe)
        except (OSError, TypeError, ValueError) as error:
            plan[1] = error  # raised in all processes: the others wait for the plan
    if num_processes > 1:
        broadcast_object_list(plan)
    (missing, record), refusal = plan[0] or ([], None), plan[1]
    if refusal is not None:
        raise refusal

    # 3. generate
    mine = missing[rank::num_processes]
    show = rank == 0 and progress_bar
    title = "Sampling" if num_processes == 1 else f"Sampling (process 1 of {num_processes})"
    with make_bar(len(mine), title, "image", show) as bar, _bar_of_steps(pipe, show and sys.stderr.isatty()):
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            inputs: dict[str, Any] = {n: [values[i % len(values)] for i in indices] for n, values in conditions.items()}
            inputs = inputs or {"batch_size": len(indices)}
            generators = [torch.Generator().manual_seed(derive_seed(seed, "sample", i)) for i in indices]
            with autocast():
                # (B, H, W, C) in [0, 1]; values of the data for formats that Pillow cannot show
                images = pipe(**inputs, **options, generator=generators, output_type="np").images
                bad = not_finite(torch.from_numpy(images))
                if bad:
                    reason = explain_not_finite(_networks(pipe))
                    raise CommandError(f"Image {indices[bad[0]]} holds values that are not finite. {reason}", 1)
            if image_format is None:
                _check_channels(images.shape[-1], output_format)  # of pipelines without `image_channels`
            if start == 0:
                # Only now: settings that the pipeline refuses leave nothing behind.
                (folder / METADATA_NAME).unlink(missing_ok=True)  # of the smaller set
                with _writing(folder / SETTINGS_NAME, suffix=f".{rank}") as file:
                    file.write(record)
            for index, pixels in zip(indices, _to_pixels(images, image_format), strict=True):
                _write_image(folder, index, pixels, output_format, image_format)
            bar.update(len(indices))

    # 4. files about all images
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if rank == 0 and output_format == "npz":
        _pack(folder, num_images, conditions.get("class_labels"))
    elif rank == 0 and conditions:
        _write_metadata(folder, num_images, output_format, conditions, getattr(pipe, "id2label", None))
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return folder / NPZ_NAME if output_format == "npz" else folder


def _check_arguments(
    pipe: Any,
    num_images: int,
    class_labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
    batch_size: int,
    options: Mapping[str, Any],
) -> None:
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    for name, values in (("class_labels", class_labels), ("prompts", prompts)):
        if values is not None and (isinstance(values, str) or len(values) == 0):
            raise ValueError(f"`{name}` is {values!r}; pass a list of at least one, or None.")
    for name, value in options.items():
        try:
            json.dumps(value)  # as they are written to the settings
        except TypeError as error:
            kind = "tensor" if torch.is_tensor(value) else type(value).__name__
            raise ValueError(
                f"`{name}` is a {kind}; `pipeline_options` are plain values, the same for all images."
            ) from error
    parameters = inspect.signature(pipe.__call__).parameters
    wrong = [name for name in options if name in RESERVED or name not in parameters]
    if prompts is not None and "prompt" not in parameters:
        wrong.append("prompt")
    if wrong:
        reason = "it is made for each batch" if wrong[0] in options and wrong[0] in RESERVED else "it does not take it"
        raise ValueError(f"`{wrong[0]}` cannot be passed on to a {type(pipe).__name__}: {reason}.")


def _recorded_format(pipe: Any) -> ImageFormat | None:
    """The format in the pipeline's config; `None` if there is none: images in [0, 1], to be written as 8 bits."""
    if pipe.config.get("image_format") is None:
        return None
    return pipe.image_format


def _settle_output_format(output_format: OutputFormat | None, image_format: ImageFormat | None) -> OutputFormat:
    """The format of the files; a `ValueError` if they cannot hold the images."""
    why_no_png = None
    if image_format is not None and image_format.loses_depth_in_pil:
        why_no_png = f"the images are {image_format}, and colours have 8 bits in the PNG files that Pillow writes"
    elif image_format is not None:
        why_no_png = image_format.why_no_pil
    if output_format is None:
        output_format = "png" if why_no_png is None else "tiff"
    check_choice("output_format", output_format, get_args(OutputFormat))
    if output_format == "png" and why_no_png is not None:
        raise ValueError(f"`output_format` is 'png', but {why_no_png}. Use 'tiff' or 'npz'.")
    if output_format == "tiff":
        require("tifffile")
    return output_format


def _check_channels(channels: int, output_format: str) -> None:
    if output_format == "png" and channels not in PIL_OUTPUT_MODES:
        raise ValueError(
            f"`output_format` is 'png', but the images have {channels} channels, and PNG files have "
            f"{', '.join(map(str, PIL_OUTPUT_MODES))}. Use 'npz', which holds any number."
        )


# 1. The settings


def _pipeline_settings(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What an image depends on besides seed, label and prompt: arguments, scheduler, configs, tokenizer, weights."""
    parameters = inspect.signature(pipe.__call__).parameters
    call = {n: options.get(n, parameter.default) for n, parameter in parameters.items() if n not in RESERVED}
    scheduler = json.loads(pipe.scheduler.to_json_string())
    networks = _networks(pipe)
    components = {name: hash_config(network) for name, network in networks.items()}
    if getattr(pipe, "tokenizer", None) is not None:
        components["tokenizer"] = hash_tokenizer(pipe.tokenizer)
    return {
        **call,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "scheduler": {name: value for name, value in scheduler.items() if name != "_diffusers_version"},
        "components": components,
        # They differ for a model of the same name that was trained further.
        "weights": hash_plain({name: hash_tensors(network.state_dict()) for name, network in networks.items()}),
    }


def _networks(pipe: Any) -> dict[str, torch.nn.Module]:
    """All networks, without the wrapper of `torch.compile`, which renames weights."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name: getattr(network, "_orig_mod", network) for name, network in networks.items()}


def _plan(folder: Path, num_images: int, settings: dict[str, Any], pipe: Any) -> tuple[list[int], bytes]:
    """
    The numbers of the missing images, and the content of the settings file. Creates the folder, or checks that it is of
    a run with the same settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{WRITING_PREFIX}*"):
        leftover.unlink()
    matches = [IMAGE_NAME.fullmatch(path.name) for path in folder.iterdir()]
    existing = {int(match[1]) for match in matches if match}
    packed = (folder / NPZ_NAME).exists()
    if existing or packed:
        if not (folder / SETTINGS_NAME).exists():
            raise ValueError(f"`output_dir` {str(folder)!r} holds images, but no {SETTINGS_NAME}. Choose another one.")
        stored = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
        _check_same_settings(folder, stored["settings"], settings)
        if packed and stored["num_images"] != num_images:
            raise ValueError(
                f"`num_images` is {num_images}, but `output_dir` {str(folder)!r} holds {stored['num_images']} images "
                f"in {NPZ_NAME}, to which none can be added. Choose another folder."
            )
        if packed:
            return [], b""
        if max(existing) >= num_images:
            raise ValueError(
                f"`num_images` is {num_images}, but `output_dir` {str(folder)!r} holds images up to number "
                f"{max(existing)}. Ask for at least {max(existing) + 1}, or choose another folder."
            )
    missing = [index for index in range(num_images) if index not in existing]
    model = getattr(pipe, "name_or_path", None)
    content = {
        "num_images": num_images,
        "settings": settings,
        "model": None if model is None else os.fspath(model),
        "id2label": getattr(pipe, "id2label", None),
        "versions": versions(),
    }
    return missing, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _check_same_settings(folder: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    differences = []
    for name in {**stored, **settings}:
        before, now = stored.get(name), settings.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            differences += [f"`{name}` had {key}={_short(before.get(key))}, now {_short(now.get(key))}" for key in keys]
        elif before != now:
            differences.append(f"`{name}` was {_short(before)} and is now {_short(now)}")
    if differences:
        raise ValueError(
            f"`output_dir` {str(folder)!r} holds images of other settings: {'; '.join(differences)}. Repeat the "
            "earlier settings to continue, or choose another folder."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[: SHOWN_LENGTH - 3]}..."


# 2. Generating


@contextlib.contextmanager
def _bar_of_steps(pipe: Any, show: bool) -> Iterator[None]:
    """Shows the pipeline's progress bar below that of the images, or hides it, and restores it afterwards."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    hidden = before.get("disable", False) or not show
    pipe.set_progress_bar_config(**{**before, "disable": hidden, "desc": "Steps", "position": 1, "leave": False})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


# 3. Files


def _image_name(index: int, suffix: str = "png") -> str:
    return f"{index:06d}.{suffix}"


def _to_pixels(images: np.ndarray, image_format: ImageFormat | None) -> np.ndarray:
    """
    Images of the pipeline's output "np" as values of the data, in the dtype of their format. Alpha fills the whole
    range of this dtype, as viewers and the readers of this package expect: opaque is 65535 in 16 bits, also for 12-bit
    data.
    """
    if image_format is None:
        return (images * 255).round().astype(np.uint8)
    values = torch.from_numpy(images)
    values = image_format.from_unit(values) if image_format.is_viewable else values
    opaque = alpha_of_opaque(image_format.dtype)
    if image_format.mode in ("LA", "RGBA") and image_format.value_range != (0, opaque):
        colours, alpha = values[..., :-1].double(), values[..., -1:].double()
        values = torch.cat([colours, image_format.to_unit(alpha).clamp(0, 1) * opaque], dim=-1)
    return (values.round() if image_format.dtype.kind in "iu" else values).numpy().astype(image_format.dtype)


def _write_image(
    folder: Path, index: int, pixels: np.ndarray, output_format: OutputFormat, image_format: ImageFormat | None
) -> None:
    path = folder / _image_name(index)
    grey = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    if output_format == "tiff":
        mode = image_format.mode if image_format is not None else "RGB" if pixels.shape[-1] == 3 else "array"
        with _writing(folder / _image_name(index, "tiff")) as file:
            _write_tiff(file, grey, mode)
    elif output_format == "png" or (pixels.dtype == np.uint8 and pixels.shape[-1] in PIL_OUTPUT_MODES):
        with _writing(path) as file:
            Image.fromarray(grey).save(file, format="png")
    else:
        with _writing(path.with_suffix(".npy")) as file:
            np.save(file, pixels)


def _write_tiff(file: BinaryIO, pixels: np.ndarray, mode: ImageMode) -> None:
    """Writes pixels `(height, width)` or `(height, width, channels)`, with interleaved channels."""
    import tifffile  # of the extra `eval`

    options: dict[str, Any] = {"photometric": "rgb" if mode in ("RGB", "RGBA") else "minisblack", "metadata": None}
    if pixels.ndim == 3:
        options["planarconfig"] = "contig"
    if mode in ("LA", "RGBA"):
        options["extrasamples"] = ["unassalpha"]
    tifffile.imwrite(file, pixels, compression="zlib", **options)


def _read_image(folder: Path, index: int) -> np.ndarray:
    """An image before it is packed: `(height, width, channels)`"""
    path = folder / _image_name(index)
    if not path.exists():
        return np.load(path.with_suffix(".npy"), allow_pickle=False)
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


@contextlib.contextmanager
def _writing(path: Path, suffix: str = "") -> Iterator[BinaryIO]:
    """Writes a file atomically. Processes that may write the same file at the same time have different suffixes."""
    writing = path.with_name(f"{WRITING_PREFIX}{path.name}{suffix}")
    with open(writing, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # or a power loss may keep the name and lose the content
    os.replace(writing, path)


def _write_metadata(
    folder: Path,
    num_images: int,
    output_format: OutputFormat,
    conditions: Mapping[str, Sequence[Any]],
    id2label: Mapping[int, str] | None,
) -> None:
    labels, prompts = conditions.get("class_labels"), conditions.get("prompt")
    with _writing(folder / METADATA_NAME) as file:
        for index in range(num_images):
            row: dict[str, Any] = {"file_name": _image_name(index, output_format)}
            if labels is not None:
                row["label"] = labels[index % len(labels)]
                if id2label is not None:
                    row["label_name"] = id2label.get(row["label"])
            if prompts is not None:
                row["text"] = prompts[index % len(prompts)]
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _pack(folder: Path, num_images: int, labels: Sequence[int] | None) -> None:
    """Moves the images into one `.npz` file, one at a time: together they may not fit into memory."""
    path = folder / NPZ_NAME
    if not path.exists():
        first = _read_image(folder, 0)
        shape, descr = (num_images, *first.shape), np.lib.format.dtype_to_descr(first.dtype)
        with _writing(path) as file, zipfile.ZipFile(file, "w") as archive:  # not compressed, as by `numpy.savez`
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(array, header)
                for index in range(num_images):
                    array.write(_read_image(folder, index).tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as array:
                    np.lib.format.write_array(array, np.resize(np.array(labels, dtype=np.int64), num_images))
    for packed in folder.iterdir():
        if IMAGE_NAME.fullmatch(packed.name):
            packed.unlink(missing_ok=True)
