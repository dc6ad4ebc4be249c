"""The dataset that training and evaluation read: one example at a time, cropped, flipped and normalised."""

from __future__ import annotations

import logging
import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..conditioning.control_images import ControlImageKind, make_condition
from ..deprecations import renamed
from .decoding import WHITE, UnusableImageError, decode_condition, decode_rgb
from .seeding import derive_seed


if TYPE_CHECKING:
    # `datasets` comes with the `train` extra; the losses must be importable without it.
    import datasets

    from .captions import Captions


logger = logging.getLogger(__name__)

# The columns of `load_image_dataset` that are not tensors.
PLAIN_COLUMNS = ("image", "conditioning_image", "row", "label", "caption")
# A run survives files that vanish one by one; a data folder that vanished is an error, found after this many in a row.
MAX_SUBSTITUTIONS = 100


class ImageDataset(torch.utils.data.Dataset):
    """
    Crops, flips and normalises images; the randomness depends only on the seed, the epoch and the example.

    So any number of workers gives the same tensors, and a resumed run the same as an unbroken one. Accelerate's
    prepared loaders call `set_epoch`, unless the sampler has a `set_epoch` of its own; use `EpochShuffleSampler`, which
    has none.

    The shorter side is resized to `resolution` with Pillow's bicubic filter, which antialiases when downsampling and is
    the filter of ADM's own data loader. Lanczos is slightly sharper but rings at hard edges.

    If an image or its conditioning image becomes unreadable during training, the next readable example takes its place,
    and its name is logged once (again only if two workers meet it at the same moment).

    Args:
        dataset (`datasets.Dataset`): From `load_image_dataset` and `check_images`. `label`, `conditioning_image` and
            tensor columns are optional.
        resolution (`int`): Height and width in pixels.
        center_crop (`bool`, defaults to False): Crop at the centre; otherwise at random.
        random_flip (`bool`, defaults to False): Mirror half of the images left to right.
        seed (`int`, defaults to 0): The seed of the run.
        background (`tuple[int, int, int]`, defaults to white): RGB behind transparent pixels.
        captions (`Captions`, *optional*): Captions of the same examples, in their order: the tensors of `captions[i]`
            are part of example i.
        condition (`str`, *optional*): The kind of conditioning image (see `conditioning.control_images.CONDITIONS`) to
            make from each image, for a ControlNet. None reads the column `conditioning_image`, if there is one.

    Raises:
        ValueError: For an unknown `condition`, or one in addition to the column `conditioning_image`.
        ImportError: For edges without scikit-image.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
        background: tuple[int, int, int] = WHITE,
        captions: Captions | None = None,
        condition: ControlImageKind | None = None,
    ):
        if condition is not None:
            if "conditioning_image" in dataset.column_names:
                raise ValueError(
                    f"`condition` is {condition!r}, but the dataset has a `conditioning_image` column, too."
                )
            make_condition(torch.zeros(3, 1, 1), condition)  # an unknown kind or a missing package fails here
        self.dataset = dataset
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.seed = seed
        self.background = background
        self.captions = captions
        self.condition = condition
        self.has_labels = "label" in dataset.column_names
        self.tensor_columns = [name for name in dataset.column_names if name not in PLAIN_COLUMNS]
        # In shared memory, since workers that live on over epochs hold a copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._reported = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Selects the crops and flips of `epoch`, in workers too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `images`, float32 of shape `(3, resolution, resolution)` in [-1, 1], where `(images + 1) * 127.5`
            gives back the 8-bit values; with conditioning images, `conditions`, of the same shape in [0, 1], cropped
            and flipped like the image; with labels, `class_labels`, an int64 scalar, -1 for unlabelled; tensor columns
            under their names, in float32; the tensors of `captions`.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is out of range for {len(self)} examples.")
        for offset in range(min(len(self), MAX_SUBSTITUTIONS)):
            candidate = (index + offset) % len(self)
            example = self.dataset[candidate]
            try:
                result = self._image_tensors(example, candidate)
            except UnusableImageError as error:
                if not self._reported[candidate]:
                    self._reported[candidate] = True
                    name = example_name(example, candidate)
                    logger.warning("%s became %s (%s); another image takes its place.", name, error.reason, error)
                continue
            if self.has_labels:
                result["class_labels"] = torch.tensor(example["label"], dtype=torch.int64)
            result |= {name: torch.tensor(example[name], dtype=torch.float32) for name in self.tensor_columns}
            if self.captions is not None:
                result |= self.captions[candidate]
            return result
        raise RuntimeError(
            f"{offset + 1} examples in a row, from {example_name(self.dataset[index], index)} on, became unreadable. "
            "Is the storage of the dataset still there?"
        )

    def _image_tensors(self, example: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        image = decode_rgb(example["image"], self.background)
        pixels = self._transform(image, index).float()
        tensors = {"images": pixels / 127.5 - 1}
        if self.condition is not None:
            tensors["conditions"] = make_condition(pixels / 255, self.condition)
        elif "conditioning_image" in example:
            condition = decode_condition(example["conditioning_image"], image.size)
            tensors["conditions"] = self._transform(condition, index, source_size=image.size).float() / 255
        return tensors

    def _transform(self, image: Image.Image, index: int, source_size: tuple[int, int] | None = None) -> torch.Tensor:
        """
        Resizes, crops and flips an image by the seed, the epoch and the index; a conditioning image like its image of
        `source_size` (width, height). Returns 8-bit pixels, `(3, resolution, resolution)`.
        """
        # All three are drawn whatever the options, so that changing one option does not affect the others.
        generator = random.Random(derive_seed(self.seed, "augmentation", self.epoch, index))
        x, y, flip = generator.random(), generator.random(), generator.random() < 0.5
        if self.center_crop:
            x = y = 0.5

        width, height = source_size or image.size
        ratio = self.resolution / min(width, height)
        size = (max(self.resolution, round(width * ratio)), max(self.resolution, round(height * ratio)))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left = math.floor(x * (size[0] - self.resolution + 1))
        top = math.floor(y * (size[1] - self.resolution + 1))
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        if self.random_flip and flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def example_name(example: dict[str, Any], index: int) -> str:
    """Names an example for messages: the path of its file, or its row in the source with the path stored there."""
    image = example["image"]
    path = image["path"] if isinstance(image, dict) else None
    if path and image["bytes"] is None:
        return path
    return f"row {example.get('row', index)}" + (f" ({path})" if path else "")


__getattr__ = renamed(__name__, {"ControlDataset": "ImageDataset"})
