"""
Command line for GLIDE's checkpoints:

    python -m diffusers_adm.conversion.glide --checkpoint base.pt --preset base --tokenizer gpt2 --output_dir glide
    python -m diffusers_adm.conversion.glide --checkpoint mine.pt --model_flags "--xf_width 256 --xf_heads 4" \
        --tokenizer folder-of-gpt2 --output_dir mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..commands.errors import CommandError, run_command
from .glide_checkpoints import PIPELINES, ConvertedGLIDECheckpoint, convert_glide
from .glide_flags import GLIDE_PRESETS
from .openai import add_checkpoint_arguments, with_model_flags_joined
from .openai_flags import format_flags


# As GLIDE's notebooks sample. There, the upsamplers start from slightly weaker noise: see docs/coming_from_glide.md.
CALLS = {
    "base": 'pipe("a corgi in a field", guidance_scale=3.0, timestep_respacing="100")',
    "base-inpaint": 'pipe(image, mask_image, "a corgi in a field", guidance_scale=5.0, timestep_respacing="100")',
    "upsample": 'pipe(small_image, "a corgi in a field", timestep_respacing="fast27", eta=0.0)',
    "upsample-inpaint": 'pipe(image, mask_image, "a corgi in a field", low_res_image=small_image, '
    'timestep_respacing="fast27")',
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_adm.conversion.glide",
        description="Converts a checkpoint of OpenAI's GLIDE (glide-text2im) for diffusers.",
        allow_abbrev=False,
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="PATH_OR_REPO",
        help="GPT-2's: a folder with its two files (vocab.json and merges.txt, or encoder.json and vocab.bpe, also "
        "with .gz), or a repository. Without it the pipeline has none.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(with_model_flags_joined(sys.argv[1:] if argv is None else argv))
    if args.list_presets:
        for name, preset in GLIDE_PRESETS.items():
            print(f"{name} ({preset.num_parameters:,} parameters, {preset.url()})")
            print(f"    {format_flags(shown(preset.settle()))}")
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


def shown(flags: dict[str, object]) -> dict[str, object]:
    """The flags that have a value to print."""
    return {name: value for name, value in flags.items() if value != ""}


def describe(result: ConvertedGLIDECheckpoint) -> str:
    """What was converted, what was assumed, and how to load it."""
    lines = [
        f"Wrote {result.output_dir}: a model of GLIDE's ({result.kind}), {result.num_parameters:,} parameters in "
        f"{', '.join(result.dtypes)}.",
        f"Flags: {format_flags(shown(result.flags))}",
    ]
    if result.recognised:
        lines.append(
            f"Taken for the published {result.preset}: its tensors have these names and shapes. If it is another one, "
            "pass its --model_flags; attention heads and diffusion process cannot be told from a file."
        )
    if result.assumed:
        lines.append(
            "WARNING: neither the file nor you told these; a wrong one gives wrong images without any error. Check "
            f"them and pass what differs with --model_flags: {format_flags(result.assumed)}"
        )
    cls, folder, tokenizer = PIPELINES[result.kind].__name__, str(result.output_dir), ""
    lines += ["Load it with", f"  from diffusers_adm import {cls}"]
    if not result.has_tokenizer:
        lines.append("  from diffusers_adm.conversion import load_glide_tokenizer")
        tokenizer = f", tokenizer=load_glide_tokenizer('folder-of-gpt2', {result.flags['text_ctx']})"
    lines += [
        f"  pipe = {cls}.from_pretrained({folder!r}{tokenizer})",
        f"  image = {CALLS[result.kind]}.images[0]",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
