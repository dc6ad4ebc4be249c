"""
The rows of a pretrained network for the classes of the data: classes are matched by name, new ones get new rows.

A network has one row per class, in the class embedding of a U-Net or in the last layer of a classifier. A plan holds
only names and numbers; `match_unet_classes` (unets.py) and `match_classifier_classes` (classifiers.py) apply it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin

from ..data.labels import list_names, match_names


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassPlan:
    """The rows of a network for the classes of some data."""

    sources: tuple[int | None, ...]  # the row of the pretrained network that each row copies; None for a new row
    null_class_id: int | None
    id2label: dict[int, str]  # row -> name, for all rows with a name
    to_row: dict[int, int]  # number of a class in the data -> row
    # Names of the new classes, of those that are kept although the data lacks them, and of the removed ones.
    added: tuple[str, ...]
    absent: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def keeps_rows(self) -> bool:
        """Whether the network can stay as it is."""
        return not self.dropped and self.sources == tuple(range(len(self.sources)))


def plan_classes(
    id2label: Mapping[int, str],
    known: Mapping[int, str],
    num_rows: int,
    null_class_id: int | None = None,
    *,
    adds_null: bool = False,
    replaces: bool = False,
    frozen: str | None = None,
    network: str = "U-Net",
) -> ClassPlan:
    """
    Plans the rows of a pretrained network for the classes of some data. Classes of the same name share a row, whatever
    their numbers; the other classes of the data get new rows.

    Existing classes keep their rows. New ones follow, in the order of the data. The null class moves behind them if it
    was last, and stays where it is otherwise.

    Args:
        id2label (mapping): Number -> name in the data.
        known (mapping): Number -> name in the network; empty if it names no classes. Numbers without a row are ignored.
        num_rows (`int`): Rows of the network, the null class included.
        null_class_id (`int`, *optional*): The row of its null class.
        adds_null (`bool`, defaults to `False`): Add a null class, as the last row, if there is none.
        replaces (`bool`, defaults to `False`): Keep only the classes of the data, with their numbers there. The null
            class comes last.
        frozen (`str`, *optional*): The reason why the network cannot get new rows, which are then an error.
        network (`str`, defaults to `"U-Net"`): The network's name in messages.

    Raises:
        ValueError: If the classes need new rows in a frozen network, or if it is unclear which rows they belong to,
            because some or all rows have no name. But if no row has a name and the data has as many classes, equal
            numbers are taken for equal classes, with a warning.
    """
    known = {row: name for row, name in known.items() if row < num_rows}
    class_rows = [row for row in range(num_rows) if row != null_class_id]
    found = match_names(id2label, known)
    new = [number for number in id2label if number not in found]

    # 1. rows without a name: no guesses
    unnamed = [row for row in class_rows if row not in known]
    if new and unnamed and not replaces:
        if known or class_rows != list(id2label):
            named = f"{len(class_rows) - len(unnamed)} of them" if known else "none"
            advice = "Name" if frozen else "Pass `--replace_classes` to keep only the classes of the data, or name"
            raise ValueError(
                f"The data has {len(id2label)} class(es), the pretrained {network} has {len(class_rows)} and names "
                f"{named}, so it is unclear which of them {list_names(id2label[number] for number in new)} would be. "
                f"{advice} all its classes, in `id2label` of `model_index.json` or a classifier's `id2label.json`."
            )
        found, new = {number: number for number in id2label}, []
        logger.warning(
            f"The pretrained {network} names no classes and has as many as the data: equal numbers are taken for equal "
            "classes."
        )
    if new and frozen:
        raise ValueError(
            f"The data has classes that the pretrained {network} lacks: "
            f"{list_names(id2label[number] for number in new)}. They need new rows, but {frozen}. Remove their images, "
            "or fine-tune all weights on them first."
        )

    # 2. which row each row copies
    sources: list[int | None]
    if replaces:
        sources = [found.get(number) for number in id2label if number not in found or found[number] != null_class_id]
    else:
        last = num_rows - 1
        sources = [row for row in range(num_rows) if not row == null_class_id == last] + [None] * len(new)
    if null_class_id is None and adds_null:
        sources.append(None)
    elif null_class_id is not None and null_class_id not in sources:
        sources.append(null_class_id)

    # 3. names and numbers of these rows
    row_of = {source: row for row, source in enumerate(sources) if source is not None}
    new_rows = (row for row, source in enumerate(sources) if source is None)  # a new null class comes last
    to_row = {number: row_of[found[number]] if number in found else next(new_rows) for number in id2label}
    names = {row_of[row]: name for row, name in known.items() if row in row_of}
    names |= {row: id2label[number] for number, row in to_row.items()}
    others = {row: known.get(row, f"class {row}") for row in class_rows if row not in found.values()}
    return ClassPlan(
        sources=tuple(sources),
        null_class_id=row_of[null_class_id] if null_class_id is not None else len(sources) - 1 if adds_null else None,
        id2label=dict(sorted(names.items())),
        to_row=to_row,
        added=tuple(id2label[number] for number in new),
        absent=tuple(name for row, name in others.items() if row in row_of),
        dropped=tuple(name for row, name in others.items() if row not in row_of),
    )


def log_plan(plan: ClassPlan, network: str) -> None:
    """Logs which classes a pretrained network knows, gains, keeps and loses."""
    matched = len(plan.to_row) - len(plan.added)
    message = f"Classes of the data: {matched} known to the pretrained {network}, {len(plan.added)} new"
    logger.info(message + (f": {list_names(plan.added)}" if plan.added else ""))
    if plan.absent:
        if not matched:
            logger.warning(
                f"The pretrained {network} knows none of the data's classes; its own are {list_names(plan.absent)}. "
                "Rename classes that are the same; `--replace_classes` drops those that the data lacks."
            )
        logger.info(
            f"Classes of the {network} without images here, kept: {len(plan.absent)} ({list_names(plan.absent)})"
        )
    if plan.dropped:
        logger.info(f"Classes of the {network} dropped: {len(plan.dropped)} ({list_names(plan.dropped)})")


def copy_rows(table: torch.Tensor, sources: Iterable[int | None], new: torch.Tensor) -> torch.Tensor:
    """Copies of the rows `sources` of `table` `(num_rows, ...)`, with `new` `(...)` where `sources` is None."""
    return torch.stack([new if source is None else table[source] for source in sources]).detach()


def change_config(model: ConfigMixin, **changes: Any) -> None:
    """
    Changes arguments in the config of a model so that diffusers' `from_config` uses them, too. After
    `register_to_config` it ignores those that were defaults when the model was built.
    """
    defaults = [name for name in model.config.get("_use_default_values", []) if name not in changes]
    model.register_to_config(**changes, _use_default_values=defaults)
