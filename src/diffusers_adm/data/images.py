"""The dataset that training and evaluation read: one example at a time, cropped, flipped and normalised."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..conditioning.control_images import ControlImageKind, condition_format_of, make_condition
from ..conditioning.image_format import ImageFormat, Size, as_size
from ..deprecations import renamed
from .decoding import WHITE, UnusableImageError, check_size, decode_condition, decode_image, decoded_size
from .resizing import draw_flip, draw_window
from .seeding import derive_seed
from .skipped import SkipReport


if TYPE_CHECKING:
    # `datasets` comes with the `train` extra; the losses must be importable without it.
    import datasets

    from .captions import Captions


logger = logging.getLogger(__name__)

# The columns of `load_image_dataset` that are not tensors.
PLAIN_COLUMNS = ("image", "conditioning_image", "row", "label", "caption")
# A tensor column with this ending is that of the mirrored images.
FLIPPED_ENDING = "_flipped"
# A run survives files that vanish one by one; a data folder that vanished is an error, found after this many in a row.
MAX_SUBSTITUTIONS = 100


class ImageDataset(torch.utils.data.Dataset):
    """
    Crops, flips and normalises images; the randomness depends only on the seed, the epoch and the example.

    So any number of workers gives the same tensors, and a resumed run the same as an unbroken one. Accelerate's
    prepared loaders call `set_epoch`, unless the sampler has a `set_epoch` of its own; use `EpochShuffleSampler`, which
    has none.

    Images are resized, with their aspect ratio, to just cover `resolution` (see `data/resizing.py`), and cropped.

    If an image or its conditioning image becomes unreadable during training, the next readable example takes its place,
    and its name is logged once (again only if two workers meet it at the same moment).

    Args:
        dataset (`datasets.Dataset`): From `load_image_dataset` and `check_images`. `label`, `conditioning_image` and
            tensor columns are optional.
        resolution (`int` or `tuple[int, int]`): Size in pixels: of a square, or (height, width).
        center_crop (`bool`, defaults to False): Crop at the centre; otherwise at random.
        random_flip (`bool`, defaults to False): Mirror half of the images left to right.
        seed (`int`, defaults to 0): The seed of the run.
        background (`tuple[int, int, int]`, defaults to white): RGB behind transparent pixels.
        captions (`Captions`, *optional*): Captions of the same examples, in their order. The tensors of the caption of
            example i are part of it; of several captions, each epoch draws one.
        condition (`str`, *optional*): The kind of conditioning image (see `conditioning.control_images.CONDITIONS`) to
            make from each image, for a ControlNet. None reads the column `conditioning_image`, if there is one.
        image_format (`ImageFormat`, *optional*): The format of the images, from `find_image_format`. None: 8-bit RGB.
        condition_format (`ImageFormat`, *optional*): The same for the column `conditioning_image`.
        latent_shape (`tuple[int, int, int]`, *optional*): Channels, height and width of the latents that the images are
            encoded to. Examples then have noise of this shape.
        smallest (`tuple[int, int]`, *optional*): Smallest height and width; smaller images are left out like unreadable
            ones. For images that `check_images` has not decoded.
        skips (`SkipReport`, *optional*): Where images that are left out are named.

    Attributes:
        size (`tuple[int, int]`): Height and width.
        resolution, image_format, condition_format: As passed; the formats are never None.

    Raises:
        ValueError: For an unknown `condition`, one in addition to the column `conditioning_image`, or one that cannot
            be made from images of this format.
        ImportError: For edges without scikit-image.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        resolution: Size,
        center_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
        background: tuple[int, int, int] = WHITE,
        captions: Captions | None = None,
        condition: ControlImageKind | None = None,
        image_format: ImageFormat | None = None,
        condition_format: ImageFormat | None = None,
        latent_shape: tuple[int, int, int] | None = None,
        smallest: tuple[int, int] | None = None,
        skips: SkipReport | None = None,
    ):
        # None is decoded in its own way: any image becomes 8-bit RGB.
        self._decoded_as = image_format, condition_format
        self.image_format = image_format or ImageFormat()
        self.condition_format = condition_format or ImageFormat()
        if condition is not None:
            if "conditioning_image" in dataset.column_names:
                raise ValueError(
                    f"`condition` is {condition!r}, but the dataset has a `conditioning_image` column, too."
                )
            self.condition_format = condition_format_of(condition, self.image_format)
            # A missing package fails here.
            make_condition(torch.zeros(self.image_format.channels, 1, 1), condition, self.image_format)
        self.dataset = dataset
        self.resolution = resolution
        self.size = as_size(resolution)
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.seed = seed
        self.background = background
        self.captions = captions
        self.condition = condition
        self.latent_shape = latent_shape
        self.smallest, self.skips = smallest, skips
        self.has_labels = "label" in dataset.column_names
        columns = [name for name in dataset.column_names if name not in PLAIN_COLUMNS]
        flipped = {f"{name}{FLIPPED_ENDING}" for name in columns}
        self.tensor_columns = [name for name in columns if name not in flipped]
        # By name, the column that a mirrored example takes its tensor from.
        self.flipped_columns = {name.removesuffix(FLIPPED_ENDING): name for name in columns if name in flipped}
        # In shared memory, since workers that live on over epochs hold a copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._reported = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @property
    def unreadable(self) -> list[int]:
        """The examples that became unreadable so far."""
        return self._reported.nonzero()[:, 0].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Selects the crops, flips and captions of `epoch`, in workers too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `index`, an int64 scalar, of the example that was read; `images`, float32 of shape `(channels,
            height, width)` in [-1, 1], where `image_format.to_values` gives back the values of the data; with
            conditioning images, `conditions`, `(condition channels, height, width)` in [0, 1], the fractions of their
            value range, cropped and flipped like the image; with a `latent_shape`, `latent_noise`, standard normal
            noise of it, new in each epoch; with labels, `class_labels`, an int64 scalar, -1 for unlabelled; tensor
            columns under their names, in float32 (of a mirrored image, those of `NAME_flipped` where there are some);
            the tensors of `captions`.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is out of range for {len(self)} examples.")
        for offset in range(min(len(self), MAX_SUBSTITUTIONS)):
            candidate = (index + offset) % len(self)
            example = self.dataset[candidate]
            try:
                return self.transform(example, candidate)
            except UnusableImageError as error:
                if not self._reported[candidate]:
                    self._reported[candidate] = True
                    report_skipped(self.skips, example_name(example, candidate), error)
        raise RuntimeError(
            f"{offset + 1} examples in a row, from {example_name(self.dataset[index], index)} on, became unreadable. "
            "Is the storage of the dataset still there?"
        )

    def name_of(self, index: int) -> str:
        """Names an example for messages."""
        return example_name(self.dataset[index], index)

    def transform(self, example: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        """
        The tensors of an example, which depend on nothing else than it, the seed, the epoch and its `index`. Raises an
        `UnusableImageError` if its image cannot be used.
        """
        result = self._image_tensors(example, index)
        result["index"] = torch.tensor(index)
        if self.latent_shape is not None:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "latent", self.epoch, index))
            result["latent_noise"] = torch.randn(self.latent_shape, generator=generator)
        if self.has_labels:
            result["class_labels"] = torch.tensor(example["label"], dtype=torch.int64)
        is_flipped = self.random_flip and draw_flip(self.seed, self.epoch, index)
        for name in self.tensor_columns:
            column = self.flipped_columns.get(name, name) if is_flipped else name
            result[name] = torch.tensor(example[column], dtype=torch.float32)
        if self.captions is not None:
            result |= self.captions.of_example(example, index, self.seed, self.epoch)
        return result

    def _image_tensors(self, example: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        image_format, condition_format = self._decoded_as
        image = decode_image(example["image"], image_format, self.background)
        size = decoded_size(image)
        if self.smallest is not None:
            check_size(image, self.smallest)
        values = self._cut(image, index, size, self.image_format)
        tensors = {"images": self.image_format.to_samples(values).float()}
        if self.condition is not None:
            fractions = self.image_format.to_unit(values).float()
            tensors["conditions"] = make_condition(fractions, self.condition, self.image_format)
        elif "conditioning_image" in example:
            condition = decode_condition(example["conditioning_image"], size, condition_format)
            values = self._cut(condition, index, size, self.condition_format)
            tensors["conditions"] = self.condition_format.to_unit(values).float()
        return tensors

    def _cut(
        self, image: Image.Image | np.ndarray, index: int, image_size: tuple[int, int], image_format: ImageFormat
    ) -> torch.Tensor:
        """
        Resizes, crops and flips an image by the seed, the epoch and the index; a conditioning image like its image of
        `image_size` (width, height). Returns values of the data, `(channels, height, width)`, float32 or float64.
        """
        window = draw_window(
            self.seed, self.epoch, index, image_size, self.size, self.center_crop, flip=self.random_flip
        )
        # A copy: arrays of Pillow images cannot be written to, which torch warns of.
        values = np.array(window.cut(image, image_format).transpose(2, 0, 1), order="C")
        # float32 holds all numbers of 16 bits.
        is_exact = values.dtype.itemsize <= 2 or values.dtype == np.float32
        return torch.from_numpy(values).to(torch.float32 if is_exact else torch.float64)


def report_skipped(skips: SkipReport | None, name: str, error: UnusableImageError) -> None:
    """Warns of an example that another one takes the place of, and adds it to the report, if there is one."""
    verb = "became" if skips is None else "is"  # without a report, all images were checked
    logger.warning("%s %s %s (%s); another image takes its place.", name, verb, error.reason, error)
    if skips is not None:
        skips.add(error.reason, name, str(error))


def example_name(example: dict[str, Any], index: int, column: str = "image") -> str:
    """Names an example for messages: the path of its file, or its row in the source with the path stored there."""
    image = example[column]
    path = image["path"] if isinstance(image, dict) else None
    if path and image["bytes"] is None:
        return path
    return f"row {example.get('row', index)}" + (f" ({path})" if path else "")


__getattr__ = renamed(__name__, {"ControlDataset": "ImageDataset"})
