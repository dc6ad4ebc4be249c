"""The image embeddings of a run: images encoded as by an image processor, and the projection of each kind of U-Net."""

import numpy as np
import pytest
import torch
from PIL import Image
from tolerances import NETWORK, ONE_LAYER, rounding_errors
from toy_clips import CLIP_WIDTH, clip_processor, random_clip, save_clip
from toy_models import (
    CONDITIONAL,
    TEXT_CONFIGS,
    TEXT_WIDTH,
    TOY_CONFIG,
    random_text_encoder,
    random_text_unet,
    random_unet,
)
from transformers import CLIPVisionModelWithProjection

from diffusers_adm import (
    AdaGNUNet2DModel,
    ADMUnCLIPPipeline,
    LearnedVarianceDDPMScheduler,
    UnCLIPProjectionModel,
)
from diffusers_adm.conditioning.image_embedding import ImageEmbeddingCondition
from diffusers_adm.conditioning.image_format import ImageFormat
from diffusers_adm.data.clip_models import ClipVision, load_clip_vision
from diffusers_adm.training import BatchEncoder, ImageEmbeddingArguments, ImageEmbeddings, training_losses
from diffusers_adm.training.unets import replace_class_embedding


def vision_with(**settings):
    return ClipVision(
        CLIPVisionModelWithProjection(random_clip().config.vision_config).eval(), clip_processor(**settings)
    )


def images_of(size, channels=3, number=3):
    shape = (number, *size) if channels == 1 else (number, *size, channels)
    return np.random.default_rng(size[0]).integers(0, 256, shape, dtype=np.uint8)


def as_samples(values):
    return torch.from_numpy(values.reshape(*values.shape[:3], -1)).permute(0, 3, 1, 2) / 127.5 - 1


class TestBatchEncoder:
    @pytest.mark.parametrize(
        ("size", "settings"),
        [
            ((8, 8), {}),
            ((16, 16), {}),
            ((13, 9), {}),  # the shorter edge is resized, the longer one cropped
            ((9, 13), {}),
            ((5, 5), {}),  # enlarged
            ((16, 12), {"size": {"height": 8, "width": 8}}),
            ((16, 16), {"resample": 2}),
            ((6, 6), {"do_resize": False}),  # padded
            ((7, 11), {"do_resize": False}),  # padded and cropped
            ((8, 8), {"do_normalize": False}),
            ((8, 8), {"do_rescale": False}),
            ((16, 16), {"do_center_crop": False}),
            ((8, 8), {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}),
        ],
    )
    def test_pixels_are_those_of_the_image_processor(self, size, settings):
        """Up to one of 256 levels where something is resized: Pillow computes with filters of fixed point numbers."""
        vision, values = vision_with(**settings), images_of(size)
        expected = vision.pixel_values([Image.fromarray(value) for value in values])
        found = BatchEncoder(vision, ImageFormat()).pixel_values(as_samples(values))
        assert found.shape == expected.shape
        processor = vision.processor
        level = (1 if settings.get("do_rescale") is False else 1 / 255) / (
            torch.tensor(processor.image_std)[:, None, None] if processor.do_normalize else 1
        )
        difference = ((found - expected) / level).abs()
        is_resized = processor.do_resize and size != (8, 8)
        assert difference.max() < (1.01 if is_resized else 1e-3)
        assert difference.mean() < 0.1  # most levels agree; bilinear filters have many ties
        assert expected.std() > 0.1

    def test_grey_and_transparent_images(self):
        encoder = BatchEncoder(vision_with(), ImageFormat("L", 1))
        grey = images_of((8, 8), 1)
        expected = BatchEncoder(vision_with(), ImageFormat()).pixel_values(as_samples(np.stack([grey] * 3, axis=-1)))
        assert torch.equal(encoder.pixel_values(as_samples(grey)), expected)
        transparent = images_of((8, 8), 4)
        white = [Image.new("RGBA", (8, 8), "white") for _ in transparent]
        for canvas, values in zip(white, transparent, strict=True):
            canvas.alpha_composite(Image.fromarray(values))
        seen = BatchEncoder(vision_with(), ImageFormat("RGBA", 4)).pixel_values(as_samples(transparent))
        expected = vision_with().pixel_values([canvas.convert("RGB") for canvas in white])
        assert (seen - expected).abs().max() <= 1.01 / 255 / min(vision_with().processor.image_std)

    def test_embeddings_are_those_of_the_tower(self, tmp_path):
        vision = load_clip_vision("clip", save_clip(tmp_path / "clip"))
        values = images_of((8, 8))
        expected = vision.embed(vision.pixel_values([Image.fromarray(value) for value in values]))
        found = BatchEncoder(vision, ImageFormat())(as_samples(values))
        assert found.shape == (3, CLIP_WIDTH)
        assert rounding_errors(found, expected) <= NETWORK
        assert not found.requires_grad

    def test_refusals(self):
        with pytest.raises(ValueError, match="a CLIP encodes 8-bit colours"):
            BatchEncoder(vision_with(), ImageFormat("array", 5, (0.0, 1.0), None))
        with pytest.raises(ValueError, match="resizes with Pillow's filter 1"):
            BatchEncoder(vision_with(resample=1), ImageFormat())


def embeddings_of(pretrained=None, vision=None, **arguments):
    args = ImageEmbeddingArguments(image_embeds_column="clip", **arguments)
    return ImageEmbeddings(args, {"image_embeds": "clip"}, vision, pretrained)


class TestProjection:
    def test_a_pretrained_unet_keeps_its_output_without_a_class(self):
        """Before the first step: the bias of the new layer is the null class. Without tokens, nothing else changes."""
        unet = random_unet(**CONDITIONAL)
        sample, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
        with torch.no_grad():
            expected = unet(sample, t, class_labels=torch.tensor([4, 4])).sample
        embeddings = embeddings_of()
        embeddings.build_projection(unet, 12, None, is_pretrained=True, seed=0)
        output = embeddings.projection(torch.randn(2, 12))
        assert output.encoder_hidden_states is None
        with torch.no_grad():
            found = unet(sample, t, class_labels=output.time_embeds).sample
        assert rounding_errors(found, expected) <= NETWORK
        config = unet.config
        assert (config.class_embed_type, config.num_class_embeds, config.null_class_id) == ("identity", None, None)
        again = type(unet).from_config(unet.config)  # as a checkpoint is read
        assert isinstance(again.class_embedding, torch.nn.Identity)

    def test_a_class_embedding_without_a_null_class_becomes_its_mean(self):
        unet = random_unet(num_class_embeds=3)
        rows = unet.class_embedding.weight.detach().clone()
        assert rounding_errors(replace_class_embedding(unet), rows.mean(dim=0)) <= ONE_LAYER
        assert replace_class_embedding(unet) is None

    def test_of_a_text_model(self):
        embeddings = embeddings_of(num_image_tokens=2)
        embeddings.build_projection(random_text_unet(), 12, random_text_encoder("t5", width=20), True, seed=0)
        config = embeddings.projection.config
        assert (config.clip_extra_context_tokens, config.text_conditioning) == (2, "states")
        assert (config.cross_attention_dim, config.text_states_dim, config.time_embed_dim) == (TEXT_WIDTH, 20, 32)
        layer = embeddings.projection.clip_image_embeddings_project_to_time_embeddings
        assert not layer.weight.any()
        assert not layer.bias.any()

    def test_of_a_new_unet(self):
        weights = []
        for seed in (0, 0, 1):
            embeddings = embeddings_of(image_embeds_in_time=False)
            embeddings.build_projection(random_text_unet(), 12, None, False, seed)
            assert embeddings.projection.config.time_embed_dim is None
            weights.append(embeddings.projection.clip_extra_context_tokens_proj.weight)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_a_pretrained_one_is_taken(self):
        unet = random_text_unet(class_embed_type="identity")
        made = embeddings_of()
        made.build_projection(unet, 12, None, False, seed=0)
        embeddings = embeddings_of(pretrained=made.projection)
        embeddings.build_projection(unet, 12, None, True, seed=5)
        assert embeddings.projection is made.projection
        with pytest.raises(ValueError, match="`text_conditioning=None`, but `caption_column` is given. Leave it out"):
            embeddings.check_text(True, TEXT_CONFIGS["added_kv"])

    def test_text_encoders_of_another_width(self):
        pretrained = UnCLIPProjectionModel(4, 12, 32, TEXT_WIDTH, "states")
        unet = random_text_unet(class_embed_type="identity")
        with pytest.raises(ValueError, match="states of width 20, but the pretrained decoder takes 16"):
            embeddings_of(pretrained).build_projection(unet, 12, random_text_encoder(width=20), True, seed=0)
        with pytest.raises(ValueError, match="gives embeddings of 512 numbers and the image embeddings have 12"):
            embeddings_of(text_conditioning="clip").build_projection(unet, 12, random_text_encoder(), True, seed=0)

    @pytest.mark.parametrize(
        ("arguments", "config", "is_pretrained", "message"),
        [
            (
                {},
                {"class_embed_type": "timestep"},
                True,
                "has `class_embed_type='timestep'` and .*Set `class_embed_typ",
            ),
            ({}, {"num_class_embeds": 3}, False, "and `num_class_embeds=3`.*leave `num_class_embeds` out"),
            (
                {"image_embeds_in_time": False},
                {"class_embed_type": "identity"},
                True,
                "`image_embeds_in_time` is False",
            ),
        ],
    )
    def test_configs_without_a_place(self, arguments, config, is_pretrained, message):
        with pytest.raises(ValueError, match=message):
            embeddings_of(**arguments).prepare_config(config, is_pretrained)

    def test_configs_with_a_place(self):
        assert embeddings_of().prepare_config({"a": 1}, False) == {"a": 1, "class_embed_type": "identity"}
        assert embeddings_of().prepare_config({"num_class_embeds": 3}, True) == {"num_class_embeds": 3}
        assert embeddings_of(image_embeds_in_time=False).prepare_config({"num_class_embeds": 3}, False) == {
            "num_class_embeds": 3
        }

    @pytest.mark.parametrize(
        ("arguments", "config", "message"),
        [
            ({"num_image_tokens": 3}, {}, "is 3, but the U-Net has no cross-attention"),
            ({"image_embeds_in_time": False}, {}, "is False, and the U-Net has no cross-attention"),
            ({"num_image_tokens": 0}, TEXT_CONFIGS["added_kv"], "is 0 and `caption_column` is missing"),
            (
                {},
                {**TEXT_CONFIGS["added_kv"], "addition_embed_type": "text_embeds"},
                "`caption_column` is missing, but the U-Net adds a pooled text",
            ),
        ],
    )
    def test_nothing_to_attend_to(self, arguments, config, message):
        with pytest.raises(ValueError, match=message):
            embeddings_of(**arguments).check_text(False, config)

    def test_widths(self, tmp_path):
        from datasets import Dataset

        images = Dataset.from_dict({"image_embeds": [[0.5] * 12], "row": [0]})
        assert embeddings_of().read_width(images) == 12
        vision = load_clip_vision("clip", save_clip(tmp_path / "clip"))
        with pytest.raises(ValueError, match="'clip' have 12 numbers, but those of the CLIP have 16"):
            embeddings_of(vision=vision).read_width(images)
        with pytest.raises(ValueError, match="have 12 numbers, but the pretrained decoder takes 9"):
            embeddings_of(UnCLIPProjectionModel(4, 9, 32, TEXT_WIDTH, "states")).read_width(images)


@pytest.mark.no_jitter("trains for 150 steps")
def test_samples_have_the_colour_that_the_embedding_says():
    """
    Images of one colour, which is linear in the embedding: a decoder of one level learns it to some hundredths of its
    range in 150 steps. Without the embedding it could only give the mean colour, 0.4 off here, or random ones.
    """
    torch.manual_seed(0)
    one_level = {"down_block_types": ("ResnetDownsampleBlock2D",), "up_block_types": ("ResnetUpsampleBlock2D",)}
    one_level |= {"block_out_channels": (16,), "add_attention": False, "sample_size": 4, "out_channels": 3}
    unet = AdaGNUNet2DModel(**{**TOY_CONFIG, **one_level, "class_embed_type": "identity"})
    projection = UnCLIPProjectionModel(0, 6, 64, text_conditioning=None)
    scheduler = LearnedVarianceDDPMScheduler(100, variance_type="fixed_small", prediction_type="sample")
    condition = ImageEmbeddingCondition(projection, dropout_prob=0.1)
    optimizer = torch.optim.AdamW([*unet.parameters(), *projection.parameters()], lr=1e-2, betas=(0.9, 0.99))
    mixing, number_of_steps = torch.randn(3, 6), 150
    for step in range(number_of_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 20) * (1 - step / number_of_steps)
        colours = torch.rand(64, 3) * 2 - 1
        inputs = condition.for_training({"image_embeds": colours @ mixing})
        images, timesteps = colours[:, :, None, None].expand(-1, -1, 4, 4), torch.randint(100, (64,))
        losses = training_losses(unet, scheduler, images, timesteps, objective="simple", model_kwargs=inputs.kwargs)
        losses.loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    components = {"unet": unet, "scheduler": scheduler, "image_projection": projection}
    pipe = ADMUnCLIPPipeline(**dict.fromkeys(ADMUnCLIPPipeline._optional_components) | components)
    pipe.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": 10,
        "eta": 0.0,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }
    wanted = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.2], [0.5, 0.5, 0.9]])
    samples = pipe(image_embeds=(2 * wanted - 1) @ mixing, num_images_per_prompt=4, **options).images
    found = samples.mean(dim=(2, 3)).view(3, 4, 3)  # (embedding, sample, colour)
    assert (found - wanted[:, None]).abs().max() < 0.15
    assert torch.cdist(found.flatten(0, 1), wanted).argmin(dim=1).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    without = pipe(num_images_per_prompt=12, **options).images.mean(dim=(2, 3))
    assert without.std(dim=0).min() > 3 * found.std(dim=1).mean()  # the learned embedding stands for any colour
