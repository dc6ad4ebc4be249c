"""
Runs of the training scripts that are split over two processes on the CPU, in forked processes of `processes.py`.

Accelerate only splits on GPUs. Here it is told afterwards that it is configured for FSDP2, or joined through DeepSpeed
with gloo; from there on everything is its own code and that of `fully_shard` and DeepSpeed.
"""

import os

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from scripts import load_script

from diffusers_adm.training import setup


def join_fsdp2(mixed_precision, **kwargs):
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"  # as in accelerate_fsdp2.yaml
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, **kwargs)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    if accelerator.mixed_precision != "no":
        accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def join_zero2(mixed_precision, **kwargs):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo serves as well, and need not be compiled
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    gloo = InitProcessGroupKwargs(backend="gloo")
    return Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[gloo], **kwargs)


def join_plain(mixed_precision, **kwargs):
    return Accelerator(cpu=True, mixed_precision=mixed_precision, **kwargs)


def train(join, script, argv):
    """A run of a script whose processes are joined by one of these functions."""
    setup.join_processes = join
    load_script(script).main(argv)
