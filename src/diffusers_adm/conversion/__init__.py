"""Checkpoints of other code bases, converted into this one's and back."""

from .glide_checkpoints import ConvertedGLIDECheckpoint, convert_glide
from .glide_flags import GLIDE_PRESETS
from .glide_tokenizer import load_glide_tokenizer
from .openai_checkpoints import ConvertedCheckpoint, convert_openai
from .openai_export import export_openai
from .openai_presets import PRESETS


__all__ = [
    "GLIDE_PRESETS",
    "PRESETS",
    "ConvertedCheckpoint",
    "ConvertedGLIDECheckpoint",
    "convert_glide",
    "convert_openai",
    "export_openai",
    "load_glide_tokenizer",
]
