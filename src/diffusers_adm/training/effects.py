"""Arguments that were given and have no effect: refused where that is a mistake, named in the log otherwise."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch


COSINE_SCHEDULES = ("cosine", "squaredcos_cap_v2")


@dataclasses.dataclass(frozen=True)
class Rule:
    """
    When arguments act.

    Args:
        names (tuple of `str`): The arguments.
        act (callable): From the values of all arguments by name to whether these act. Arguments that the command does
            not have are None.
        because (`str`): Why they do not, if they do not; it may name other arguments as `{name}`.
        refused (`bool`, defaults to `False`): Giving them is an error. Otherwise the log names them: a recipe may hold
            what an argument on the command line has switched off.
    """

    names: tuple[str, ...]
    act: Callable[[Mapping[str, Any]], bool]
    because: str
    refused: bool = False


TRAINING_RULES = (
    Rule(
        ("revision", "variant"),
        lambda given: given["pretrained_model_name_or_path"] is not None,
        "it belongs to a pretrained model, and `pretrained_model_name_or_path` was not given",
        refused=True,
    ),
    Rule(
        ("revision",),
        lambda given: not os.path.isdir(given["pretrained_model_name_or_path"] or ""),
        "`pretrained_model_name_or_path` {pretrained_model_name_or_path!r} is a folder, which has no revisions",
        refused=True,
    ),
    Rule(
        ("beta_start", "beta_end"),
        lambda given: given["ddpm_beta_schedule"] not in COSINE_SCHEDULES,
        "`ddpm_beta_schedule` is {ddpm_beta_schedule!r}, which is defined without it",
        refused=True,
    ),
    Rule(
        ("class_dropout_prob",),
        lambda given: given["label_column"] is not None,
        "without `label_column` there are no classes to drop",
    ),
    Rule(
        ("caption_dropout_prob",),
        lambda given: given["caption_column"] is not None,
        "without `caption_column` there are no captions to drop",
    ),
    Rule(
        ("num_train_epochs",),
        lambda given: given["max_train_steps"] is None,
        "`max_train_steps` {max_train_steps} says when training ends",
    ),
    Rule(
        ("lr_warmup_steps",),
        lambda given: given["lr_scheduler"] != "constant",
        "`lr_scheduler` 'constant' has no warm-up; 'constant_with_warmup' has one",
    ),
    Rule(
        ("ema_max_decay", "ema_inv_gamma", "ema_power"),
        lambda given: given["use_ema"],
        "`use_ema` is false, so there is no average",
    ),
    Rule(
        ("overwrite_output_dir",),
        lambda given: given["resume_from_checkpoint"] is None,
        "with `resume_from_checkpoint` the run goes on and nothing is deleted",
    ),
    Rule(("logging_dir",), lambda given: given["report_to"] != "none", "`report_to` is 'none'"),
    Rule(("allow_tf32",), lambda given: torch.cuda.is_available(), "it is for CUDA devices, and there is none"),
    # The classifier's; the other scripts have no held-out images.
    Rule(
        ("validation_steps",),
        lambda given: (
            "validation_split" not in given or bool(given["validation_split"] or given["validation_data_files"])
        ),
        "there are no held-out images to validate on: name `validation_data_files` or `validation_split`",
    ),
    Rule(("num_timestep_bins",), lambda given: given["noised"], "`noised` is false, so there is one timestep only"),
)


def check_effects(
    *all_args: Any, rules: Sequence[Rule] = TRAINING_RULES, taken_over: Collection[str] = ()
) -> list[str]:
    """
    Looks for arguments that were given and have no effect. Given means: neither the default nor off (None, 0, False).

    Args:
        all_args (dataclass instances): From [`parse_args`].
        rules (sequence of `Rule`, *optional*): Those of the training scripts by default.
        taken_over (collection of `str`, *optional*): Arguments that were not given, but have the values of the run that
            is resumed.

    Returns:
        list of `str`: One sentence for each that is harmless, to be logged.

    Raises:
        ValueError: For one that is surely a mistake.
    """
    values: dict[str, Any] = {name: None for rule in rules for name in rule.names}
    fields = [(arguments, field) for arguments in all_args for field in dataclasses.fields(arguments)]
    values |= {field.name: getattr(arguments, field.name) for arguments, field in fields}
    is_given = {field.name for _, field in fields if values[field.name] and values[field.name] != field.default}
    is_given -= set(taken_over)
    sentences = []
    for rule in rules:
        for name in rule.names:
            if name not in is_given or rule.act(_Values(values)):
                continue
            sentence = f"`{name}` is {values[name]!r}, which has no effect: {rule.because.format(**values)}."
            if rule.refused:
                raise ValueError(f"{sentence} Leave it out.")
            sentences.append(sentence)
    return sentences


class _Values(dict):
    """None for an argument that the command does not have."""

    def __missing__(self, name: str) -> None:
        return None
