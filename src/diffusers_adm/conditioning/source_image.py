"""
An image that is concatenated to the sample, of the same size and with any number of channels: the source of image to
image translation, such as a grey image to colour, a noisy one to denoise, or a scan to segment (Palette, Saharia et al.
2022, https://huggingface.co/papers/2111.05826; SR3, Saharia et al. 2021, https://huggingface.co/papers/2104.07636).

The low-resolution image of an upsampler is the special case of a source that is upsampled and noised first; see
`low_resolution.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .condition import Condition, PreparedCondition, SamplingCall, UNetInputs
from .image_format import ImageFormat
from .image_inputs import ImageInput, read_images


# Takes the place of a dropped source: the middle of the value range, mid-grey. Zeros add nothing to the first
# convolution but its bias, as for a network that was widened by these channels.
DROPPED = 0.0


class ConcatenatedImageCondition(Condition):
    """
    The base of conditions that give the U-Net an image as further channels.

    Attributes:
        source (`torch.Tensor` of shape `(num_images, channels, height, width)`): The images of the call in [-1, 1],
            after `prepare` one row an image and on the device.
    """

    argument = "image"
    format_entry = "image_format"  # of a config: the format of the images, for messages
    source: torch.Tensor

    def read_source(self, image: ImageInput, source_format: ImageFormat) -> None:
        """Takes the images of a call; raises a `ValueError` for those that `read_images` refuses."""
        self.source = 2 * read_images(image, self.argument, source_format, entry=self.format_entry) - 1
        if len(self.source) > 1:
            self.counts = {self.argument: len(self.source)}

    def place_source(self, call: SamplingCall) -> torch.Tensor:
        """Repeats the images to one row an image of the call, on its device and in its dtype, and returns them."""
        self.source = call.rows(self.source.to(call.noise.dtype))
        return self.source

    def for_guidance(self, call: SamplingCall) -> dict[str, Any]:
        """`source_image`, in [-1, 1]."""
        return {"source_image": self.source}


class SourceImageCondition(ConcatenatedImageCondition):
    """
    The source image of a translation.

    Args:
        source_format (`ImageFormat`, *optional*): Format of the source images. Not needed for training.
        dropout_prob (`float`, *optional*): Share of whole source images that training replaces by `DROPPED`, for
            classifier-free guidance; `None`: not known, so that the source is not guided.
    """

    format_entry = "source_format"

    def __init__(self, source_format: ImageFormat | None = None, *, dropout_prob: float | None = 0.0):
        super().__init__()
        self.source_format, self.dropout_prob = source_format or ImageFormat(), dropout_prob
        self.is_droppable = bool(dropout_prob)

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """Reads `conditions` `(batch_size, channels, height, width)` in [0, 1]."""
        source = 2 * batch["conditions"] - 1
        dropped = torch.rand(len(source), device=source.device) < (self.dropout_prob or 0.0)
        return UNetInputs(extra_channels=source.masked_fill(dropped[:, None, None, None], DROPPED))

    def read(self, image: ImageInput) -> SourceImageCondition:
        """Takes the source images of a call; raises a `ValueError` for those that `read_images` refuses."""
        self.read_source(image, self.source_format)
        self.image_size = tuple(self.source.shape[2:])
        self.is_given = True
        return self

    def check_size(self, size: tuple[int, int], sample_size: tuple[int, int]) -> None:
        """Raises a `ValueError` for source images of another size than the results."""
        if self.image_size != size:
            (height, width), (own_height, own_width) = size, self.image_size or (0, 0)
            raise ValueError(
                f"`{self.argument}` is {own_width} x {own_height} pixels (width x height), but {width} x {height} are "
                "generated. Resize it."
            )

    def why_not_guided(self) -> str:
        """Why the source cannot be guided towards, for messages."""
        if self.dropout_prob is None:
            return (
                "it is not known whether its source images were dropped in training (`source_dropout_prob` of the "
                "pipeline is None). If they were, set it to their share"
            )
        return (
            "its source images were never dropped in training (`source_dropout_prob` of the pipeline is 0). Train with "
            "`--source_dropout_prob 0.1`"
        )

    def prepare(self, call: SamplingCall) -> PreparedCondition:
        """The images; those of the unconditional pass are dropped if training has dropped some."""
        source = self.place_source(call)
        inputs = UNetInputs(extra_channels=source)
        if not self.is_droppable:
            return PreparedCondition.same_in_both(inputs)
        return PreparedCondition(inputs, UNetInputs(extra_channels=torch.full_like(source, DROPPED)))


def mean_channels_of(
    unet_config: Mapping[str, Any], scheduler_config: Mapping[str, Any], source_channels: int | None = None
) -> int:
    """
    Channels of a sample of a U-Net that also takes a source image: those of its output's mean. All others are those of
    the source.

    Args:
        unet_config (mapping): With c or, for a learned variance, 2 c output channels.
        scheduler_config (mapping): Its `variance_type` tells which of the two.
        source_channels (`int`, *optional*): If they are known, these decide.

    Raises:
        ValueError: If the variance is not known and both are possible, or no channels are left for the source.
    """
    in_channels, out_channels = unet_config["in_channels"], unet_config["out_channels"]
    given = f"`unet` has `in_channels={in_channels}` and `out_channels={out_channels}`"
    if source_channels is not None:
        channels = in_channels - source_channels
        if channels < 1 or out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"{given}, but `source_format` has {source_channels} channels, which leaves {channels} for a sample. "
                "The output must have as many channels as a sample, or twice as many for a learned variance."
            )
        return channels
    variance_type = scheduler_config.get("variance_type")
    is_learned = None if variance_type is None else variance_type.startswith("learned")
    possible = [] if is_learned else [out_channels]
    if is_learned is not False and out_channels % 2 == 0:
        possible.append(out_channels // 2)
    possible = [channels for channels in possible if channels < in_channels]
    if not possible:
        raise ValueError(
            f"{given}, and `scheduler` has `variance_type={variance_type!r}`: its input has no channels for a source "
            "image. Load a model without one with `ADMPipeline`."
        )
    if len(possible) > 1:
        raise ValueError(
            f"{given}, and `scheduler` has no `variance_type`, so a sample can have {possible[0]} or {possible[1]} "
            "channels. Pass `source_format`, whose `channels` are those of the source image."
        )
    return possible[0]
