"""
Command line for GLIDE's checkpoints:

    python -m diffusers_adm.conversion.glide --checkpoint base.pt --preset base --tokenizer gpt2 --output_dir glide
    python -m diffusers_adm.conversion.glide --checkpoint mine.pt --model_flags "--xf_width 256 --xf_heads 4" \
        --tokenizer folder-of-gpt2 --output_dir mine
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..commands.arguments import program_name
from ..commands.errors import CommandError, run_command
from .common import add_checkpoint_arguments, describe_conversion, format_flags, parse_arguments
from .glide_checkpoints import PIPELINES, ConvertedGLIDECheckpoint, convert_glide
from .glide_flags import GLIDE_PRESETS


# As in GLIDE's notebooks. There, the upsamplers start from slightly weaker noise: see docs/coming_from_glide.md.
CALLS = {
    "base": 'pipe("a corgi in a field", guidance_scale=3.0, timestep_respacing="100")',
    "base-inpaint": 'pipe(image, mask_image, "a corgi in a field", guidance_scale=5.0, timestep_respacing="100")',
    "upsample": 'pipe(small_image, "a corgi in a field", timestep_respacing="fast27", eta=0.0)',
    "upsample-inpaint": 'pipe(image, mask_image, "a corgi in a field", low_res_image=small_image, '
    'timestep_respacing="fast27")',
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("diffusers_adm.conversion.glide"),
        description="Converts a checkpoint of OpenAI's GLIDE (glide-text2im) for diffusers.",
        allow_abbrev=False,
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="PATH_OR_REPO",
        help="GPT-2's tokenizer: a folder with its two files (vocab.json and merges.txt, or encoder.json and "
        "vocab.bpe, also with .gz), or a repository. Without it the pipeline has no tokenizer.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parse_arguments(parser, argv)
    if args.list_presets:
        for name, preset in GLIDE_PRESETS.items():
            print(f"{name} ({preset.num_parameters:,} parameters, {preset.url()})")
            print(f"    {format_flags(preset.settle())}")
        return
    if args.checkpoint is None or args.output_dir is None:
        parser.error("pass `--checkpoint FILE.pt --output_dir FOLDER`.")
    try:
        result = convert_glide(
            args.checkpoint,
            args.output_dir,
            preset=args.preset,
            model_flags=args.model_flags,
            key=args.key,
            tokenizer=args.tokenizer,
        )
    except OSError as error:  # of the files that were named
        raise CommandError(str(error)) from error
    print(describe(result))


def describe(result: ConvertedGLIDECheckpoint) -> str:
    """Says what was converted, which flags were assumed, and how to load the result."""
    lines = describe_conversion(result, f"a model of GLIDE's ({result.kind})")
    cls, tokenizer = PIPELINES[result.kind].__name__, ""
    lines += ["Load it with", f"  from diffusers_adm import {cls}"]
    if not result.has_tokenizer:
        lines.append("  from diffusers_adm.conversion import load_glide_tokenizer")
        tokenizer = f", tokenizer=load_glide_tokenizer('folder-of-gpt2', {result.flags['text_ctx']})"
    lines += [
        f"  pipe = {cls}.from_pretrained({str(result.output_dir)!r}{tokenizer})",
        f"  image = {CALLS[result.kind]}.images[0]",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
