"""
Seeds that are pure functions of the position in training, so that a resumed run gets the random numbers of an unbroken
one.

Saving and restoring generator states is not enough: each process and each worker has its own, and they depend on all
numbers drawn before. A seed computed from (seed, rank, micro-step) or (seed, epoch, example) depends on nothing else.
"""

import hashlib

import torch


def derive_seed(seed: int, stream: str, *coordinates: int) -> int:
    """
    Computes a seed for one purpose at one position of the run, by a cryptographic hash.

    Sums such as `seed + rank + step` would repeat streams (rank 1 at step 0 would get the numbers of rank 0 at step 1).
    A hash of the whole tuple does not, and does not depend on the version of any library.

    Args:
        seed (`int`): The seed of the run.
        stream (`str`): Purpose of the numbers; different streams are independent.
        coordinates (`int`): Position in the stream, e.g. the epoch and the index of an example.

    Returns:
        `int`: In `[0, 2**63)`, which every generator of PyTorch, NumPy and Python accepts.
    """
    key = repr((int(seed), stream, *(int(coordinate) for coordinate in coordinates)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, process_index: int, micro_step: int) -> None:
    """
    Reseeds PyTorch's global generators (CPU and every accelerator) for one micro-step.

    Call it before the first random number of the micro-step: timesteps, noise, label dropout and the model's own
    dropout then depend only on the seed, the process and the micro-step. It does not wait for the device.

    Args:
        seed (`int`): The seed of the run.
        process_index (`int`): The rank, so that processes get different noise.
        micro_step (`int`): Number of batches that each process has consumed since training began (not optimizer steps:
            with gradient accumulation, each batch of a step needs its own noise).
    """
    torch.manual_seed(derive_seed(seed, "training step", process_index, micro_step))
