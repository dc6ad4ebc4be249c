"""
The format of a dataset: `find_image_format` reads the headers of all images, and their values where these are needed,
and decides on the meaning of the channels and the value range, or says why the images cannot be used together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..conditioning.image_format import MAX_LEVELS, MODE_CHANNELS, ImageFormat, ImageMode, count_channels
from .decoding import can_convert, describe_alpha, split_alpha
from .images import example_name
from .labels import list_names
from .pixels import UNSUPPORTED, UnusableImageError, open_image, reader_versions


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

ValueRange = tuple[float, float] | Literal["auto"]
MODES_OF_CHANNELS: dict[int, ImageMode] = {1: "L", 3: "RGB"}
# A warning follows if data of more than 8 bits fill a smaller share of their type's range.
MIN_SHARE_OF_RANGE = 0.5
# Up to here, float32 holds all integers.
MAX_INTEGER = 2**24
# Bump when `_read_header` or `_measure` changes: cached results of older versions are then not used.
SURVEY_VERSION = 2


def range_word(text: str) -> float | str:
    """A word of an argument like `value_range`; `parse_value_range` refuses what is neither a number nor auto."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_value_range(name: str, words: Sequence[float | str] | Literal["auto"] | None) -> ValueRange | None:
    """
    Reads the words of an argument like `--value_range`: two numbers in order, or auto; `None` stays. Raises a
    `ValueError` that calls it `name`.
    """
    if words is None or words == "auto":
        return words
    if list(words) == ["auto"]:
        return "auto"
    try:
        low, high = map(float, words)
    except ValueError:  # also for another number of words
        low, high = math.nan, math.nan
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            f"`{name}` is {' '.join(map(str, words))!r}; pass two numbers, the values of the data for -1 and 1, the "
            "lower one first (e.g. 0 4095), or auto."
        )
    return low, high


@dataclass(frozen=True)
class FormatRequest:
    """
    What a network and a user ask of the images.

    Args:
        channels (`int`, *optional*): Number of channels of the network. None: any.
        image_mode (`str`, *optional*): `--image_mode`: "L", "LA", "RGB", "RGBA" or "array".
        value_range (`tuple[float, float]` or "auto", *optional*): `--value_range`: the values of the data for -1 and 1.
            "auto": the lowest and the highest of all images.
        known (`ImageFormat`, *optional*): The format of a pretrained model. It is kept where the others are None.
        mode_argument (`str`, *optional*, defaults to "--image_mode"): The argument of the mode, for messages. None:
            there is none.
        range_argument (`str`, defaults to "--value_range"): The argument of the value range, for messages.

    Raises:
        ValueError: If these contradict each other.
    """

    channels: int | None = None
    image_mode: ImageMode | None = None
    value_range: ValueRange | None = None
    known: ImageFormat | None = None
    mode_argument: str | None = "--image_mode"
    range_argument: str = "--value_range"

    def __post_init__(self) -> None:
        mode, channels, known = self.image_mode, self.channels, self.known
        if mode is not None and mode not in get_args(ImageMode):
            raise ValueError(f"`{self.mode_argument}` is {mode!r}; it must be one of {', '.join(get_args(ImageMode))}.")
        if known is not None and channels not in (None, known.channels):
            raise ValueError(
                f"The model was trained on {known}, {count_channels(known.channels)}, but the network has "
                f"{channels}. Start from a model of {count_channels(channels)}, or without one."
            )
        if known is not None and mode not in (None, known.mode):
            raise ValueError(
                f"`{self.mode_argument}` is {mode}, but the model was trained on {known}. Omit it, or pass "
                f"`{self.mode_argument} {known.mode}`."
            )
        if mode is not None and channels is not None and MODE_CHANNELS.get(mode, channels) != channels:
            raise ValueError(
                f"`{self.mode_argument}` {mode} has {count_channels(MODE_CHANNELS[mode])}, but the network has "
                f"{channels}. Pass `{self.mode_argument} {_mode_for(channels)}`, or set the channels of the network to "
                f"{MODE_CHANNELS[mode]}."
            )
        # As a tuple, also of a list from the command line.
        object.__setattr__(self, "value_range", parse_value_range(self.range_argument, self.value_range))

    @property
    def expected_channels(self) -> int | None:
        """The number of channels, if any of the settings tells it."""
        known = None if self.known is None else self.known.channels
        return self.channels or MODE_CHANNELS.get(self.image_mode) or known


@dataclass(frozen=True)
class _Kind:
    """Images of the same channels and type."""

    mode: ImageMode
    channels: int
    dtype: np.dtype

    def __str__(self) -> str:
        words = f"arrays of {count_channels(self.channels)}" if self.mode == "array" else f"{self.mode} images"
        return f"{words} ({self.dtype})"


class _Survey:
    """All images of a column, with their names for messages."""

    def __init__(self, dataset: datasets.Dataset, column: str, num_proc: int | None):
        self.dataset, self.column, self.num_proc = dataset, column, num_proc

    def map(self, function: Callable[..., dict], description: str, **kwargs: Any) -> dict[str, list]:
        """The results of a function for all examples, as lists by name. `datasets` caches them."""
        kwargs |= {"column": self.column, "version": (SURVEY_VERSION, *reader_versions())}
        if not hasattr(self.dataset, "map"):
            rows = [function(self.dataset[index], **kwargs) for index in range(len(self.dataset))]
            return {name: [row[name] for row in rows] for name in rows[0]}
        results = self.dataset.select_columns(self.column).map(
            function,
            remove_columns=[self.column],
            fn_kwargs=kwargs,
            num_proc=self.num_proc,
            desc=description,
        )
        return {name: results[name][:] for name in results.column_names}

    def count(self, indices: Sequence[int]) -> str:
        """How many of the images these are: "1 of 8"."""
        return f"{len(indices)} of {len(self.dataset)}"

    def name(self, indices: Sequence[int], details: Sequence[str] | None = None) -> str:
        """Names the first three of these examples, with details in brackets."""
        first = [example_name(self.dataset[index], index, self.column) for index in indices[:3]]
        if details is not None:
            first = [f"{name} ({detail})" for name, detail in zip(first, details, strict=False)]
        return list_names([*first, *indices[3:]], 3, str)


def find_image_format(
    dataset: datasets.Dataset, request: FormatRequest, *, num_proc: int | None = None, column: str = "image"
) -> ImageFormat:
    """
    Finds the format of all images of a dataset, and checks it against the request of network and user.

    If images have 8 bits per channel, only their headers are read, unless a value range is given. Unreadable files are
    ignored here; `check_images` drops and reports them.

    - **Channels**: the mode is `image_mode`, that of the pretrained model, or follows from the channels of the network:
      1 "L", 3 "RGB", others "array"; without all these, from the images. Grey images become colour for a network with
      3 channels. Colour only becomes grey, or gets an alpha channel, if `image_mode` says so.
    - **Range**: `value_range`, that of the pretrained model, or the whole range of the type of integers.

    Args:
        dataset (`datasets.Dataset`): From `load_image_dataset`.
        request (`FormatRequest`): What is asked for.
        num_proc (`int`, *optional*): Number of processes.
        column (`str`, defaults to "image"): "image" or "conditioning_image".

    Returns:
        `ImageFormat`: For `check_images`, `ImageDataset` and the config of a pipeline.

    Raises:
        ValueError: If the images have different or unsuitable channels or types, values that are not finite or lie
            outside the range, or if the range of floating point numbers, or of integers of more than 16 bits, is not
            given. The message names the first three files.
        ImportError: If a file needs tifffile or imagecodecs, which is not installed.
    """
    survey = _Survey(dataset, column, num_proc)
    kinds = _find_kinds(survey, request)
    if not kinds:  # `check_images` says why
        return request.known or _format_without_images(request)
    _check_depths(survey, kinds)
    mode, channels = _choose_mode(request, list(kinds))
    _check_channels(survey, request, kinds, mode, channels)
    (dtype,) = {kind.dtype for kind in kinds}
    value_range, num_levels = _find_range(survey, request, dtype, mode)
    return ImageFormat(mode, channels, value_range, num_levels)


def _format_without_images(request: FormatRequest) -> ImageFormat:
    channels = request.expected_channels or 3
    return ImageFormat(request.image_mode or _mode_for(channels), channels)


def _mode_for(channels: int) -> ImageMode:
    return MODES_OF_CHANNELS.get(channels, "array")


# 1. Channels


def _read_header(example: dict[str, Any], column: str, channels: int | None, version: tuple) -> dict[str, Any]:
    header = {"mode": "", "channels": 0, "dtype": "", "is_transposed": False, "problem": ""}
    try:
        with open_image(example[column], channels) as stored:
            header |= {"mode": stored.mode, "channels": stored.channels, "dtype": stored.dtype.name}
            header["is_transposed"] = stored.is_transposed
    except UnusableImageError as error:
        header["problem"] = str(error) if error.reason == UNSUPPORTED else ""
    return header


def _find_kinds(survey: _Survey, request: FormatRequest) -> dict[_Kind, list[int]]:
    """The rows of the images by their kind, without the unreadable ones."""
    headers = survey.map(_read_header, "Reading headers", channels=request.expected_channels)
    problems = {index: problem for index, problem in enumerate(headers["problem"]) if problem}
    if problems:
        by_problem: dict[str, list[int]] = {}
        for index, problem in problems.items():
            by_problem.setdefault(problem, []).append(index)
        reasons = [f"{survey.name(rows)} ({problem})" for problem, rows in by_problem.items()]
        raise ValueError(
            f"{survey.count(list(problems))} files cannot be used as images: {list_names(reasons, 3, str)}. Convert or "
            "remove them."
        )
    kinds: dict[_Kind, list[int]] = {}
    for index, (mode, channels, dtype) in enumerate(
        zip(headers["mode"], headers["channels"], headers["dtype"], strict=True)
    ):
        if mode:
            kinds.setdefault(_Kind(mode, channels, np.dtype(dtype)), []).append(index)
    transposed = [index for index, is_transposed in enumerate(headers["is_transposed"]) if is_transposed]
    if transposed:
        logger.info(
            f"{survey.count(transposed)} images are arrays of shape (channels, height, width) and are transposed to "
            f"(height, width, channels): {survey.name(transposed)}."
        )
    return kinds


def _check_depths(survey: _Survey, kinds: dict[_Kind, list[int]]) -> None:
    by_type: dict[str, list[int]] = {}
    for kind, indices in kinds.items():
        by_type.setdefault(kind.dtype.name, []).extend(indices)
    if len(by_type) > 1:
        parts = "; ".join(f"{len(rows)} {name}: {survey.name(sorted(rows))}" for name, rows in by_type.items())
        raise ValueError(
            f"The images have different types of values. {parts}. Save all with the same number of bits, or remove the "
            "others."
        )


def _choose_mode(request: FormatRequest, kinds: Sequence[_Kind]) -> tuple[ImageMode, int]:
    channels = request.expected_channels
    if request.image_mode is not None or request.known is not None:
        mode = request.image_mode or request.known.mode
    elif channels is not None:
        mode = _mode_for(channels)
    elif all(kind.mode in ("L", "LA") for kind in kinds):
        mode = "L"
    elif all(kind.mode != "array" or kind.channels == 3 for kind in kinds):
        mode = "RGB"
    else:
        mode = "array"
    return mode, channels or MODE_CHANNELS.get(mode) or kinds[0].channels


def _check_channels(
    survey: _Survey, request: FormatRequest, kinds: dict[_Kind, list[int]], mode: ImageMode, channels: int
) -> None:
    image_format = ImageFormat(mode, channels)
    # Colour and alpha only become something else where the user says so, except for RGB.
    only = ("L", "LA") if mode == "L" else get_args(ImageMode) if mode == "RGB" else ("array", mode)
    is_asked_for = request.image_mode is not None
    wrong = {
        kind: indices
        for kind, indices in kinds.items()
        if not can_convert(kind.mode, kind.channels, image_format)
        or not (is_asked_for or mode == "array" or kind.mode in only)
    }
    if not wrong:
        with_alpha = next((kind.mode for kind in kinds if kind.mode in ("LA", "RGBA")), None)
        if mode == "array" and with_alpha:
            way_out = f" If it is transparency, pass `{request.mode_argument} {with_alpha}`."
            logger.warning(
                f"The alpha of {with_alpha} images is taken for a channel like the others."
                + way_out * (request.mode_argument is not None)
            )
        for kind, rows in kinds.items():
            if "array" not in (mode, kind.mode) and kind.mode != mode:
                logger.info(
                    f"{survey.count(rows)} images are converted from {kind.mode} to {mode}: {survey.name(rows)}."
                )
        return
    found = "; ".join(f"{kind}: {survey.name(rows)}" for kind, rows in kinds.items())
    if request.expected_channels is None:
        raise ValueError(f"The images have different channels: {found}. Keep images of one kind only.")
    ways = []
    if request.mode_argument is not None and all(kind.mode != "array" for kind in wrong):
        mode_to_pass = None if mode == "array" else mode
        if request.image_mode is None and request.known is None:
            mode_to_pass = {count: name for name, count in MODE_CHANNELS.items()}.get(channels)
        if mode_to_pass is not None:
            ways.append(f"pass `{request.mode_argument} {mode_to_pass}` to convert them")
    numbers = {kind.channels for kind in kinds}
    is_settled_by_mode = request.image_mode not in (None, "array") and request.known is None
    if len(numbers) == 1 and is_settled_by_mode and request.mode_argument is not None:
        ways.append(f"leave `{request.mode_argument}` out, or pass `{request.mode_argument} array`")
        if request.channels is not None:
            ways = [f"use a network of {count_channels(numbers.pop())} without `{request.mode_argument} {mode}`"]
    elif len(numbers) == 1:
        ways.append(f"use a network of {count_channels(numbers.pop())}")
        if survey.column == "image" and request.image_mode is None and request.known is None:
            ways.append("leave `in_channels` and `out_channels` out of its config")
    else:
        ways.append("keep images of one kind only")
    what = f"The network has {count_channels(channels)}"
    if request.image_mode not in (None, "array"):
        what = f"`{request.mode_argument}` is {mode}"
    way_out = ", or ".join(ways)
    raise ValueError(f"{what}, but the images have others: {found}. {way_out[0].upper()}{way_out[1:]}.")


# 2. Values


def _measure(
    example: dict[str, Any], column: str, channels: int | None, mode: ImageMode, version: tuple
) -> dict[str, Any]:
    """
    Lowest and highest finite value of an image without its alpha, the same of its alpha as a fraction, and the number
    of values that are not finite; infinity and its negative for one that cannot be decoded.
    """
    nothing = {"low": math.inf, "high": -math.inf, "alpha_low": 0.0, "alpha_high": 1.0, "num_not_finite": 0}
    try:
        with open_image(example[column], channels) as stored:
            values, alpha = split_alpha(stored.read(), stored.mode, stored.dtype, mode)
    except UnusableImageError:
        return nothing
    for part, names in ((values, ("low", "high")), (alpha, ("alpha_low", "alpha_high"))):
        if part is None:
            continue
        finite = part
        if part.dtype.kind == "f":
            is_finite = np.isfinite(part)
            nothing["num_not_finite"] += int((~is_finite).sum())
            finite = part[is_finite]
        if finite.size:
            nothing |= dict(zip(names, (float(finite.min()), float(finite.max())), strict=True))
    return nothing


@dataclass
class _Measured:
    """Lowest and highest values of each image and of all."""

    lows: np.ndarray
    highs: np.ndarray

    @property
    def low(self) -> float:
        return float(self.lows.min())

    @property
    def high(self) -> float:
        return float(self.highs.max())

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


def _measure_all(survey: _Survey, request: FormatRequest, dtype: np.dtype, mode: ImageMode) -> _Measured:
    """Measures the values of all images, without their alpha."""
    results = survey.map(_measure, "Reading values", channels=request.expected_channels, mode=mode)
    not_finite = [index for index, number in enumerate(results["num_not_finite"]) if number]
    if not_finite:
        details = [f"{results['num_not_finite'][index]} values" for index in not_finite[:3]]
        raise ValueError(
            f"{survey.count(not_finite)} images hold NaN or infinite values: {survey.name(not_finite, details)}. "
            "Replace these values, or remove the images."
        )
    alphas = list(zip(results["alpha_low"], results["alpha_high"], strict=True))
    wrong = [index for index, (low, high) in enumerate(alphas) if low < 0 or high > 1]
    if wrong:
        details = [describe_alpha(*alphas[index], dtype) for index in wrong[:3]]
        raise ValueError(
            f"The alpha of {survey.count(wrong)} images is outside of the range of its type: "
            f"{survey.name(wrong, details)}. Rescale it in the files: 0 is transparent, the upper end opaque."
        )
    measured = _Measured(np.array(results["low"]), np.array(results["high"]))
    if measured.low > measured.high:
        raise ValueError(
            f"None of the {len(measured.lows)} images can be decoded: {survey.name(range(len(measured.lows)))}. Check "
            "the files."
        )
    return measured


def _find_range(
    survey: _Survey, request: FormatRequest, dtype: np.dtype, mode: ImageMode
) -> tuple[tuple[float, float], int | None]:
    """The value range and the number of levels."""
    known, argument = request.known, request.range_argument
    whole, asked = (0, 255), request.value_range
    if dtype == np.uint8 and (asked == whole or (asked is None and (known is None or known.value_range == whole))):
        return whole, 256 if asked or known is None else known.num_levels
    measured = _measure_all(survey, request, dtype, mode)
    if request.value_range is None and known is not None:
        _check_known(survey, known, dtype, measured, argument)
        return known.value_range, known.num_levels
    value_range = _whole_range(dtype, measured, argument) if request.value_range is None else request.value_range
    if value_range == "auto":
        if measured.low == measured.high:
            raise ValueError(
                f"All values of the images are {measured.low:g}, so that `{argument} auto` finds no "
                f"range. Check the images, or pass `{argument} LOW HIGH`."
            )
        value_range = (measured.low, measured.high)
        logger.info(f"`{argument} auto`: the images range from {measured.low:.9g} to {measured.high:.9g}.")
    _check_inside(survey, value_range, measured, f"`{argument}`", argument)
    if request.value_range is not None and known is not None and tuple(value_range) != known.value_range:
        logger.warning(
            f"`{argument}` is {value_range[0]:g} to {value_range[1]:g}, but the model was trained on {known}: the same "
            "value means something else to it."
        )
    if request.value_range is None and dtype.itemsize > 1:
        warn_of_share(measured.low, measured.high, value_range, MIN_SHARE_OF_RANGE, argument)
    return _levels_of(dtype, value_range, argument)


def _whole_range(dtype: np.dtype, measured: _Measured, argument: str) -> tuple[float, float]:
    """The range of a type, where it is a default."""
    way_out = (
        f"Pass `{argument} LOW HIGH`, the values that stand for black and white, or `{argument} auto` for "
        f"{measured}, the range of the images."
    )
    if dtype.kind == "b":
        return 0, 1
    if dtype.kind == "f":
        raise ValueError(f"The images are floating point numbers ({dtype}), whose range is not known. {way_out}")
    if dtype.itemsize > 2:
        raise ValueError(f"The images are {dtype}, whose whole range has more than {MAX_LEVELS} levels. {way_out}")
    info = np.iinfo(dtype)
    return info.min, info.max


def _check_inside(survey: _Survey, value_range: Sequence[float], measured: _Measured, what: str, argument: str) -> None:
    low, high = value_range
    outside = np.flatnonzero((measured.lows < low) | (measured.highs > high)).tolist()
    if outside:
        details = [f"{measured.lows[index]:g} to {measured.highs[index]:g}" for index in outside[:3]]
        raise ValueError(
            f"{what} is {low:g} to {high:g}, but {survey.count(outside)} images have values outside of it: "
            f"{survey.name(outside, details)}. All images range from {measured}: pass "
            f"`{argument} LOW HIGH` that includes them, or `{argument} auto`."
        )


def _check_known(survey: _Survey, known: ImageFormat, dtype: np.dtype, measured: _Measured, argument: str) -> None:
    """Checks that the data suit the range of the pretrained model."""
    low, high = known.value_range
    if dtype.kind == "f" and known.num_levels is not None:
        raise ValueError(
            f"The images are floating point numbers ({dtype}) from {measured}, but the model was trained on "
            f"{known}. Pass the range of the images as `{argument} LOW HIGH`."
        )
    if dtype.kind != "f" and dtype.itemsize <= 2 and known.num_levels is not None:
        lowest, highest = _whole_range(dtype, measured, argument)
        if low < lowest or high > highest:
            raise ValueError(
                f"The images are {dtype}, from {lowest} to {highest}, but the model was trained on {known}. "
                f"Pass the range of the images as `{argument} {lowest} {highest}`."
            )
    _check_inside(survey, (low, high), measured, f"The range of the model, trained on {known},", argument)


def warn_of_share(
    lowest: float,
    highest: float,
    value_range: Sequence[float],
    least: float,
    argument: str = "--value_range",
    images: str = "images",
) -> bool:
    """Warns of integers that fill less than this share of the value range, and returns whether they do."""
    low, high = value_range
    share = (highest - lowest) / (high - low)
    if share >= least:
        return False
    ways = f"`{argument} auto`"
    whole = 2 ** int(highest).bit_length() - 1  # 4095 for 12 bits
    if lowest >= 0 and highest >= 1 and whole < 0.75 * high:
        ways += f" or `{argument} 0 {whole}`"
    percent = f"{share:.0%}" if share >= 0.01 else f"{100 * share:.1g}%"
    logger.warning(
        f"The {images} range from {lowest:g} to {highest:g} and fill {percent} of {low:g} to {high:g}: pass {ways}."
    )
    return True


def _levels_of(dtype: np.dtype, value_range: Sequence[float], argument: str) -> tuple[tuple[float, float], int | None]:
    low, high = value_range
    if dtype.kind == "f":
        return (float(low), float(high)), None
    if low != int(low) or high != int(high):
        raise ValueError(
            f"`{argument}` is {low:g} to {high:g}, but the images are integers ({dtype}). Pass whole numbers, or "
            "convert the images to floating point numbers."
        )
    num_levels = int(high) - int(low) + 1
    if num_levels > MAX_LEVELS:
        raise ValueError(
            f"The integers from {low:g} to {high:g} are {num_levels} levels, more than {MAX_LEVELS}. Pass a narrower "
            f"`{argument}`, or convert the images to floating point numbers, which are continuous."
        )
    if max(-low, high) > MAX_INTEGER:
        raise ValueError(
            f"The integers from {low:.9g} to {high:.9g} are beyond {MAX_INTEGER}, so that float32, in which networks "
            "compute, does not tell them apart. Subtract an offset from all images."
        )
    return (int(low), int(high)), num_levels
