"""
Resuming a run: what each argument does if it has changed since the checkpoint, and the record that shows it.

A checkpoint records the arguments that it was trained with (`train_args.yaml`) and what they led to (`run_record.json`:
the noise schedule, the classes, the number of images, the config of the network). A run that is resumed takes from
there the arguments that were left out. Those that were given are used, or refused by name, as `VERDICTS` says.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel

from ..commands.arguments import build_arguments, given_arguments
from ..data.fingerprints import hash_tensors, hash_tokenizer
from ..schedulers.noise_schedules import alphas_cumprod_of, is_same_noise, noise_schedule_of
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .arguments import TrainingArguments
from .checkpoints import CHECKPOINT_NAME, REPLACED_PREFIX, TrainingProgress, find_checkpoint, resume_checkpoint
from .effects import COSINE_SCHEDULES
from .ema import load_average
from .setup import ARGUMENTS_NAME, write_settings


logger = get_logger(__name__)

RECORD_NAME = "run_record.json"
RECORD_VERSION = 1


# 1. What may change


# The verdicts. No influence on what is learned: the new value is used.
FREE = "free"
# Takes effect from the checkpoint on; the moments of the optimizer and the averages are kept.
APPLIED = "applied"
# Would continue another training (another noise, loss, order of the data, ...): refused, unless `--force_resume`.
PROCESS = "process"
# The checkpoint could not be loaded: refused.
NEVER = "never"
# Says where something is read: what is read is compared with that of the checkpoint, instead of its name.
SOURCE = "source"

# The arguments of the noise, by their names in the config of a scheduler.
NOISE_ARGUMENTS = {
    "ddpm_num_steps": "num_train_timesteps",
    "ddpm_beta_schedule": "beta_schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "prediction_type": "prediction_type",
    "variance_type": "variance_type",
}
VERDICTS = {
    name: verdict
    for verdict, names in {
        FREE: (
            *("output_dir", "cache_dir", "resume_from_checkpoint", "force_resume", "overwrite_output_dir"),
            *("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "logging_dir", "report_to"),
            *("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo"),
            *("dataloader_num_workers", "image_check_num_proc", "precompute_text_embeddings"),
            *("gradient_checkpointing", "channels_last"),
            *("validation_steps", "num_validation_images", "validation_num_inference_steps"),
            *("validation_guidance_scale", "validation_prompts", "validation_data_files", "validation_split"),
            *("max_validation_samples", "num_timestep_bins"),
        ),
        APPLIED: (
            *("learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "num_train_epochs"),
            *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm"),
            *("mixed_precision", "allow_tf32", "ema_max_decay", "ema_inv_gamma", "ema_power"),
            *("class_dropout_prob", "caption_dropout_prob", "condition_dropout_prob"),
        ),
        PROCESS: (
            *("seed", "train_batch_size", "gradient_accumulation_steps"),
            *("dataset_name", "dataset_config_name", "train_data_dir", "data_files", "split", "max_train_samples"),
            *("image_column", "label_column", "caption_column", "conditioning_image_column", "condition"),
            *("resolution", "center_crop", "random_flip", "class_balanced", "min_image_size"),
            *NOISE_ARGUMENTS,
            *("objective", "snr_gamma", "timestep_sampler", "noised", "low_res_size", "max_noise_level"),
        ),
        NEVER: (
            *("use_ema", "train_text_encoder", "task", "lora_rank", "lora_alpha", "lora_target_modules"),
            *("controlnet_width", "conditioning_embedding_out_channels", "replace_classes"),
        ),
        SOURCE: (
            *("pretrained_model_name_or_path", "revision", "variant", "model_config_name_or_path"),
            *("controlnet_model_name_or_path", "text_encoder_name_or_path", "tokenizer_name_or_path"),
            "text_encoder_config_name_or_path",
        ),
    }.items()
    for name in names
}
# They concern one start of a run, so they are not taken from an earlier one.
OF_ONE_START = ("resume_from_checkpoint", "force_resume", "overwrite_output_dir")
# What is pushed to the Hub is the result of the run in its own folder, not that of one that branches off elsewhere.
OF_ONE_FOLDER = ("push_to_hub", "hub_model_id", "hub_private_repo")
# Whoever gives one of these leaves the others out.
ALTERNATIVES = (
    ("pretrained_model_name_or_path", "model_config_name_or_path"),
    ("text_encoder_name_or_path", "text_encoder_config_name_or_path"),
    ("dataset_name", "train_data_dir", "data_files"),
    ("condition", "conditioning_image_column"),
)
# None leaves these to the pretrained model, whose values the run has recorded.
INHERITED = ("low_res_size", "max_noise_level")
# Compared by what they lead to, once that is known: the noise schedule, the layers that have an adapter.
COMPARED_LATER = (*NOISE_ARGUMENTS, "lora_target_modules")


def _is_same(first: Any, second: Any) -> bool:
    if first == second:
        return True
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_is_same, first, second))
    paths = isinstance(first, str) and isinstance(second, str) and os.path.exists(first) and os.path.exists(second)
    return paths and os.path.samefile(first, second)


def _flag(name: str, value: Any) -> str:
    words = value if isinstance(value, list) else [value]
    return f"--{name} {' '.join(str(word).lower() if word in (None, True, False) else str(word) for word in words)}"


# 2. Checkpoints and their records


@dataclass
class Checkpoint:
    """
    What a checkpoint says of the run that wrote it.

    Args:
        path (`Path`): Its folder.
        script (`str`, *optional*): Which script wrote it.
        settings (`dict`, *optional*): Its arguments. None where they are not known.
        facts (`dict`): What they led to; empty for a checkpoint of an earlier version.
        step (`int`, *optional*): Optimizer steps taken.
        ema (`dict`, *optional*): The state of the average, without the weights.
    """

    path: Path
    script: str | None = None
    settings: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    ema: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.path.name.removeprefix(REPLACED_PREFIX)

    @property
    def has_record(self) -> bool:
        return bool(self.facts)


def read_checkpoint(path: Path, argument_types: Sequence[type], script: str) -> Checkpoint:
    """
    Reads the record of a checkpoint; of one that an earlier version wrote, the arguments in the folder of its run.

    Raises:
        ValueError: If another script wrote it, or its record cannot be read.
    """
    checkpoint = Checkpoint(path)
    if (path / RECORD_NAME).is_file():
        record = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
        if record["version"] != RECORD_VERSION:
            raise ValueError(f"{path} was written by another version of diffusers-adm. Resume it with that one.")
        checkpoint = Checkpoint(path, record["script"], None, record["facts"], record["global_step"], record["ema"])
    elif match := CHECKPOINT_NAME.fullmatch(checkpoint.name):
        checkpoint.step = int(match.group(1))
    if checkpoint.script not in (None, script):
        raise ValueError(f"{path} was written by {checkpoint.script}.py, and this is {script}.py. Resume it with that.")
    arguments = path / ARGUMENTS_NAME if checkpoint.has_record else path.parent / ARGUMENTS_NAME
    if arguments.is_file():
        try:
            checkpoint.settings = given_arguments(argument_types, ["--config", str(arguments)])
        except ValueError as error:
            raise ValueError(f"The record of the run cannot be read: {error}") from error
    return checkpoint


def parse_run(
    argument_types: Sequence[type], argv: Sequence[str] | None, script: str, description: str | None = None
) -> tuple[tuple[Any, ...], RunRecord]:
    """
    The arguments of a run, as `parse_args` gives them. If `resume_from_checkpoint` names a checkpoint, those that were
    left out are those of the checkpoint, and those that were given are compared with them.

    Args:
        argument_types (sequence of dataclasses): As for `parse_args`.
        argv (sequence of `str`, *optional*): As for `parse_args`.
        script (`str`): The name of the script.
        description (`str`, *optional*): Shown by `--help`.

    Returns:
        `tuple`: One instance of each dataclass; and the record of the run.

    Raises:
        ValueError: As `parse_args`; if there is no such checkpoint, or the run cannot be resumed with these arguments.
    """
    given = given_arguments(argument_types, argv, description)
    defaults = _defaults(argument_types)
    name = given.get("resume_from_checkpoint")
    output_dir = given.get("output_dir", defaults["output_dir"])
    path = find_checkpoint(output_dir, name) if name is not None else None
    if path is None:
        if name is not None and all(given.get(source) is None for source in ALTERNATIVES[0]):
            raise ValueError(
                f"There is no checkpoint in {output_dir} to resume from. Check `--output_dir`, or pass the arguments "
                "of a new run."
            )
        return build_arguments(argument_types, given), RunRecord(script)
    checkpoint = read_checkpoint(path, argument_types, script)
    if name != "latest" and "output_dir" not in given and os.path.isdir(name):
        given["output_dir"] = str(path.parent)  # also where the run was moved
    run = RunRecord(script, checkpoint, bool(given.get("force_resume")))
    given = {name: value for name, value in given.items() if not (name in INHERITED and value is None)}
    before = defaults | (checkpoint.settings or {})
    values = {name: value for name, value in before.items() if name not in OF_ONE_START}
    if not _is_same(str(path.parent), given.get("output_dir", defaults["output_dir"])):
        values |= {name: defaults[name] for name in OF_ONE_FOLDER}
    for group in ALTERNATIVES:
        if any(given.get(name) is not None for name in group):
            values |= {name: None for name in group if name in values}
    # What belongs to a value that another one replaces.
    if given.get("pretrained_model_name_or_path") not in (None, before["pretrained_model_name_or_path"]):
        values["revision"] = None
    if given.get("ddpm_beta_schedule") in COSINE_SCHEDULES:
        values |= {"beta_start": None, "beta_end": None}
    if "num_train_epochs" in given:
        values["max_train_steps"] = None
    if given.get("push_to_hub") is False:
        values |= {name: defaults[name] for name in OF_ONE_FOLDER}
    values |= given
    if checkpoint.settings is not None:
        left_out = [name for name in values if name not in given and values[name] != defaults[name]]
        run.compare_arguments(before, values, left_out)
    all_args = build_arguments(argument_types, values)
    if values["max_train_steps"] is not None:
        run.check_steps(values["max_train_steps"])
    return all_args, run


def _defaults(argument_types: Sequence[type]) -> dict[str, Any]:
    return {f.name: f.default for argument_type in argument_types for f in dataclasses.fields(argument_type)}


class RunRecord:
    """
    What a run is made of: its arguments, and what they led to. Each checkpoint has it. In a run that is resumed, every
    `check_...` compares with that of the checkpoint and records; in a new one it records.

    Args:
        script (`str`): The name of the script.
        checkpoint (`Checkpoint`, *optional*): What is resumed; None for a new run.
        force (`bool`): Log what would make it another training, instead of refusing it.
    """

    def __init__(self, script: str, checkpoint: Checkpoint | None = None, force: bool = False):
        self.script = script
        self.checkpoint = checkpoint
        self.force = force
        self.settings: Mapping[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.left_out: dict[str, Any] = {}
        self.applied: dict[str, tuple[Any, Any]] = {}
        self.forced: list[str] = []
        self.forced_arguments: set[str] = set()
        self.progress: TrainingProgress | None = None
        self.ema: EMAModel | None = None

    # Before anything is read

    def compare_arguments(self, before: Mapping[str, Any], values: Mapping[str, Any], left_out: Sequence[str]) -> None:
        """
        Compares the arguments with those of the checkpoint, as `VERDICTS` says.

        Args:
            before (mapping): The arguments of the checkpoint.
            values (mapping): Those of this run.
            left_out (sequence of `str`): Which of them were left out, so that they are those of the checkpoint.

        Raises:
            ValueError: If some differ that must not.
        """
        checkpoint = self.checkpoint
        changed: dict[str, list[str]] = {verdict: [] for verdict in (FREE, APPLIED, PROCESS, NEVER, SOURCE)}
        for name, value in values.items():
            if name in COMPARED_LATER or _is_same(value, before[name]):
                continue
            if not _is_same(self._explicit(name, value, values), self._explicit(name, before[name], before)):
                changed[VERDICTS[name]].append(name)
        if not checkpoint.has_record:  # what its sources held is not known
            changed[PROCESS] += changed[SOURCE]
        told = {
            name: f"`{name}` is {values[name]!r}, and was {before[name]!r}"
            for names in changed.values()
            for name in names
        }
        if changed[NEVER]:
            raise ValueError(
                f"{'; '.join(told[name] for name in changed[NEVER])} for {checkpoint.name}, which cannot be loaded "
                f"otherwise. Leave it out (or pass `{' '.join(_flag(name, before[name]) for name in changed[NEVER])}`) "
                "to resume, or start a new run in another `--output_dir`."
            )
        self.refuse(
            [told[name] for name in changed[PROCESS]],
            f"Leave it out (or pass `{' '.join(_flag(name, before[name]) for name in changed[PROCESS])}`) to continue "
            "as before",
        )
        self.forced_arguments |= set(changed[PROCESS])
        self.applied = {name: (before[name], values[name]) for name in changed[APPLIED]}
        self.left_out = {name: values[name] for name in left_out}

    def _explicit(self, name: str, value: Any, values: Mapping[str, Any]) -> Any:
        """What None stands for, as far as that is known here."""
        facts = self.checkpoint.facts
        if name == "lora_alpha" and value is None:
            return values["lora_rank"]
        if name == "resolution" and value is None:
            return facts.get("resolution")
        if name == "min_image_size" and value is None and "resolution" in facts:
            return facts["resolution"] if "low_res_size" in values else max(1, facts["resolution"] // 2)
        return value

    def check_steps(self, max_train_steps: int) -> None:
        """
        A checkpoint of the last step is accepted: the run may have been interrupted before its result was saved, and
        whoever restarts it by the same command gets the result.

        Raises:
            ValueError: If the checkpoint has been trained for more steps than the run is to have.
        """
        step = self.checkpoint.step if self.checkpoint is not None else None
        if step is not None and max_train_steps < step:
            raise ValueError(
                f"The run is to end at step {max_train_steps} (`max_train_steps`, or `num_train_epochs`), but "
                f"{self.checkpoint.name} has been trained for {step} steps already. Pass a larger number to train on."
                + (f" Its result can be loaded from {self.checkpoint.path}." if self.checkpoint.has_record else "")
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """
        Logs what is resumed, and how it differs.

        Args:
            settings (mapping): The arguments of the run, as they are recorded.
        """
        # `train_args.yaml` may be the next recipe, which must not force what differs then.
        self.settings, checkpoint = {**settings, "force_resume": False}, self.checkpoint
        if checkpoint is None:
            return
        if checkpoint.settings is None:
            logger.warning(
                f"{checkpoint.path} holds no record of its arguments, and neither does the folder of its run: the "
                "arguments of this run are not compared with them, and those left out have their default values."
            )
        elif not checkpoint.has_record:
            logger.warning(
                f"{checkpoint.path} was written by an earlier version, without a record of its arguments. They are "
                f"taken from {checkpoint.path.parent / ARGUMENTS_NAME}; the classes, the number of images and what a "
                "pretrained model held cannot be compared."
            )
        left_out = ", ".join(f"{name} {value}" for name, value in self.left_out.items())
        logger.info(
            f"Resuming {checkpoint.name}." + (f" Not given, so taken from the run: {left_out}" if left_out else "")
        )
        for name, (before, now) in self.applied.items():
            logger.info(f"From here on, `{name}` is {now} (before: {before}).")
        for difference in self.forced:
            self._warn(difference)

    # Whatever is compared

    def refuse(self, differences: Sequence[str], way_out: str) -> None:
        """
        Refuses what would make it another training.

        Raises:
            ValueError: If there are differences, and they are not forced. Otherwise they are logged.
        """
        if not differences:
            return
        if not self.force:
            raise ValueError(
                f"{'; '.join(differences)} for {self.checkpoint.name}. This would be another training than the "
                f"one that was begun. {way_out}, or pass `--force_resume` to continue with the new value."
            )
        self.forced += differences
        if self.settings:  # `begin` logs those from before it
            for difference in differences:
                self._warn(difference)

    def _warn(self, difference: str) -> None:
        logger.warning(f"--force_resume: {difference} for {self.checkpoint.name}.")

    def _before(self, fact: str, now: Any) -> tuple[bool, Any]:
        """Records a fact. Whether the checkpoint has it, too, and what it says."""
        self.facts[fact] = json.loads(json.dumps(now, default=str))
        facts = self.checkpoint.facts if self.checkpoint is not None else {}
        return fact in facts, facts.get(fact)

    # Once it is known

    def check_noise(self, noise_scheduler: LearnedVarianceDDPMScheduler | None) -> None:
        """
        Compares the schedules themselves: one may have several names, and a pretrained scheduler may have changed.

        Raises:
            ValueError: If the noise or what is predicted is not that of the checkpoint.
        """
        config = None if noise_scheduler is None else _public(noise_scheduler.config)
        known, before = self._before("noise_schedule", config)
        if not known and self.checkpoint is not None and self.checkpoint.settings is not None:
            known, before = self._noise_by_arguments(noise_scheduler)
        if not known or noise_scheduler is None or before is None:  # a change of `noised` has been reported
            return
        changed = [name for name in ("prediction_type", "variance_type") if before[name] != config[name]]
        schedulers = (LearnedVarianceDDPMScheduler.from_config(before), noise_scheduler)
        if not is_same_noise(*(alphas_cumprod_of(noise_schedule_of(scheduler)) for scheduler in schedulers)):
            of_noise = [name for name in NOISE_ARGUMENTS if not name.endswith("_type")]
            differing = [name for name in of_noise if before[NOISE_ARGUMENTS[name]] != config[NOISE_ARGUMENTS[name]]]
            changed += differing or ["ddpm_beta_schedule"]
        # Classifiers have no arguments for what a U-Net predicts.
        told = {
            name: (before[NOISE_ARGUMENTS[name]], config[NOISE_ARGUMENTS[name]])
            for name in changed
            if name in self.settings
        }
        if self.settings["pretrained_model_name_or_path"] is None:
            way_out = f"Leave it out (or pass `{' '.join(_flag(name, old) for name, (old, _) in told.items())}`)"
        else:
            way_out = "Leave it out, and restore the scheduler of the pretrained model if that has changed,"
        self.refuse(
            [f"`{name}` is {now!r}, and was {old!r}" for name, (old, now) in told.items()],
            f"{way_out} to continue as before",
        )
        self.forced_arguments |= set(told)

    def _noise_by_arguments(self, noise_scheduler: LearnedVarianceDDPMScheduler | None) -> tuple[bool, Any]:
        """Of a checkpoint of an earlier version. What the pretrained model decided is taken to be as it is now."""
        settings = self.checkpoint.settings
        if noise_scheduler is None or not settings.get("noised", True):
            return True, None
        config: dict[str, Any] = {}
        if settings.get("pretrained_model_name_or_path") is not None:
            given = [key for name, key in NOISE_ARGUMENTS.items() if self.settings.get(name) is not None]
            config = {key: value for key, value in _public(noise_scheduler.config).items() if key not in given}
        for name, key in NOISE_ARGUMENTS.items():
            if settings.get(name) is not None:
                config[key] = settings[name]
        return True, _public(LearnedVarianceDDPMScheduler.from_config(config).config)

    def check_classes(self, id2label: Mapping[int, str] | None) -> None:
        """
        Compares the classes of the data.

        Raises:
            ValueError: If the data does not have the classes of the checkpoint.
        """
        known, before = self._before("classes", None if id2label is None else list(id2label.values()))
        now = self.facts["classes"]
        if not known or before == now:
            return
        before, now = before or [], now or []
        if len(before) != len(now):
            added, removed = ([name for name in a if name not in b] for a, b in ((now, before), (before, now)))
            raise ValueError(
                f"The data has {len(now)} classes, and had {len(before)} for {self.checkpoint.name}"
                + (f"; added: {', '.join(map(repr, added))}" if added else "")
                + (f"; removed: {', '.join(map(repr, removed))}" if removed else "")
                + ". The network has one place for each, so the checkpoint cannot be resumed with others. Give the "
                "data the former ones, or begin a new run."
            )
        renamed = [(number, *pair) for number, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1]]
        self.refuse(
            [f"class {number} of the data is {new!r}, and was {old!r}" for number, old, new in renamed],
            "Give the data the former classes to continue as before",
        )

    def check_rows(self, id2label: Mapping[int, str] | None) -> None:
        """
        Compares the names of the network's classes.

        Args:
            id2label (mapping, *optional*): Row of the network -> name of a class, after the classes of the data have
                been matched with those of a pretrained model.

        Raises:
            ValueError: If a class would go on in the row of another one, since the pretrained model names others now.
        """
        known, before = self._before("rows", id2label)
        now = self.facts["rows"]
        if not known or before == now or self.facts["classes"] != self.checkpoint.facts["classes"]:  # has been reported
            return
        before, now = before or {}, now or {}
        differing = [row for row in {**before, **now} if before.get(row) != now.get(row)]
        self.refuse(
            [f"class {row} of the network is {now.get(row)!r}, and was {before.get(row)!r}" for row in differing],
            "Restore the names of the classes of the pretrained model to continue as before",
        )

    def check_data(self, num_images: int) -> None:
        """
        Compares the number of images.

        Raises:
            ValueError: If there is another number of images: which ones the current epoch has shown would be others.
        """
        known, before = self._before("num_images", num_images)
        if known and before != num_images:
            self.refuse(
                [f"the data has {num_images} usable images, and had {before}"],
                "Give the run the former images to continue as before",
            )

    def check_network(
        self, config: Mapping[str, Any], resolution: int, frozen: Mapping[str, Any] | None = None
    ) -> None:
        """
        Compares the config of the network, the resolution, and what is frozen.

        Args:
            config (mapping): Of the network that is trained.
            resolution (`int`): In pixels.
            frozen (mapping, *optional*): Networks and tokenizers that stay as they are, by the names that
                errors call them; None is passed over.

        Raises:
            ValueError: If one of them is not that of the checkpoint.
        """
        known, before = self._before("resolution", resolution)
        if known and before != resolution:
            self.refuse(
                [f"`resolution` is {resolution}, and was {before}"],
                f"Pass `--resolution {before}` to continue as before",
            )
        known, before = self._before("network", {k: v for k, v in _public(config).items() if k != "sample_size"})
        if known:
            now = self.facts["network"]
            keys = [key for key in now if key in before and before[key] != now[key]]  # others: of another version
            self.refuse(
                [
                    f"`{key}` in the config of the network is {now.get(key)!r}, and was {before.get(key)!r}"
                    for key in keys
                ],
                "Resume with the former config or pretrained model to continue as before",
            )
        parts = {name: part for name, part in (frozen or {}).items() if part is not None}
        known, before = self._before("frozen", {name: _hash(part) for name, part in parts.items()})
        if known:
            now = self.facts["frozen"]
            differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            self.refuse(
                [f"the frozen {name} is {now.get(name)} (a hash), and was {before.get(name)}" for name in differing],
                "Resume with the former pretrained model to continue as before",
            )

    # Loading, and what is written

    def resume(
        self,
        accelerator: Accelerator,
        training_args: TrainingArguments,
        max_train_steps: int,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        progress: TrainingProgress,
        ema: EMAModel | None,
        parameters: Sequence[torch.nn.Parameter],
        networks: Mapping[str, torch.nn.Module],
        timestep_sampler: Any = None,
    ) -> None:
        """
        Loads the checkpoint, if there is one, applies what has changed, and writes the arguments of the run to its
        folder. Collective.

        Args:
            max_train_steps (`int`): Optimizer steps of the whole run.
            parameters, networks: What `ema` averages, and where results hold it; see `load_average`.
            timestep_sampler (`TimestepSampler`, *optional*): As registered with `accelerator`. Of another kind or
                another number of timesteps, forced by the user, it starts anew.

        Raises:
            ValueError: If the checkpoint does not belong to this run.
        """
        self.check_steps(max_train_steps)
        self.progress, self.ema = progress, ema
        is_other_sampler = self.forced_arguments & {"timestep_sampler", "ddpm_num_steps"}
        loaded = resume_checkpoint(
            accelerator,
            training_args.output_dir,
            training_args.resume_from_checkpoint,
            ema,
            functools.partial(self._load_average, ema, parameters, networks),
            not_restored=[timestep_sampler] if is_other_sampler else [],
        )
        if loaded is not None:
            apply_arguments(training_args, optimizer, lr_scheduler, ema)
            self.checkpoint.step = progress.global_step
            self.check_steps(max_train_steps)
            if progress.global_step == max_train_steps:
                logger.info(f"{self.checkpoint.name} is that of the last step: what is left is to save the result.")
        if accelerator.is_main_process:
            os.makedirs(training_args.output_dir, exist_ok=True)
            write_settings(training_args.output_dir, self.settings)

    def _load_average(
        self,
        ema: EMAModel | None,
        parameters: Sequence[torch.nn.Parameter],
        networks: Mapping[str, torch.nn.Module],
        folder: str,
    ) -> bool:
        if ema is None or self.checkpoint is None or self.checkpoint.ema is None:
            return False
        load_average(ema, parameters, networks, folder)
        ema.load_state_dict(self.checkpoint.ema)
        return True

    def write(self, folder: str) -> None:
        """Writes the record of a checkpoint."""
        average = None
        if self.ema is not None:
            average = {name: value for name, value in self.ema.state_dict().items() if name != "shadow_params"}
        record = {
            "version": RECORD_VERSION,
            "script": self.script,
            "global_step": self.progress.global_step,
            "ema": average,
            "facts": self.facts,
        }
        text = json.dumps(record, indent=2, ensure_ascii=False)
        Path(folder, RECORD_NAME).write_text(text + "\n", encoding="utf-8")
        write_settings(folder, self.settings)


def apply_arguments(
    training_args: TrainingArguments,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema: EMAModel | None,
) -> None:
    """
    Gives optimizer, learning rate and average the values of `training_args`, in place of those that a checkpoint has
    brought back. Moments and averages stay.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = training_args.learning_rate
        group["betas"] = (training_args.adam_beta1, training_args.adam_beta2)
        group["weight_decay"] = training_args.adam_weight_decay
        group["eps"] = training_args.adam_epsilon
    lr_scheduler.base_lrs = [training_args.learning_rate] * len(optimizer.param_groups)
    # The shape of the curve is a function, which no checkpoint holds: it is that of this run already.
    factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]  # type: ignore[attr-defined]
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] = training_args.learning_rate * factor
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if ema is not None:
        ema.decay = training_args.ema_max_decay
        ema.inv_gamma, ema.power = training_args.ema_inv_gamma, training_args.ema_power


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what says how it was loaded and saved."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _hash(part: Any) -> str:
    return hash_tensors(part.state_dict()) if isinstance(part, torch.nn.Module) else hash_tokenizer(part)
