"""
Seeds that are pure functions of where training stands, so that a resumed run draws what an unbroken one would.

Saving and restoring generator states is not enough for that: states are held per process and per worker, and they
depend on everything drawn before. A seed computed from (seed, rank, micro-step) or (seed, epoch, example) depends on
nothing else.
"""

import hashlib

import torch


def derive_seed(seed: int, stream: str, *coordinates: int) -> int:
    """
    A seed for one purpose at one place of the run, computed by a cryptographic hash.

    Sums such as `seed + rank + step` would repeat each other's streams (rank 1 at step 0 draws what rank 0 draws at
    step 1); a hash of the whole tuple does not, and it does not change with the version of any library.

    Args:
        seed (`int`): The seed of the run.
        stream (`str`): What the numbers are for; different streams are independent.
        coordinates (`int`): Where in the stream, e.g. the epoch and the index of an example.

    Returns:
        `int`: In `[0, 2**63)`, which every generator of PyTorch, NumPy and Python accepts.
    """
    key = repr((int(seed), stream, *(int(coordinate) for coordinate in coordinates)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, process_index: int, micro_step: int) -> None:
    """
    Reseeds PyTorch's global generators (CPU and every accelerator) for one micro-step.

    Call it before anything random of the micro-step: timesteps, noise, label dropout and the model's own dropout then
    depend on the seed, the process and the micro-step alone. It does not wait for the device.

    Args:
        seed (`int`): The seed of the run.
        process_index (`int`): The rank, so that processes draw different noise.
        micro_step (`int`): Batches each process has consumed since training began (not optimizer steps: with gradient
            accumulation, each batch of a step needs its own noise).
    """
    torch.manual_seed(derive_seed(seed, "training step", process_index, micro_step))
