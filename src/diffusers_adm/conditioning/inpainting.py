"""
What inpainting adds to sampling and training: the channels that show a network what is known, and resampling.

GLIDE (Nichol et al. 2021, https://huggingface.co/papers/2112.10741, section 4), RePaint (Lugmayr et al. 2022,
https://huggingface.co/papers/2201.09865).
"""

import torch


def known_channels(images: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    r"""
    What a network that was trained to inpaint sees behind x_t: `[images * known, known]`.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): In [-1, 1].
        known (`torch.Tensor` of shape `(batch_size, 1, height, width)`): 1 or `True` where the image is kept.
    """
    known = known.to(images.dtype)
    return torch.cat([images * known, known], dim=1)


def resampling_walk(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    r"""
    Which steps of a chain RePaint takes, in which order: 0 is the noisiest one, `num_steps - 1` leads to x_0.

    A step that does not follow the one before it tells of a jump: the sample is noised again first, up to that step.

    Args:
        num_steps (`int`): Length of the chain.
        jump_length (`int`): Number j of steps that a jump takes back. Jumps start where 0, j, 2j, ... steps would be
            left before the last one, as far as there are j steps to go back and one more.
        jump_n_sample (`int`): Number r of times that the steps of a jump are taken, the first one included; 1 is the
            chain itself.

    Returns:
        `list` of `int`: `num_steps + (r - 1) * j * (number of places to jump from)` of them.
    """
    jumps = dict.fromkeys(range(0, num_steps - jump_length, jump_length), jump_n_sample - 1)
    walk, left = [], num_steps - 1  # steps left after the coming one
    while left >= 0:
        if jumps.get(left, 0) > 0:
            jumps[left] -= 1
            left += jump_length
        walk.append(num_steps - 1 - left)
        left -= 1
    return walk
