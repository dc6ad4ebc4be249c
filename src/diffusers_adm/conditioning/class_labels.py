"""
The class of an image, and the null class that takes its place in the unconditional pass of classifier-free guidance
(Ho & Salimans 2022, https://huggingface.co/papers/2207.12598).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ops.values import check_magnitude, check_plain_tensor, describe
from .condition import Condition, PreparedCondition, SamplingCall, UNetInputs


ClassLabels = int | str | Sequence[int | str] | torch.Tensor | None


def drop_labels(class_labels: torch.Tensor, null_class_id: int | None, dropout_prob: float) -> torch.Tensor:
    """
    Replaces random labels of a batch by the null class, for classifier-free guidance.

    Args:
        class_labels (`torch.LongTensor` of shape `(batch_size,)`): -1 for unlabelled, which becomes the null class.
        null_class_id (`int`, *optional*): `None`: nothing is replaced.
        dropout_prob (`float`): Probability of replacing each label. The random numbers are those of PyTorch's global
            generator, seeded per batch by `TrainingRun.batches`.
    """
    if null_class_id is None:
        return class_labels
    dropped = torch.rand(class_labels.shape, device=class_labels.device) < dropout_prob
    return class_labels.masked_fill(dropped | (class_labels < 0), null_class_id)


class ClassCondition(Condition):
    """
    The class labels of a U-Net with a class embedding, and of a classifier.

    Args:
        unet_config (mapping): The config of the U-Net.
        id2label (mapping, *optional*): Names of the classes.
        num_classifier_classes (`int`, *optional*): Number of classes of a classifier that guides an unconditional
            U-Net.
        dropout_prob (`float`, defaults to 0.0): Probability of replacing each label by the null class in training.

    Attributes:
        labels (`torch.Tensor` of shape `(num_prompts,)` or `(1,)`, *optional*): Labels of the call.
    """

    argument = "class_labels"

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        *,
        id2label: Mapping[int, str] | None = None,
        num_classifier_classes: int | None = None,
        dropout_prob: float = 0.0,
    ):
        super().__init__()
        self.unet_config, self.id2label, self.dropout_prob = unet_config, id2label or {}, dropout_prob
        self.null_class_id = unet_config.get("null_class_id")
        self.embed_type = unet_config.get("class_embed_type")
        self.has_embedding = self.embed_type is not None or unet_config.get("num_class_embeds") is not None
        self.num_classes = unet_config.get("num_class_embeds") if self.has_embedding else num_classifier_classes
        self.is_droppable = self.null_class_id is not None
        self.labels: torch.Tensor | None = None

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """Reads `class_labels` `(batch_size,)`, -1 for unlabelled. Without a null class, none is dropped."""
        return UNetInputs({"class_labels": drop_labels(batch["class_labels"], self.null_class_id, self.dropout_prob)})

    def read(self, class_labels: ClassLabels) -> ClassCondition:
        """Takes the labels of a call, by number or by name; raises a `ValueError` for those that do not exist."""
        if class_labels is None:
            if self.embed_type in ("identity", "projection") and not self.is_droppable:
                raise ValueError(
                    f"`class_labels` is missing: the U-Net has `class_embed_type={self.embed_type!r}` and takes a "
                    "vector for each image. Pass them. A decoder of unCLIP, whose vectors are made from image "
                    "embeddings, is loaded with `ADMUnCLIPPipeline`."
                )
            return self
        if not self.has_embedding and self.num_classes is None:
            raise ValueError(
                f"`class_labels` is {class_labels}, but this model is unconditional. Leave them out, use a model with "
                "`num_class_embeds`, or add a classifier."
            )
        if isinstance(class_labels, str):
            class_labels = self._number_of(class_labels)
        elif isinstance(class_labels, (list, tuple)):
            class_labels = [self._number_of(label) if isinstance(label, str) else label for label in class_labels]
        labels = self._as_tensor(class_labels)
        is_embedding = self.embed_type in ("identity", "projection")
        if labels.ndim not in ((2,) if is_embedding else (0, 1)) or labels.shape[:1] == (0,):
            raise ValueError(
                f"`class_labels` has shape {tuple(labels.shape)}; pass one "
                f"{'embedding' if is_embedding else 'label'} for each image."
            )
        if self.embed_type is None:
            self._check_numbers(labels)
            labels = labels.long()
        else:
            check_magnitude("class_labels", labels)
        if labels.ndim > 0:
            self.counts = {"class_labels": len(labels)}
        self.labels, self.is_given = torch.atleast_1d(labels), True
        return self

    def _as_tensor(self, class_labels: Any) -> torch.Tensor:
        try:
            labels = torch.as_tensor(class_labels)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # torch has one for each kind of value
            raise ValueError(
                f"`class_labels` is {describe(class_labels)}; pass the numbers or names of classes: {error}."
            ) from error
        check_plain_tensor("class_labels", labels)
        return labels

    def _number_of(self, name: str) -> int:
        numbers = {known: label for label, known in self.id2label.items()}
        if name not in numbers:
            raise ValueError(
                f"`class_labels` holds {name!r}, but the classes of this pipeline are {list(numbers) or 'not named'}. "
                "Pass the number of a class, or one of its names (`id2label` of the pipeline)."
            )
        return numbers[name]

    def _check_numbers(self, labels: torch.Tensor) -> None:
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"`class_labels` are of type {labels.dtype}; class numbers are integers.")
        # Read here, once: on a device the embedding would fail later, and end the process.
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"`class_labels` range from {low} to {high}; this model has the classes 0 to {self.num_classes - 1}"
                f"{', the null class included' if self.is_droppable else ''}."
            )

    def prepare(self, call: SamplingCall) -> PreparedCondition:
        """The labels, and the null class in the unconditional pass."""
        if self.labels is None:
            return PreparedCondition.same_in_both(UNetInputs())
        labels = call.rows(self.labels)
        if not self.has_embedding:  # only the classifier uses them
            return PreparedCondition.same_in_both(UNetInputs())
        conditional = UNetInputs({"class_labels": labels})
        if not self.is_droppable:
            return PreparedCondition.same_in_both(conditional)
        null_labels = torch.full_like(labels, self.null_class_id)
        return PreparedCondition(conditional, UNetInputs({"class_labels": null_labels}))

    def for_guidance(self, call: SamplingCall) -> dict[str, Any]:
        """`class_labels`."""
        return {} if self.labels is None else {"class_labels": call.rows(self.labels)}

    def without_effect(self, num_steps: int, may_guide: bool, uses_classifier: bool) -> list[str]:
        """Warns of labels of an unconditional U-Net that no classifier uses."""
        if self.labels is None or self.has_embedding or uses_classifier:
            return []
        return [
            "`class_labels` have no effect: the U-Net is unconditional, and `classifier_guidance_scale` is 0. Pass a "
            "`classifier_guidance_scale` to guide towards them, or leave them out."
        ]
