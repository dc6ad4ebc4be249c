"""Class labels: their numbers, their names next to a model's weights, and the same classes in other data by name."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

UNLABELLED = -1
ID2LABEL_NAME = "id2label.json"
MAX_NAMES = 10  # in a message


# 1. Numbers


def number_labels(values: Sequence[Any], names: Sequence[str] | None, column: str) -> tuple[list[int], dict[int, str]]:
    """
    Maps labels to `0 .. K-1`, and missing ones (None, NaN, -1, empty text) to -1.

    Args:
        values (sequence): Integers (as floats, too: pandas stores integers with gaps so), booleans or text.
        names (sequence of `str`, *optional*): Names of the classes, which then keep their numbers. Otherwise numbers
            follow the sorted values.
        column (`str`): Named in errors.

    Returns:
        `tuple` of the numbers and `id2label` (number -> name).
    """
    absent = [value is None or value == "" or value == -1 or value != value for value in values]  # NaN != NaN
    kinds = {type(value) for value, none in zip(values, absent, strict=True) if not none}
    if not kinds:
        raise ValueError(f"`label_column` {column!r} holds no label at all. Drop it to train without labels.")
    if len(kinds) > 1 or not kinds <= {int, bool, str, float}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"`label_column` {column!r} holds {found} values. Class names, integers or text are needed.")
    present = {value for value, none in zip(values, absent, strict=True) if not none}
    odd = [value for value in present if isinstance(value, float) and not value.is_integer()]
    if odd:
        raise ValueError(f"`label_column` {column!r} holds {min(odd)}, which is no class. Use integers or text.")
    originals = range(len(names)) if names is not None else sorted(present)
    unknown = sorted(present - set(originals))
    if unknown:
        raise ValueError(f"`label_column` {column!r} holds {unknown[0]}, but its class names end at {len(names) - 1}.")
    texts = names or [str(int(value) if isinstance(value, float) else value) for value in originals]
    to_number = {value: number for number, value in enumerate(originals)}
    numbers = [UNLABELLED if none else to_number[value] for value, none in zip(values, absent, strict=True)]
    return numbers, dict(enumerate(texts))


def renumber_labels(dataset: datasets.Dataset, numbers: Mapping[int, int]) -> datasets.Dataset:
    """
    Changes the class numbers in the column `label` of a dataset.

    Args:
        dataset (`datasets.Dataset`): From `load_image_dataset`.
        numbers (mapping): Old number -> new one; other numbers, such as -1 of unlabelled examples, stay.
    """
    if all(old == new for old, new in numbers.items()):
        return dataset
    labels = [numbers.get(label, label) for label in dataset["label"][:]]
    return dataset.remove_columns("label").add_column("label", np.array(labels, dtype=np.int64))


# 2. Names


def save_id2label(folder: str | os.PathLike, id2label: Mapping[int, str]) -> None:
    """
    Writes `id2label.json` (class number -> name) next to the weights in `folder`. It is a separate file because the
    config of a network holds the arguments of its constructor and nothing else.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps({str(number): name for number, name in id2label.items()}, indent=2, ensure_ascii=False)
    Path(folder, ID2LABEL_NAME).write_text(text + "\n", encoding="utf-8")


def load_id2label(repository: str | os.PathLike, subfolder: str | None = None, **kwargs: Any) -> dict[int, str] | None:
    """
    Loads the class names of a classifier saved by `save_id2label`.

    Args:
        repository (`str` or `os.PathLike`): A folder, or a repository on the Hub.
        subfolder (`str`, *optional*): The classifier's folder in it.
        kwargs: Arguments of `hf_hub_download` for a repository on the Hub: `revision`, `cache_dir` and others.

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


def list_names(names: Iterable[object], most: int = MAX_NAMES, quote: Callable[[object], str] = repr) -> str:
    """Lists the first names and the number of the others, for messages."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(quote, names[:most])) + more


def read_class_names(path: str | os.PathLike) -> list[str]:
    """
    Reads the names of classes, in the order of their numbers: a text file of one name a line, a JSON list, or the
    `id2label.json` of a classifier. Raises a `ValueError` for other files, empty or repeated names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        names = json.loads(text) if str(path).lower().endswith(".json") else text.splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`class_names` is {str(path)!r}, which cannot be read: {type(error).__name__}: {error}. Pass a text file "
            "of one name a line, or a JSON list."
        ) from error
    if isinstance(names, dict):
        if set(names) != {str(number) for number in range(len(names))}:
            raise ValueError(
                f"`class_names` is {str(path)!r}, whose keys are not the numbers 0 to {len(names) - 1}. Pass the "
                "`id2label.json` of a classifier, a JSON list, or a text file of one name a line."
            )
        names = [names[str(number)] for number in range(len(names))]
    names = names if isinstance(names, list) else [None]
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong or not names or len(set(names)) < len(names):
        repeated = next((name for name in names if names.count(name) > 1), None)
        raise ValueError(
            f"`class_names` {str(path)!r} holds {'no names' if not names else f'{(wrong or [repeated])[0]!r}'}"
            f"{' more than once' if names and not wrong else ''}. Pass each name once, none of them empty."
        )
    return names


# 3. The same classes elsewhere


def match_names(id2label: Mapping[int, str], known: Mapping[int, str]) -> dict[int, int]:
    """
    Maps the class numbers of some data to the numbers of the same names in `known`, where it has them.

    Args:
        id2label (mapping): Number -> name in the data.
        known (mapping): Number -> name in a network, or in other data.

    Raises:
        ValueError: If a name belongs to several numbers of `known`.
    """
    if all(known.get(number) == name for number, name in id2label.items()):
        return {number: number for number in id2label}  # also where two classes have the same name
    numbers: dict[str, int] = {}
    for number, name in known.items():
        if name in numbers and name in id2label.values():
            raise ValueError(
                f"The data has a class {name!r}, but classes {numbers[name]} and {number} of the model both have this "
                "name. Give each its own name in the model's `id2label`."
            )
        numbers[name] = number
    return {number: numbers[name] for number, name in id2label.items() if name in numbers}


def match_classes(
    id2label: Mapping[int, str],
    known: Mapping[int, str] | Mapping[str, str] | None,
    num_classes: int | None = None,
    *,
    by_number: bool = False,
) -> dict[int, int]:
    """
    Maps the class numbers of some data to the numbers of the same names in the training data or in a network. Without
    it, the images of a set that lacks a class would be taken for their neighbours' classes.

    Args:
        id2label (mapping): Number -> name in the data.
        known (mapping, *optional*): Number -> name in the training data or the network; numbers may be text, as in
            JSON.
        num_classes (`int`, *optional*): Number of classes of the network.
        by_number (`bool`, defaults to `False`): If no name matches but there are `num_classes` classes, take equal
            numbers for equal classes, with a warning.

    Returns:
        `dict[int, int]`: A known number for each number of `id2label`.

    Raises:
        ValueError: If a class cannot be matched, or its name belongs to several classes.
    """
    known = {int(number): name for number, name in (known or {}).items()}
    found = match_names(id2label, known)
    unknown = [name for number, name in id2label.items() if number not in found]
    if not unknown:
        return found
    names = f"names {list_names(known.values())}" if known else "names no classes"
    if by_number and not found and num_classes in (None, len(id2label)):
        logger.warning(f"The data has the classes {list_names(unknown)}. The model {names}. Equal numbers are matched.")
        return {number: number for number in id2label}
    size = "" if num_classes is None else f" and the network {num_classes}"
    raise ValueError(
        f"The data has {len(id2label)} classes{size}, but {list_names(unknown)} cannot be matched by name: the model "
        f"{names}. Use data with the class names that the model was trained with."
    )
