"""
Resuming a run: the record in each checkpoint, and the comparison of arguments and data with it.

A checkpoint records the arguments of its run (`train_args.yaml`) and what they led to (`run_record.json`: the noise
schedule, the classes, the number of images and their captions, the number of processes, the config of the network). A
resumed run takes the arguments that were
left out from there. Those that were given are used, or refused by name, as their [`Verdict`] says.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel

from ..commands.arguments import build_arguments, given_arguments
from ..commands.recipes import is_of_installation
from ..conditioning.image_format import ImageFormat, Size, as_sample_size, as_size, parse_size
from ..data.fingerprints import hash_plain, hash_tensors, hash_texts, hash_tokenizer
from ..schedulers.noise_schedules import alphas_cumprod_of, is_same_noise, noise_schedule_of
from ..schedulers.scheduling_ddpm_learned_variance import LearnedVarianceDDPMScheduler
from .arguments import (
    APPLIED,
    NEVER,
    NOISE_ARGUMENTS,
    PROCESS,
    SOURCE,
    TrainingArguments,
    Verdict,
    resume_verdicts,
    size_argument,
)
from .checkpoints import CHECKPOINT_NAME, REPLACED_PREFIX, count_writers, find_checkpoint
from .effects import COSINE_SCHEDULES
from .ema import load_average
from .setup import ARGUMENTS_NAME, write_settings


logger = get_logger(__name__)

RECORD_NAME = "run_record.json"
RECORD_VERSION = 1


# 1. What may change


# Arguments of one start of a run, which are not taken from an earlier one.
OF_ONE_START = ("resume_from_checkpoint", "force_resume", "overwrite_output_dir", "dry_run")
# Arguments for the folder of the run, which a run that branches off to another folder does not take over.
OF_ONE_FOLDER = ("push_to_hub", "hub_model_id", "hub_private_repo")
# Groups of which one argument is given.
ALTERNATIVES = (
    ("pretrained_model_name_or_path", "model_config_name_or_path"),
    ("text_encoder_name_or_path", "text_encoder_config_name_or_path"),
    ("dataset_name", "train_data_dir", "data_files"),
    ("condition", "conditioning_image_column"),
    ("source", "source_column", "source_data_dir", "source_data_files"),
)
# Formats that a run records: the arguments for entries of each, and the images in words.
FORMAT_ARGUMENTS = {
    "image_format": ({"mode": "image_mode", "value_range": "value_range"}, "images"),
    "source_format": ({"mode": "source_mode", "value_range": "source_value_range"}, "source images"),
    "condition_format": ({"value_range": "condition_value_range"}, "conditioning images"),
}
# None stands for the value of the pretrained model, which the run has recorded.
INHERITED = ("low_res_size", "max_noise_level")
# Compared by their effect, once that is known: the noise schedule, the layers with an adapter.
COMPARED_LATER = (*NOISE_ARGUMENTS, "lora_target_modules")
# Scripts whose loss compares the examples of a batch with each other, over all processes.
CONTRASTIVE = ("train_clip",)


def _is_same(first: Any, second: Any) -> bool:
    if first == second:
        return True
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_is_same, first, second))
    paths = isinstance(first, str) and isinstance(second, str) and os.path.exists(first) and os.path.exists(second)
    return paths and os.path.samefile(first, second)


def _flags(values: Mapping[str, Any]) -> str:
    """Arguments as on the command line."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return " ".join(str(word).lower() if word in (None, True, False) else str(word) for word in words)


def _change(name: str, now: Any, before: Any) -> str:
    return f"{name} is {now!r}, and was {before!r}"


def _changes(name: str, before: Mapping[Any, Any], now: Mapping[Any, Any]) -> list[str]:
    """Differences of two mappings in words; `name` holds a place for the key."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [_change(name.format(key), now.get(key), before.get(key)) for key in keys]


# 2. Checkpoints and their records


@dataclass
class Checkpoint:
    """The record of a checkpoint."""

    path: Path
    script: str | None = None  # that wrote it
    settings: dict[str, Any] | None = None  # its arguments, if they are known
    facts: dict[str, Any] = field(default_factory=dict)  # what they led to; empty in an earlier version
    step: int | None = None  # optimizer steps taken
    ema: dict[str, Any] | None = None  # state of the average, without the weights

    @property
    def name(self) -> str:
        return self.path.name.removeprefix(REPLACED_PREFIX)

    @property
    def has_record(self) -> bool:
        return bool(self.facts)


@dataclass(frozen=True)
class StepSplit:
    """How a run splits the images of an optimizer step."""

    num_processes: int
    train_batch_size: int
    gradient_accumulation_steps: int

    @classmethod
    def of(cls, num_processes: int, settings: Mapping[str, Any]) -> StepSplit:
        """That of a number of processes with these arguments."""
        return cls(num_processes, settings["train_batch_size"], settings["gradient_accumulation_steps"])

    @property
    def batch(self) -> int:
        """Images of one batch of each process."""
        return self.num_processes * self.train_batch_size

    def has_same_steps(self, other: StepSplit, script: str) -> bool:
        """Whether the steps of both have the same loss, up to the noise and the order of sums."""
        if script in CONTRASTIVE:
            return (self.batch, self.gradient_accumulation_steps) == (other.batch, other.gradient_accumulation_steps)
        return self.batch * self.gradient_accumulation_steps == other.batch * other.gradient_accumulation_steps


def read_checkpoint(path: Path, argument_types: Sequence[type], script: str) -> Checkpoint:
    """Reads the record of a checkpoint; for one of an earlier version, the arguments in the folder of its run."""
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
    Parses the arguments of a run as `parse_args` does. If `resume_from_checkpoint` names a checkpoint, arguments that
    were left out are taken from it, and given ones are compared with it.

    Args:
        argument_types (sequence of dataclasses), argv (sequence of `str`, *optional*): As for `parse_args`.
        script (`str`): Name of the script.
        description (`str`, *optional*): Shown by `--help`.

    Returns:
        `tuple`: One instance of each dataclass; and the record of the run.

    Raises:
        ValueError: As `parse_args`; if there is no such checkpoint, or the run cannot be resumed with these arguments.
    """
    given = given_arguments(argument_types, argv, description)
    defaults: dict[str, Any] = {
        f.name: f.default for argument_type in argument_types for f in dataclasses.fields(argument_type)
    }
    name = given.get("resume_from_checkpoint")
    output_dir = given.get("output_dir", defaults["output_dir"])
    path = find_checkpoint(output_dir, name) if name is not None else None
    if path is None:
        if name is not None and all(given.get(source) is None for source in ALTERNATIVES[0]):
            raise ValueError(
                f"There is no checkpoint in {output_dir}. Check `--output_dir`, or pass the arguments of a new run."
            )
        return build_arguments(argument_types, given), RunRecord(script)
    checkpoint = read_checkpoint(path, argument_types, script)
    if name != "latest" and "output_dir" not in given and os.path.isdir(name):
        given["output_dir"] = str(path.parent)  # also if the run was moved
    run = RunRecord(script, checkpoint, bool(given.get("force_resume")))
    given = {name: value for name, value in given.items() if not (name in INHERITED and value is None)}
    before = defaults | (checkpoint.settings or {})
    values = {name: value for name, value in before.items() if name not in OF_ONE_START}
    if not _is_same(str(path.parent), given.get("output_dir", defaults["output_dir"])):
        values |= {name: defaults[name] for name in OF_ONE_FOLDER}
    for group in ALTERNATIVES:
        if any(given.get(name) is not None for name in group):
            values |= {name: None for name in group if name in values}
    # Arguments that belong to a replaced value.
    if given.get("pretrained_model_name_or_path") not in (None, before["pretrained_model_name_or_path"]):
        values["revision"] = None
    if given.get("ddpm_beta_schedule") in COSINE_SCHEDULES:
        values |= {"beta_start": None, "beta_end": None}
    if "num_train_epochs" in given:
        values["max_train_steps"] = None
    if given.get("push_to_hub") is False:
        values |= {name: defaults[name] for name in OF_ONE_FOLDER}
    values |= given
    for name, value in values.items():
        if name not in given and is_of_installation(value) and not os.path.exists(value):
            raise ValueError(
                f"`{name}` of {checkpoint.name} is {value!r}, which was installed with diffusers-adm in an environment "
                "that is gone, and the installed version has no such file. Install the version that the run was "
                f"started with, or pass `--{name}` with the path of a copy of the file."
            )
    if checkpoint.settings is not None:
        left_out = [name for name in values if name not in given and values[name] != defaults[name]]
        run.compare_arguments(before, values, left_out, resume_verdicts(argument_types))
    all_args = build_arguments(argument_types, values)
    if values["max_train_steps"] is not None:
        run.check_steps(values["max_train_steps"])
    return all_args, run


class RunRecord:
    """
    The record of a run, saved in each checkpoint: its arguments, and what they led to. Each `check_...` records a fact,
    and in a resumed run compares it with that of the checkpoint. Differences that change the training process raise a
    `ValueError`, or are logged with `force`.
    """

    def __init__(self, script: str, checkpoint: Checkpoint | None = None, force: bool = False):
        self.script, self.checkpoint, self.force = script, checkpoint, force
        self.started = time.monotonic()
        self.settings: Mapping[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.left_out: dict[str, Any] = {}
        self.applied: dict[str, tuple[Any, Any]] = {}
        self.forced: list[str] = []
        self.forced_arguments: set[str] = set()

    # Before anything is read

    def compare_arguments(
        self,
        before: Mapping[str, Any],
        values: Mapping[str, Any],
        left_out: Sequence[str],
        verdicts: Mapping[str, Verdict],
    ) -> None:
        """
        Compares the arguments of the checkpoint (`before`) with those of this run (`values`), of which `left_out` were
        taken from the checkpoint.
        """
        checkpoint = self.checkpoint
        changed: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
        for name, value in values.items():
            if name in COMPARED_LATER or _is_same(value, before[name]):
                continue
            if not _is_same(self._explicit(name, value, values), self._explicit(name, before[name], before)):
                changed[verdicts[name]].append(name)
        if self._has_same_steps(before, values):
            for name in ("train_batch_size", "gradient_accumulation_steps"):
                if name in changed[PROCESS]:
                    changed[PROCESS].remove(name)
                    changed[APPLIED].append(name)
        if not checkpoint.has_record:  # the content of its sources is unknown
            changed[PROCESS] += changed[SOURCE]
        old = {verdict: _flags({name: before[name] for name in names}) for verdict, names in changed.items()}
        changes = {v: [_change(f"`{n}`", values[n], before[n]) for n in names] for v, names in changed.items()}
        if changed[NEVER]:
            raise ValueError(
                f"{'; '.join(changes[NEVER])} for {checkpoint.name}, which cannot be loaded otherwise. Leave it out "
                f"(or pass `{old[NEVER]}`) to resume, or start a new run in another `--output_dir`."
            )
        self.refuse(changes[PROCESS], f"Leave it out (or pass `{old[PROCESS]}`)")
        self.forced_arguments |= set(changed[PROCESS])
        self.applied = {name: (before[name], values[name]) for name in changed[APPLIED]}
        self.left_out = {name: values[name] for name in left_out}

    def _has_same_steps(self, before: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
        """
        Whether another number of processes takes the same number of images per step. The launcher's variable tells the
        number before the processes join; `check_processes` compares it again.
        """
        now = StepSplit.of(int(os.environ.get("WORLD_SIZE", 1)), values)
        former = self._former_split(before)
        return now.num_processes != former.num_processes and now.has_same_steps(former, self.script)

    def _former_split(self, before: Mapping[str, Any]) -> StepSplit:
        """How the checkpoint's run split its steps; for one of an earlier version, by its files and arguments."""
        saved = self.checkpoint.facts.get("step_split")
        return StepSplit.of(count_writers(self.checkpoint.path), before) if saved is None else StepSplit(**saved)

    def _explicit(self, name: str, value: Any, values: Mapping[str, Any]) -> Any:
        """The value that None stands for, if it is known here."""
        facts = self.checkpoint.facts
        if name == "lora_alpha" and value is None:
            return values["lora_rank"]
        if name == "resolution":
            return facts.get("resolution") if value is None else as_sample_size(parse_size(name, value))
        if name == "image_mode" and value is None and "image_format" in facts:
            return facts["image_format"]["mode"]
        if name == "value_range" and value in (None, ["auto"]) and "image_format" in facts:
            return facts["image_format"]["value_range"]
        if name == "min_image_size" and value is None and "resolution" in facts:
            sides = as_size(facts["resolution"])
            return as_sample_size(sides if "low_res_size" in values else [max(1, side // 2) for side in sides])
        return value

    def check_steps(self, max_train_steps: int) -> None:
        """
        Raises a `ValueError` for a checkpoint of more steps than the run. One of the last step is accepted: a run that
        was interrupted before its result was saved can then save it.
        """
        step = self.checkpoint.step if self.checkpoint is not None else None
        if step is not None and max_train_steps < step:
            raise ValueError(
                f"The run ends at step {max_train_steps} (`max_train_steps`, or `num_train_epochs`), but "
                f"{self.checkpoint.name} has been trained for {step} steps already. Pass a larger number."
                + (f" Its result can be loaded from {self.checkpoint.path}." if self.checkpoint.has_record else "")
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Takes the arguments of the run, to be recorded, and logs the resumed checkpoint and what has changed."""
        # `train_args.yaml` may be the next recipe, which must not force later differences.
        self.settings, checkpoint = {**settings, "force_resume": False}, self.checkpoint
        if checkpoint is None:
            return
        if checkpoint.settings is None:
            logger.warning(
                f"{checkpoint.path} holds no record of its arguments, and neither does the folder of its run: nothing "
                "can be compared, and arguments left out have their default values."
            )
        elif not checkpoint.has_record:
            logger.warning(
                f"{checkpoint.path} was written by an earlier version, without a record of its arguments. They are "
                f"taken from {checkpoint.path.parent / ARGUMENTS_NAME}; the classes, the number of images and the "
                "weights of a pretrained model cannot be compared."
            )
        left_out = ", ".join(f"{name} {value}" for name, value in self.left_out.items())
        logger.info(
            f"Resuming {checkpoint.name}." + (f" Not given, so taken from the run: {left_out}" if left_out else "")
        )
        for name, (before, now) in self.applied.items():
            logger.info(f"From here on, `{name}` is {now} (before: {before}).")
        self._warn(self.forced)

    # Comparing

    def refuse(self, differences: Sequence[str], way_out: str) -> None:
        """Refuses differences, or logs them if they are forced. `way_out` says what to do to continue as before."""
        if differences and not self.force:
            raise ValueError(
                f"{'; '.join(differences)} for {self.checkpoint.name}. This would change the training process. "
                f"{way_out} to continue as before, or pass `--force_resume` to continue with the new value."
            )
        if self.settings:
            self._warn(differences)
        else:
            self.forced += differences  # `begin` logs them

    def _warn(self, differences: Sequence[str]) -> None:
        for difference in differences:
            logger.warning(f"--force_resume: {difference} for {self.checkpoint.name}.")

    # Facts

    def _before(self, fact: str, now: Any) -> tuple[bool, Any, Any]:
        """Records a fact. Returns whether the checkpoint has it, its value there, and its value now."""
        self.facts[fact] = json.loads(json.dumps(now, default=str))
        facts = self.checkpoint.facts if self.checkpoint is not None else {}
        return fact in facts, facts.get(fact), self.facts[fact]

    def check_noise(self, noise_scheduler: LearnedVarianceDDPMScheduler | None) -> None:
        """
        Compares noise schedule and prediction type, not their arguments: one schedule may have several names, and a
        pretrained scheduler may have changed.
        """
        config = None if noise_scheduler is None else _public(noise_scheduler.config)
        known, before, _ = self._before("noise_schedule", config)
        if not known and self.checkpoint is not None and self.checkpoint.settings is not None:
            known, before = True, self._noise_by_arguments(noise_scheduler)
        if not known or noise_scheduler is None or before is None:  # a change of `noised` has been reported
            return
        schedulers = (LearnedVarianceDDPMScheduler.from_config(before), noise_scheduler)
        is_same = is_same_noise(*(alphas_cumprod_of(noise_schedule_of(scheduler)) for scheduler in schedulers))
        # Classifiers have no arguments for the prediction type.
        arguments = {name: key for name, key in NOISE_ARGUMENTS.items() if name in self.settings}
        changed = [name for name, key in arguments.items() if before[key] != config[key]]
        if is_same:
            changed = [name for name in changed if name.endswith("_type")]
        elif all(name.endswith("_type") for name in changed):
            changed.append("ddpm_beta_schedule")
        old, new = ({name: values[NOISE_ARGUMENTS[name]] for name in changed} for values in (before, config))
        if self.settings["pretrained_model_name_or_path"] is None:
            way_out = f"Leave it out (or pass `{_flags(old)}`)"
        else:
            way_out = "Leave it out, and restore the scheduler of the pretrained model if that has changed,"
        self.refuse([_change(f"`{name}`", new[name], old[name]) for name in changed], way_out)
        self.forced_arguments |= set(changed)

    def _noise_by_arguments(self, noise_scheduler: LearnedVarianceDDPMScheduler | None) -> dict[str, Any] | None:
        """The noise schedule of a checkpoint without a record; the pretrained scheduler is taken to be unchanged."""
        settings = self.checkpoint.settings
        if noise_scheduler is None or not settings.get("noised", True):
            return None
        config: dict[str, Any] = {}
        if settings.get("pretrained_model_name_or_path") is not None:
            given = [key for name, key in NOISE_ARGUMENTS.items() if self.settings.get(name) is not None]
            config = {key: value for key, value in _public(noise_scheduler.config).items() if key not in given}
        config |= {key: settings[name] for name, key in NOISE_ARGUMENTS.items() if settings.get(name) is not None}
        return _public(LearnedVarianceDDPMScheduler.from_config(config).config)

    def check_format(self, image_format: ImageFormat, fact: str = "image_format") -> None:
        """
        Compares the format of the images, or of other ones under the name of their `fact`, one of `FORMAT_ARGUMENTS`.
        Checkpoints without one are of 8-bit RGB images.
        """
        known, before, now = self._before(fact, image_format.to_config())
        if not known and self.checkpoint is not None and fact == "image_format":
            known, before = self.checkpoint.settings is not None, ImageFormat().to_config()
        if known and before != now:
            names, what = FORMAT_ARGUMENTS[fact]
            changes = [
                _change(f"`{names.get(key, key)}` of the {what}", now[key], before[key])
                for key in now
                if now[key] != before[key]
            ]
            flags = _flags({name: before[key] for key, name in names.items()})
            self.refuse(changes, f"Give the run the former {what}, or pass `{flags}`,")

    def check_classes(self, id2label: Mapping[int, str] | None) -> None:
        """Compares the classes of the data. Another number of them is refused even by force."""
        known, before, now = self._before("classes", None if id2label is None else list(id2label.values()))
        if not known:
            return
        before, now = before or [], now or []
        if len(before) != len(now):
            added, removed = ([name for name in a if name not in b] for a, b in ((now, before), (before, now)))
            raise ValueError(
                f"The data has {len(now)} classes, and had {len(before)} for {self.checkpoint.name}"
                + (f"; added: {', '.join(map(repr, added))}" if added else "")
                + (f"; removed: {', '.join(map(repr, removed))}" if removed else "")
                + ". The network has one row for each, so the checkpoint cannot be resumed with others. Give the data "
                "the former ones, or start a new run."
            )
        changes = _changes("class {} of the data", dict(enumerate(before)), dict(enumerate(now)))
        self.refuse(changes, "Give the data the former classes")

    def check_rows(self, id2label: Mapping[int, str] | None) -> None:
        """
        Compares the names of the network's rows: if those of the pretrained model have changed, a class would be
        trained in the row of another one.
        """
        known, before, now = self._before("rows", id2label)
        if known and self.facts["classes"] == self.checkpoint.facts["classes"]:  # others have been reported
            changes = _changes("class {} of the network", before or {}, now or {})
            self.refuse(changes, "Restore the names of the classes of the pretrained model")

    def check_data(
        self,
        num_images: int,
        captions: Iterable[str] | Iterable[Sequence[str]] | None = None,
        stored: Any = None,
    ) -> None:
        """
        Compares the data.

        Args:
            num_images (`int`): With another number, the position in the epoch would mean other images.
            captions (iterable of `str` or of sequences of `str`, *optional*): Those of the images, in their order, of
                which the record keeps a hash. None: the images have none.
            stored (dataclass, *optional*): The record of stored latents or embeddings, `StoredLatents` or
                `StoredEmbeddings`, likewise. The name of their network is ignored, since it may change.
        """
        known, before, now = self._before("num_images", num_images)
        if known and before != now:
            self.refuse([_change("the number of usable images", now, before)], "Give the run the former images")
        names = ("vae", "clip")
        record = None if stored is None else {k: v for k, v in dataclasses.asdict(stored).items() if k not in names}
        for fact, what, value in (
            ("captions", "captions", None if captions is None else hash_texts(captions)),
            (
                "stored_data",
                "stored latents or embeddings",
                None if record is None else hash_plain(record),
            ),
        ):
            known, before, now = self._before(fact, value)
            if known and before != now:
                self.refuse([_change(f"the hash of the {what}", now, before)], f"Give the run the former {what}")

    def check_processes(self, num_processes: int, settings: Mapping[str, Any]) -> None:
        """
        Compares the number of processes. Another one goes on, if its steps have as many images as before (of a
        contrastive loss: its batches, over all processes).

        Args:
            num_processes (`int`): After the processes have joined.
            settings (mapping): The arguments of the run.
        """
        split = StepSplit.of(num_processes, settings)
        self._before("step_split", dataclasses.asdict(split))
        checkpoint = self.checkpoint
        if checkpoint is None or checkpoint.settings is None:
            return
        former = self._former_split(checkpoint.settings)
        if former.num_processes == num_processes or split.has_same_steps(former, self.script):
            return  # other arguments have been reported
        change = (
            f"the number of processes is {num_processes}, and was {former.num_processes}: a step takes "
            f"{split.batch * split.gradient_accumulation_steps} images, and took "
            f"{former.batch * former.gradient_accumulation_steps}"
        )
        batch_size, rest = divmod(former.batch, num_processes)
        other = f" or pass `--train_batch_size {batch_size}`" if not rest else ""
        self.refuse([change], f"Start {former.num_processes} processes{other}")

    def resumed_position(self, batch_in_epoch: int) -> int:
        """
        The number of batches of each process that come before the resumed position in the epoch, for the number of
        processes and the batch size of this run.

        An epoch is one order of all examples, whatever the processes are: batch i of process p of N holds the examples
        of batch `N i + p` of that order. So the next example is number `batch_in_epoch * N * train_batch_size`.

        Args:
            batch_in_epoch (`int`): The same for the run of the checkpoint.

        Raises:
            ValueError: If the next example is not the first one of a batch, and it is not forced. By force, the
                examples of the batch that it is in are repeated.
        """
        if self.checkpoint is None or self.checkpoint.settings is None or "step_split" not in self.facts:
            return batch_in_epoch
        split, former = StepSplit(**self.facts["step_split"]), self._former_split(self.checkpoint.settings)
        batches, rest = divmod(batch_in_epoch * former.batch, split.batch)
        if rest:
            change = (
                f"{split.num_processes} processes with a `train_batch_size` of {split.train_batch_size} cannot go on "
                f"after {batch_in_epoch * former.batch} images of the epoch, which {split.batch} does not divide,"
            )
            self.refuse([change], f"Choose numbers whose product divides it, such as that of before, {former.batch},")
        return batches

    def check_stream(self, source: Mapping[str, Any], num_processes: int, num_workers: int) -> int:
        """
        Compares the shards of streamed data, and the processes that share them. A position in the epoch means other
        images if one of them has changed.

        Args:
            source (mapping): See `StreamSource.facts`.
            num_processes (`int`), num_workers (`int`): Number of processes, and of workers of each.

        Returns:
            `int`: Number of lanes of each process, that of the workers when the run began. Any number of workers that
            divides it gives the same batches; others are refused.
        """
        known, before, now = self._before("stream", source)
        if known:
            changes = _changes("`{}` of the streamed data", before or {}, now)
            self.refuse(changes, "Give the run the former shards")
        known, before, _ = self._before("stream_processes", num_processes)
        if known and before != num_processes:
            change = _change("the number of processes that share the streamed data", num_processes, before)
            self.refuse([change], f"Start {before} processes")
        known, lanes, _ = self._before("stream_lanes", max(1, num_workers))
        if known and lanes % max(1, num_workers):
            divisors = [str(number) for number in range(1, lanes + 1) if lanes % number == 0]
            self.refuse(
                [_change("`dataloader_num_workers`", num_workers, lanes)],
                f"Pass 0 or one of {', '.join(divisors)}, which share the streamed data in the same way,",
            )
        elif known:
            self.facts["stream_lanes"] = lanes
        return self.facts["stream_lanes"]

    def check_network(
        self, config: Mapping[str, Any], resolution: Size | None, frozen: Mapping[str, Any] | None = None
    ) -> None:
        """
        Compares the config of the network, the resolution in pixels (None: there is none), and the frozen networks and
        tokenizers, or their hashes, by their names in messages; None is ignored.
        """
        known, before, now = self._before("resolution", None if resolution is None else as_sample_size(resolution))
        if known and before != now:
            self.refuse([_change("`resolution`", now, before)], f"Pass `--resolution {size_argument(before)}`")
        # These are compared by facts of their own.
        others = ("sample_size", *FORMAT_ARGUMENTS)
        network = {k: v for k, v in _public(config).items() if k not in others}
        known, before, now = self._before("network", network)
        if known:  # keys of one of them are of another version
            before, now = ({key: values[key] for key in now if key in before} for values in (before, now))
            changes = _changes("`{}` in the config of the network", before, now)
            self.refuse(changes, "Resume with the former config or pretrained model")
        hashes = {name: _hash(part) for name, part in (frozen or {}).items() if part is not None}
        known, before, now = self._before("frozen", hashes)
        if known:
            former = (
                "pretrained model" if before.get("autoencoder") == now.get("autoencoder") else "autoencoder (`vae`)"
            )
            self.refuse(_changes("the hash of the frozen {}", before, now), f"Resume with the former {former}")

    # Loading and writing

    def load_average(
        self,
        ema: EMAModel | None,
        parameters: Sequence[torch.nn.Parameter],
        networks: Mapping[str, torch.nn.Module],
        folder: str,
    ) -> bool:
        """Loads the average of a checkpoint, see `ema.load_average`. Returns whether there is one in the record."""
        if ema is None or self.checkpoint is None or self.checkpoint.ema is None:
            return False
        load_average(ema, parameters, networks, folder)
        ema.load_state_dict(self.checkpoint.ema)
        return True

    def write(self, folder: str, global_step: int, ema: EMAModel | None) -> None:
        """Writes the record of a checkpoint."""
        average = {} if ema is None else ema.state_dict()
        average.pop("shadow_params", None)
        record = {
            "version": RECORD_VERSION,
            "script": self.script,
            "global_step": global_step,
            "ema": average or None,
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
    Sets optimizer, learning rate and average to the values of `training_args` after a checkpoint was loaded, which has
    those of its run. Moments and averages are kept.
    """
    apply_optimizer_arguments(training_args, optimizer)
    for group in optimizer.param_groups:
        group["initial_lr"] = training_args.learning_rate
    lr_scheduler.base_lrs = [training_args.learning_rate] * len(optimizer.param_groups)
    # The shape of the schedule is a function, which no checkpoint holds: it is already that of this run.
    factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]  # type: ignore[attr-defined]
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] = training_args.learning_rate * factor
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    if ema is not None:
        ema.decay = training_args.ema_max_decay
        ema.inv_gamma, ema.power = training_args.ema_inv_gamma, training_args.ema_power


def apply_optimizer_arguments(training_args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
    """Sets an optimizer that was loaded from a checkpoint to the values of `training_args`, apart from its schedule."""
    for group in optimizer.param_groups:
        group["betas"] = (training_args.adam_beta1, training_args.adam_beta2)
        group["weight_decay"] = 0.0 if group.get("undecayed") else training_args.adam_weight_decay
        group["eps"] = training_args.adam_epsilon


def _hash(part: Any) -> str:
    """The hash of a network or a tokenizer; a hash stays."""
    if isinstance(part, str):
        return part
    return hash_tensors(part.state_dict()) if isinstance(part, torch.nn.Module) else hash_tokenizer(part)


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the private keys of diffusers."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
