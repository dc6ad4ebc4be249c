"""Class labels: their names, beside a model and in its data, and a sampler that balances classes."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .images import ImageDataset
from .seeding import derive_seed


logger = logging.getLogger(__name__)

ID2LABEL_NAME = "id2label.json"


class BalancedClassSampler(torch.utils.data.Sampler[int]):
    """
    Draws the classes equally often (their numbers differ by 1 at most), however many images they have: an epoch is as
    long as the dataset, holds each image of a small class several times and a random choice of a large one.

    Like `EpochShuffleSampler`, it depends on the seed and the epoch of an `ImageDataset` alone.

    Args:
        dataset (`ImageDataset`): Whose epoch and seed are used.
        labels (sequence of `int`): The class of each example; classes without examples are not drawn.
    """

    def __init__(self, dataset: ImageDataset, labels: Sequence[int]):
        if len(labels) != len(dataset):
            raise ValueError(f"Got {len(labels)} labels for {len(dataset)} examples. Pass one for each.")
        self.dataset = dataset
        ids = torch.as_tensor(labels)
        self.members = [torch.nonzero(ids == label)[:, 0] for label in ids.unique()]

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        seed = derive_seed(self.dataset.seed, "balanced shuffle", self.dataset.epoch)
        generator = torch.Generator().manual_seed(seed)
        share, rest = divmod(len(self.dataset), len(self.members))
        with_one_more = set(torch.randperm(len(self.members), generator=generator)[:rest].tolist())
        drawn = []
        for number, members in enumerate(self.members):
            wanted = share + (number in with_one_more)
            rounds = math.ceil(wanted / len(members))
            # Every image once before any of them comes again.
            order = [torch.randperm(len(members), generator=generator) for _ in range(rounds)]
            drawn += [members[torch.cat(order)[:wanted]]] if wanted else []
        indices = torch.cat(drawn)
        yield from indices[torch.randperm(len(indices), generator=generator)].tolist()


def save_id2label(folder: str | os.PathLike, id2label: Mapping[int, str]) -> None:
    """
    Writes `id2label.json` (class number -> name) beside the weights in `folder`.

    It is a file of its own, since the config of a network holds the arguments of its constructor and nothing else.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps({str(number): name for number, name in id2label.items()}, indent=2, ensure_ascii=False)
    Path(folder, ID2LABEL_NAME).write_text(text + "\n", encoding="utf-8")


def load_id2label(repository: str | os.PathLike, subfolder: str | None = None, **kwargs: Any) -> dict[int, str] | None:
    """
    The names of the classes of a classifier saved by `save_id2label`.

    Args:
        repository (`str` or `os.PathLike`): A folder, or a repository on the Hub.
        subfolder (`str`, *optional*): Where in it the classifier is.
        kwargs: For a repository on the Hub: `revision`, `cache_dir` and others of `hf_hub_download`.

    Returns:
        `dict[int, str]`: Class number -> name; None if there is no such file.
    """
    if os.path.isdir(repository):
        path = Path(repository, subfolder or "", ID2LABEL_NAME)
        if not path.is_file():
            return None
    else:
        try:
            path = Path(hf_hub_download(str(repository), ID2LABEL_NAME, subfolder=subfolder, **kwargs))
        except EntryNotFoundError:
            return None
    return {int(number): name for number, name in json.loads(path.read_text(encoding="utf-8")).items()}


def match_classes(
    id2label: Mapping[int, str],
    known: Mapping[int, str] | Mapping[str, str] | None,
    num_classes: int | None = None,
    *,
    by_number: bool = False,
) -> dict[int, int]:
    """
    For each class of some data, the number that the training data or a network gives the class of the same name. A set
    that lacks a class may give those after it other numbers, and each image would be taken for one of its neighbour's
    class.

    Args:
        id2label (mapping): Number -> name in the data.
        known (mapping, *optional*): The same of the training data or the network; its numbers may be text, as in JSON.
        num_classes (`int`, *optional*): Of the network, for `by_number`.
        by_number (`bool`, defaults to `False`): Where no name is known, but there are as many classes, all numbers are
            taken for the same classes, with a warning. `False`: such a name is refused.

    Returns:
        `dict[int, int]`: A known number for each number of `id2label`.

    Raises:
        ValueError: If a name is not known, or belongs to several classes; with `by_number`, a set without any known
            name is refused only if it does not have `num_classes` classes.
    """
    known = {int(number): name for number, name in (known or {}).items()}
    found = match_names(id2label, known)
    unknown = [name for number, name in id2label.items() if number not in found]
    if not unknown:
        return found
    if not by_number:
        raise ValueError(
            f"The validation data has the class {unknown[0]!r}, which the training data has not (its classes: "
            f"{', '.join(map(repr, known.values()))}). Use the same `label_column` values in both."
        )
    if found or (num_classes is not None and len(id2label) != num_classes):
        raise ValueError(
            f"The data has {len(id2label)} classes and the network {num_classes}, and they cannot be matched by name: "
            "the "
            + (f"model does not know {unknown[0]!r}." if known else "model names no classes.")
            + " Give the data the names, or all of the classes, that the model was trained with."
        )
    if known:
        first, learned = next(iter(id2label.values())), next(iter(known.values()))
        logger.warning(
            f"The data's class names are not the model's ({first!r}, {learned!r}, ...). Their numbers are taken for "
            "the same classes."
        )
    else:
        logger.warning(
            "The model names no classes. It has as many as the data, so equal numbers are taken for equal classes."
        )
    return {number: number for number in id2label}


MAX_NAMES = 10  # in a message


def match_names(id2label: Mapping[int, str], known: Mapping[int, str]) -> dict[int, int]:
    """
    The numbers that `known` gives the classes of some data, for those whose names it holds.

    Args:
        id2label (mapping): Number -> name in the data.
        known (mapping): Number -> name in a network, or in other data.

    Raises:
        ValueError: If a name belongs to several numbers of `known`.
    """
    if all(known.get(number) == name for number, name in id2label.items()):
        return {number: number for number in id2label}  # also where two classes have one name
    numbers: dict[str, int] = {}
    for number, name in known.items():
        if name in numbers and name in id2label.values():
            raise ValueError(
                f"The data has a class {name!r}, but classes {numbers[name]} and {number} of the model both have this "
                "name. Give each its own name in the model's `id2label`."
            )
        numbers[name] = number
    return {number: numbers[name] for number, name in id2label.items() if name in numbers}


def list_names(names: Iterable[str]) -> str:
    """The first names, quoted, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(map(repr, names[:MAX_NAMES])) + more
