"""
Converts checkpoints of other code bases into folders that `from_pretrained` loads, and back.

To add a family NAME of checkpoints, follow GLIDE's files; `common.py` has what they share:
- `NAME_flags.py`: its flags with their defaults, the configs of networks and scheduler they mean, its published models,
  and the flags that names and shapes of a checkpoint's tensors reveal;
- `NAME_checkpoints.py`: `convert_NAME`, which reads the layout of the file, builds the networks of the flags on the
  meta device, with a `TensorRule` for every tensor, lists `differences` from the file and calls `write_folder`;
- `NAME.py`: the command line, `python -m diffusers_adm.conversion.NAME`.
"""

from .glide_checkpoints import ConvertedGLIDECheckpoint, convert_glide
from .glide_flags import GLIDE_PRESETS
from .glide_tokenizer import load_glide_tokenizer
from .openai_checkpoints import ConvertedCheckpoint, convert_openai
from .openai_export import export_openai
from .openai_flags import PRESETS
from .single_file import load_single_file


__all__ = [
    "GLIDE_PRESETS",
    "PRESETS",
    "ConvertedCheckpoint",
    "ConvertedGLIDECheckpoint",
    "convert_glide",
    "convert_openai",
    "export_openai",
    "load_glide_tokenizer",
    "load_single_file",
]
