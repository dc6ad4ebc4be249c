"""CLIPs of toy size with random weights, for images of 8x8 pixels and `toy_tokenizer()`, and folders of them."""

import torch
from toy_models import MAX_PROMPT_LENGTH, fill_randomly, toy_tokenizer
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


CLIP_WIDTH, IMAGE_SIZE = 16, 8
# To train one from scratch.
TOWER = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOY_CLIP_CONFIG = {
    "projection_dim": 6,
    "text_config": TOWER,
    "vision_config": TOWER | {"image_size": IMAGE_SIZE, "patch_size": 4},
}


def random_clip(
    seed=0, width=CLIP_WIDTH, text_width=None, vision_width=12, max_length=MAX_PROMPT_LENGTH, in_towers=False
):
    """
    Embeddings that depend on every pixel and token. `in_towers`: their width is in the configs of the towers, too, so
    that these load on their own.
    """
    tokenizer = toy_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": text_width or width, "intermediate_size": 2 * width}
    text |= {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": max_length}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = {"hidden_size": vision_width, "intermediate_size": 2 * vision_width, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 2, "image_size": IMAGE_SIZE, "patch_size": 4}
    if in_towers:
        text, vision = ({**tower, "projection_dim": width} for tower in (text, vision))
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    with torch.random.fork_rng():
        return fill_randomly(CLIPModel(config), seed)


def clip_processor(**settings):
    """Mean and standard deviation are those of OpenAI's CLIPs, unlike those of models from scratch."""
    sizes = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    return CLIPImageProcessorPil(**{**sizes, **settings})


def save_clip(folder, clip=None, max_length=MAX_PROMPT_LENGTH, **settings):
    """A pretrained CLIP as it is on the Hub; its folder. `settings` are those of the image processor."""
    for part in (clip or random_clip(), toy_tokenizer(max_length=max_length), clip_processor(**settings)):
        part.save_pretrained(folder)
    return str(folder)
