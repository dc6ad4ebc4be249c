"""
Command line for OpenAI's checkpoints (guided-diffusion, improved-diffusion):

    python -m diffusers_adm.conversion.openai --checkpoint lsun_cat.pt --preset lsun_cat --output_dir lsun-cat
    python -m diffusers_adm.conversion.openai --checkpoint ema_0.9999_050000.pt \
        --model_flags "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True" --output_dir mine
    python -m diffusers_adm.conversion.openai --export mine --output_file back.pt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from ..commands.arguments import program_name
from ..commands.errors import CommandError, run_command
from .common import add_checkpoint_arguments, describe_conversion, format_flags, parse_arguments
from .openai_checkpoints import KIND_NAMES, ConvertedCheckpoint, convert_openai
from .openai_export import export_openai
from .openai_flags import PRESETS, CodeBase


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("diffusers_adm.conversion.openai"),
        description="Converts a checkpoint of OpenAI's guided-diffusion or improved-diffusion for diffusers, or back.",
        allow_abbrev=False,
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--code_base",
        choices=get_args(CodeBase),
        help="Code base that defines the flags and their defaults; by default guided-diffusion.",
    )
    parser.add_argument(
        "--image_channels",
        type=int,
        metavar="N",
        help="Channels of the images that the network denoises. Needed if its numbers of input and output channels "
        "have two meanings, e.g. 5 input and 2 output channels without --learn_sigma.",
    )
    parser.add_argument(
        "--condition_first",
        action="store_true",
        default=None,
        help="The network takes the noisy image after its conditions, as forks for segmentation do, not before them.",
    )
    parser.add_argument(
        "--export", metavar="FOLDER", help="Write the network of this folder as a checkpoint for OpenAI's code."
    )
    parser.add_argument("--output_file", metavar="FILE.pt", help="File that --export writes; must be new.")
    parser.add_argument(
        "--new_attention_order",
        type=str.capitalize,
        choices=("True", "False"),
        help="For --export: value of --use_new_attention_order; by default that of the original checkpoint.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parse_arguments(parser, argv)
    if args.list_presets:
        for name, preset in PRESETS.items():
            print(f"{name} ({preset.code_base}, {preset.num_parameters:,} parameters, {preset.url(name)})")
            print(f"    {preset.flags}")
        return
    try:
        print(_export(parser, args) if args.export is not None else _convert(parser, args))
    except OSError as error:  # of the files that were named
        raise CommandError(str(error)) from error


def _export(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    if args.output_file is None or args.checkpoint is not None:
        parser.error("`--export FOLDER` needs `--output_file FILE.pt`, and cannot be combined with `--checkpoint`.")
    _refuse(parser, args, "--checkpoint", ("output_dir", "preset", "model_flags", "code_base", "condition_first"))
    order = None if args.new_attention_order is None else args.new_attention_order == "True"
    flags = export_openai(args.export, args.output_file, new_attention_order=order, image_channels=args.image_channels)
    return f"Wrote {args.output_file}. guided-diffusion builds this network with\n\n  {format_flags(flags)}\n"


def _convert(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    if args.checkpoint is None or args.output_dir is None:
        parser.error("pass `--checkpoint FILE.pt --output_dir FOLDER`, or `--export FOLDER --output_file FILE.pt`.")
    _refuse(parser, args, "--export", ("output_file", "new_attention_order"))
    result = convert_openai(
        args.checkpoint,
        args.output_dir,
        preset=args.preset,
        model_flags=args.model_flags,
        key=args.key,
        code_base=args.code_base,
        image_channels=args.image_channels,
        condition_first=bool(args.condition_first),
    )
    return describe(result)


def _refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, owner: str, names: Sequence[str]) -> None:
    """Ends the command if an argument was given that has an effect only with `owner`."""
    for name in names:
        if getattr(args, name) is not None:
            parser.error(f"`--{name}` goes with `{owner}` only.")


def describe(result: ConvertedCheckpoint) -> str:
    """Says what was converted, which flags were assumed, and how to load the result."""
    lines = describe_conversion(result, f"{KIND_NAMES[result.kind]} of {result.code_base}")
    if result.ignored:
        lines.append(f"Not about this network, left aside: {', '.join(f'--{name}' for name in result.ignored)}.")
    if result.condition_channels and result.kind == "unet":
        lines.append(
            f"It takes {result.image_channels + result.condition_channels} channels: {result.image_channels} of the "
            f"noisy image and {result.condition_channels} of conditions."
        )
    if result.pipeline == "ADMInpaintPipeline":
        small = " and the upsampled low-resolution image" if result.condition_channels > 4 else ""
        lines.append(
            f"Its pipeline takes the conditions for the masked image and the keep mask (1 = keep){small}, in this "
            "order after the noisy image. If they are something else, load only the U-Net and write a loop."
        )
    if result.pipeline == "ADMImageToImagePipeline":
        order = "after" if result.condition_first else "before"
        lines.append(
            f"Its pipeline takes the conditions for one source image, and the noisy image {order} it. A file does not "
            "show this order: "
            + ("omit" if result.condition_first else "pass")
            + " --condition_first if it is the other one. `source_format` in model_index.json says which values of the "
            "source image become -1 and 1."
        )
    if result.pipeline is None and result.kind != "classifier":
        lines.append("No pipeline of this package takes such channels, so there is no `model_index.json`.")
    lines.append("Load it with")
    folder = str(result.output_dir)
    if result.pipeline is None:
        is_classifier = result.kind == "classifier"
        component, cls = ("classifier", "AdaGNClassifierModel") if is_classifier else ("unet", "AdaGNUNet2DModel")
        lines += [
            f"  from diffusers_adm import {cls}, LearnedVarianceDDPMScheduler",
            f"  {component} = {cls}.from_pretrained({folder!r}, subfolder='{component}')",
            f"  scheduler = LearnedVarianceDDPMScheduler.from_pretrained({folder!r}, subfolder='scheduler')",
        ]
    else:
        inputs = {"ADMSuperResolutionPipeline": "small_image, ", "ADMInpaintPipeline": "image, mask_image, "}
        inputs["ADMImageToImagePipeline"] = "source_image, "
        sampling = f'{inputs.get(result.pipeline, "")}timestep_respacing="{min(250, result.flags["diffusion_steps"])}"'
        sampling += ", class_labels=[0]" if result.flags["class_cond"] else ""
        lines += [
            f"  from diffusers_adm import {result.pipeline}",
            f"  pipe = {result.pipeline}.from_pretrained({folder!r})",
            f"  image = pipe({sampling}).images[0]",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
