"""
Command line for OpenAI's checkpoints (guided-diffusion, improved-diffusion):

    python -m diffusers_adm.conversion.openai --checkpoint lsun_cat.pt --preset lsun_cat --output_dir lsun-cat
    python -m diffusers_adm.conversion.openai --checkpoint ema_0.9999_050000.pt \
        --model_flags "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True" --output_dir mine
    python -m diffusers_adm.conversion.openai --export mine --output_file back.pt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from ..commands.errors import CommandError, add_debug_argument, run_command
from .openai_checkpoints import KIND_NAMES, ConvertedCheckpoint, convert_openai
from .openai_export import export_openai
from .openai_flags import CodeBase, format_flags
from .openai_presets import PRESETS


def with_model_flags_joined(argv: Sequence[str]) -> list[str]:
    """The value of `--model_flags` begins with dashes: argparse would take it for an option of its own."""
    argv = list(argv)
    if "--model_flags" in argv[:-1]:
        position = argv.index("--model_flags")
        argv[position : position + 2] = [f"--model_flags={argv[position + 1]}"]
    return argv


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """What every conversion from a `.pt` file asks for."""
    parser.add_argument("--checkpoint", metavar="FILE.pt", help="The checkpoint to convert.")
    parser.add_argument("--output_dir", metavar="FOLDER", help="Where to; must be new or empty.")
    parser.add_argument("--preset", metavar="NAME", help="The published checkpoint that it is (see --list_presets).")
    parser.add_argument(
        "--model_flags",
        metavar='"--image_size 64 ..."',
        help="Or the flags it was trained with, in one pair of quotes and under the names of the code base. What is "
        "left out is read off the file where that tells it, and else has the code base's default.",
    )
    parser.add_argument(
        "--key",
        metavar="NAME",
        help="Which network to convert, where the file holds several: for example ema, or state_dict.model.",
    )
    parser.add_argument("--list_presets", action="store_true", help="Print the published checkpoints and their flags.")
    add_debug_argument(parser)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_adm.conversion.openai",
        description="Converts a checkpoint of OpenAI's guided-diffusion or improved-diffusion for diffusers, or back.",
        allow_abbrev=False,
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--code_base", choices=get_args(CodeBase), help="Whose flags and defaults; without it, guided-diffusion's."
    )
    parser.add_argument(
        "--image_channels",
        type=int,
        metavar="N",
        help="Channels of the images that the network denoises, where its numbers of input and output channels can "
        "mean two things and nothing else tells, for example if it takes 5 channels and returns 2.",
    )
    parser.add_argument(
        "--export", metavar="FOLDER", help="Write the network of this folder as a checkpoint of OpenAI's."
    )
    parser.add_argument("--output_file", metavar="FILE.pt", help="Where `--export` writes to; must be new.")
    parser.add_argument(
        "--new_attention_order",
        type=str.capitalize,
        choices=("True", "False"),
        help="For `--export`: the value of `--use_new_attention_order`; without it, that of the original checkpoint.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(with_model_flags_joined(sys.argv[1:] if argv is None else argv))

    if args.list_presets:
        for name, preset in PRESETS.items():
            print(f"{name} ({preset.code_base}, {preset.num_parameters:,} parameters, {preset.url(name)})")
            print(f"    {preset.flags}")
        return
    try:
        if args.export is not None:
            if args.output_file is None or args.checkpoint is not None:
                parser.error("`--export FOLDER` goes with `--output_file FILE.pt`, and not with `--checkpoint`.")
            _refuse(parser, args, ("output_dir", "preset", "model_flags", "code_base"), "goes with `--checkpoint` only")
            order = None if args.new_attention_order is None else args.new_attention_order == "True"
            flags = export_openai(
                args.export, args.output_file, new_attention_order=order, image_channels=args.image_channels
            )
            print(f"Wrote {args.output_file}. guided-diffusion builds this network with\n\n  {format_flags(flags)}\n")
            return
        if args.checkpoint is None or args.output_dir is None:
            parser.error("pass `--checkpoint FILE.pt --output_dir FOLDER`, or `--export FOLDER --output_file FILE.pt`.")
        _refuse(parser, args, ("output_file", "new_attention_order"), "goes with `--export` only")
        result = convert_openai(
            args.checkpoint,
            args.output_dir,
            preset=args.preset,
            model_flags=args.model_flags,
            key=args.key,
            code_base=args.code_base,
            image_channels=args.image_channels,
        )
    except OSError as error:  # of the files that were named
        raise CommandError(str(error)) from error
    print(describe(result))


def _refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Ends the command if one of the arguments was given, which would have no effect."""
    for name in names:
        if getattr(args, name) is not None:
            parser.error(f"`--{name}` {why}.")


def describe(result: ConvertedCheckpoint) -> str:
    """What was converted, what was assumed, and how to load it."""
    lines = [
        f"Wrote {result.output_dir}: {KIND_NAMES[result.kind]} of {result.code_base}, {result.num_parameters:,} "
        f"parameters in {', '.join(result.dtypes)}.",
        f"Flags: {format_flags({name: value for name, value in result.flags.items() if value != ''})}",
    ]
    if result.recognised:
        lines.append(
            f"Taken for the published {result.preset}: its tensors have these names and shapes. If it is another one, "
            "pass its --model_flags; attention heads and diffusion process cannot be told from a file."
        )
    if result.ignored:
        lines.append(f"Not about this network, left aside: {', '.join(f'--{name}' for name in result.ignored)}.")
    if result.assumed:
        lines.append(
            "WARNING: neither the file nor you told these; a wrong one gives wrong images without any error. Check "
            f"them and pass what differs with --model_flags: {format_flags(result.assumed)}"
        )
    if result.condition_channels and result.kind == "unet":
        lines.append(
            f"It takes {result.image_channels + result.condition_channels} channels: {result.image_channels} of the "
            f"noisy image and {result.condition_channels} of conditions."
        )
    folder = str(result.output_dir)
    if result.kind == "classifier":
        lines += [
            "Load it with",
            "  from diffusers_adm import AdaGNClassifierModel, LearnedVarianceDDPMScheduler",
            f"  classifier = AdaGNClassifierModel.from_pretrained({folder!r}, subfolder='classifier')",
            f"  scheduler = LearnedVarianceDDPMScheduler.from_pretrained({folder!r}, subfolder='scheduler')",
        ]
        return "\n".join(lines)
    if result.pipeline is None:
        lines += [
            "No pipeline of this package takes such channels, so there is no `model_index.json`. Load it with",
            "  from diffusers_adm import AdaGNUNet2DModel, LearnedVarianceDDPMScheduler",
            f"  unet = AdaGNUNet2DModel.from_pretrained({folder!r}, subfolder='unet')",
            f"  scheduler = LearnedVarianceDDPMScheduler.from_pretrained({folder!r}, subfolder='scheduler')",
        ]
        return "\n".join(lines)
    inputs = {"ADMSuperResolutionPipeline": "small_image, ", "ADMInpaintPipeline": "image, mask_image, "}
    if result.pipeline == "ADMInpaintPipeline":
        small = " and the upsampled low-resolution image" if result.condition_channels > 4 else ""
        lines.append(
            f"Its pipeline takes the conditions for the known pixels and the keep mask (1 = known){small}, in this "
            "order behind the noisy image. If they are something else, load only the U-Net and write a loop."
        )
    steps = min(250, result.flags["diffusion_steps"])
    sampling = inputs.get(result.pipeline, "")
    sampling += f'timestep_respacing="{steps}"' + (", class_labels=[0]" if result.flags["class_cond"] else "")
    lines += [
        "Load it with",
        f"  from diffusers_adm import {result.pipeline}",
        f"  pipe = {result.pipeline}.from_pretrained({folder!r})",
        f"  image = pipe({sampling}).images[0]",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
