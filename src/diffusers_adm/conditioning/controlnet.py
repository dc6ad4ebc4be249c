"""
Images that a sample must follow, such as edges or regions, through ControlNets (Zhang et al. 2023,
https://huggingface.co/papers/2302.05543).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .condition import Condition, UNetInputs


class ControlNetCondition(Condition):
    """
    The images that ControlNets are given.

    Args:
        dropout_prob (`float`, defaults to 0.0): Share of the images that training replaces by black ones.
    """

    def __init__(self, *, dropout_prob: float = 0.0):
        super().__init__()
        self.dropout_prob = dropout_prob

    def for_training(self, batch: Mapping[str, torch.Tensor]) -> UNetInputs:
        """
        Reads `conditions` `(batch_size, channels, height, width)` in [0, 1]. Gives `controlnet_cond`, which is for the
        function that runs ControlNet and U-Net.
        """
        images = batch["conditions"]
        dropped = torch.rand(len(images), device=images.device) < self.dropout_prob
        return UNetInputs({"controlnet_cond": images.masked_fill(dropped[:, None, None, None], 0)})
