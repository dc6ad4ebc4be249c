"""
The class of an image, and the null class that takes its place in the unconditional pass of classifier-free guidance
(Ho & Salimans 2022, https://huggingface.co/papers/2207.12598).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .condition import Condition, UNetInputs


def drop_labels(class_labels: torch.Tensor, null_class_id: int | None, dropout_prob: float) -> torch.Tensor:
    """
    Replaces some labels of a batch by the null class, so that the model can be guided.

    Args:
        class_labels (`torch.LongTensor` of shape `(batch_size,)`): -1 for unlabelled, which becomes the null class.
        null_class_id (`int`, *optional*): `None`: nothing is replaced.
        dropout_prob (`float`): Share of the labels to replace.
    """
    if null_class_id is None:
        return class_labels
    dropped = torch.rand(class_labels.shape, device=class_labels.device) < dropout_prob
    return class_labels.masked_fill(dropped | (class_labels < 0), null_class_id)


class ClassCondition(Condition):
    """
    Class labels of a U-Net with a class embedding.

    Args:
        unet_config (mapping): The config of the U-Net.
        dropout_prob (`float`, defaults to 0.0): Share of the labels that training replaces by the null class.
    """

    argument = "class_labels"

    def __init__(self, unet_config: Mapping[str, Any], *, dropout_prob: float = 0.0):
        super().__init__()
        self.null_class_id = unet_config.get("null_class_id")
        self.dropout_prob = dropout_prob

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """Reads `class_labels` `(batch_size,)`, -1 for unlabelled. Without a null class, none is dropped."""
        return UNetInputs({"class_labels": drop_labels(batch["class_labels"], self.null_class_id, self.dropout_prob)})
