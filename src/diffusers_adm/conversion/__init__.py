"""Checkpoints of other code bases, converted into this one's and back."""

from .openai_checkpoints import ConvertedCheckpoint, convert_openai
from .openai_export import export_openai
from .openai_presets import PRESETS


__all__ = ["PRESETS", "ConvertedCheckpoint", "convert_openai", "export_openai"]
