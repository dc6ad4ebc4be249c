"""Conditions: what they give the U-Net in training, and how they are merged."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding

from diffusers_adm import LearnedVarianceDDPMScheduler
from diffusers_adm.conditioning.class_labels import ClassCondition
from diffusers_adm.conditioning.condition import (
    Condition,
    MergedConditions,
    PreparedCondition,
    UNetInputs,
    concatenate,
    merge,
)
from diffusers_adm.conditioning.controlnet import ControlNetCondition
from diffusers_adm.conditioning.guidance import exact_prediction, shift_prediction
from diffusers_adm.conditioning.inpainting import InpaintingCondition
from diffusers_adm.conditioning.low_resolution import LowResolutionCondition
from diffusers_adm.conditioning.text import TextCondition


BATCH = 64
TEXT_UNET = {"down_block_types": ["CrossAttnDownBlock2D"], "cross_attention_dim": 8}


def images(size: int = 8) -> torch.Tensor:
    levels = torch.randint(256, (BATCH, 3, size, size), generator=torch.Generator().manual_seed(1))
    return levels / 127.5 - 1


class TestTraining:
    def test_labels_become_the_null_class(self):
        labels = torch.arange(BATCH) % 5 - 1  # -1: unlabelled
        torch.manual_seed(0)
        seen = ClassCondition({"null_class_id": 4}, dropout_prob=0.3).for_training({"class_labels": labels})
        torch.manual_seed(0)
        dropped = torch.rand(BATCH) < 0.3
        assert 0 < dropped.sum() < BATCH
        assert seen.extra_channels is None
        assert torch.equal(seen.kwargs["class_labels"], torch.where(dropped | (labels == -1), 4, labels))

    def test_no_label_is_dropped_without_a_null_class(self):
        labels = torch.arange(BATCH)
        seen = ClassCondition({}, dropout_prob=1.0).for_training({"class_labels": labels})
        assert torch.equal(seen.kwargs["class_labels"], labels)

    @pytest.mark.parametrize("is_masked", [True, False])
    def test_stored_captions_become_the_empty_one(self, is_masked):
        stored = {"caption_states": torch.randn(BATCH, 3, 8)}
        empty = {"caption_states": torch.full((3, 8), 7.0)}
        if is_masked:
            stored["caption_mask"], empty["caption_mask"] = torch.ones(BATCH, 3).long(), torch.tensor([1, 0, 0])
        torch.manual_seed(0)
        seen = TextCondition(TEXT_UNET, empty_caption=empty, dropout_prob=0.5).for_training(stored)
        torch.manual_seed(0)
        dropped = torch.rand(BATCH) < 0.5
        expected = torch.where(dropped[:, None, None], 7.0, stored["caption_states"])
        assert torch.equal(seen.kwargs["encoder_hidden_states"], expected)
        mask = seen.kwargs["encoder_attention_mask"]
        assert torch.equal(mask.sum(dim=1), torch.where(dropped, 1, 3)) if is_masked else mask is None

    @pytest.mark.parametrize("embedding_dim", [None, 16])
    def test_low_resolution_images_are_noised_if_the_level_is_known(self, embedding_dim):
        scheduler = LearnedVarianceDDPMScheduler(num_train_timesteps=100)
        condition = LowResolutionCondition(
            {"time_cond_proj_dim": embedding_dim}, scheduler, low_res_size=4, max_noise_level=30
        )
        large = images()
        torch.manual_seed(0)
        seen = condition.for_training({"images": large})
        small = ((F.avg_pool2d(((large + 1) * 127.5).round(), 2) + 0.5).floor() / 127.5 - 1).double()
        if embedding_dim is not None:
            torch.manual_seed(0)
            levels, noise = torch.randint(31, (BATCH,)), torch.randn(BATCH, 3, 4, 4)
            alpha = torch.cat([torch.ones(1), scheduler.alphas_cumprod])[levels].double()[:, None, None, None]
            small = alpha.sqrt() * small + (1 - alpha).sqrt() * noise
            embedding = get_timestep_embedding(levels, embedding_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
            assert torch.equal(seen.kwargs.pop("timestep_cond"), embedding)
        assert not seen.kwargs
        expected = F.interpolate(small, (8, 8), mode="bilinear", align_corners=False)
        torch.testing.assert_close(seen.extra_channels.double(), expected, rtol=0, atol=1e-5)

    def test_the_kept_part_and_its_mask(self):
        mask = torch.rand(BATCH, 1, 8, 8) < 0.5
        seen = InpaintingCondition().for_training({"images": images(), "keep_mask": mask.float()})
        assert torch.equal(seen.extra_channels[:, :3], images().where(mask, 0.0))
        assert torch.equal(seen.extra_channels[:, 3:], mask.float())

    def test_control_images_become_black(self):
        control = torch.rand(BATCH, 3, 8, 8)
        torch.manual_seed(0)
        seen = ControlNetCondition(dropout_prob=0.2).for_training({"conditions": control})
        torch.manual_seed(0)
        dropped = torch.rand(BATCH) < 0.2
        assert torch.equal(seen.kwargs["controlnet_cond"], control * ~dropped[:, None, None, None])

    def test_random_numbers_are_drawn_in_the_order_of_the_conditions(self):
        batch = {"class_labels": torch.zeros(BATCH).long(), "conditions": torch.ones(BATCH, 1, 1, 1)}
        conditions = [ClassCondition({"null_class_id": 1}, dropout_prob=0.5), ControlNetCondition(dropout_prob=0.5)]
        torch.manual_seed(0)
        seen = merge(condition.for_training(batch) for condition in conditions).kwargs
        torch.manual_seed(0)
        assert torch.equal(seen["class_labels"] == 1, torch.rand(BATCH) < 0.5)
        assert torch.equal(seen["controlnet_cond"].flatten() == 0, torch.rand(BATCH) < 0.5)


class TestMerging:
    def test_channels_in_order_and_nested_arguments(self):
        first = UNetInputs({"a": 1, "added_cond_kwargs": {"text_embeds": 2}}, torch.zeros(1, 1, 2, 2))
        second = UNetInputs({"added_cond_kwargs": {"image_embeds": 3}}, torch.ones(1, 2, 2, 2))
        merged = merge([first, UNetInputs(), second])
        assert merged.kwargs == {"a": 1, "added_cond_kwargs": {"text_embeds": 2, "image_embeds": 3}}
        assert merged.extra_channels[0, :, 0, 0].tolist() == [0, 1, 1]
        assert first.kwargs["added_cond_kwargs"] == {"text_embeds": 2}

    def test_one_argument_of_two_conditions_is_refused(self):
        with pytest.raises(ValueError, match="Two conditions give the U-Net `class_labels`"):
            merge([UNetInputs({"class_labels": 1}), UNetInputs({"class_labels": 2})])

    def test_guidance_needs_a_difference_and_an_unconditional_input_of_all(self):
        label, null = torch.tensor([1]), torch.tensor([0])
        droppable = PreparedCondition(UNetInputs({"class_labels": label}), UNetInputs({"class_labels": null}))
        kept = PreparedCondition.same_in_both(UNetInputs({"timestep_cond": label}, torch.zeros(1, 1, 2, 2)))
        merged = MergedConditions([Stub(droppable), Stub(kept)], None)
        assert merged.inputs("conditional").kwargs == {"class_labels": label, "timestep_cond": label}
        assert merged.inputs("unconditional").kwargs == {"class_labels": null, "timestep_cond": label}
        both = merged.inputs("both")
        assert {name: value.tolist() for name, value in both.kwargs.items()} == {
            "class_labels": [0, 1],
            "timestep_cond": [1, 1],
        }
        assert both.extra_channels.shape == (2, 1, 2, 2)
        assert merged.inputs("both") is both  # concatenated once
        assert MergedConditions([Stub(kept)], None).unconditional is None
        unknown = Stub(PreparedCondition(UNetInputs(), None))
        assert MergedConditions([Stub(droppable), unknown], None).unconditional is None

    def test_arguments_of_each_step_are_added(self):
        merged = MergedConditions([Stub(PreparedCondition.same_in_both(UNetInputs({"a": None})))], None)
        arguments = ("x", "step", merged, "conditional")
        assert merged.kwargs_at("x", "step", "conditional") == {"a": None, "residual": arguments}

    def test_nested_and_missing_inputs_of_both_passes(self):
        passes = [
            UNetInputs({"mask": None, "added_cond_kwargs": {"text_embeds": torch.full((2, 1), i)}}) for i in (0, 1)
        ]
        both = concatenate(*passes)
        assert both.kwargs["mask"] is None
        assert both.extra_channels is None
        assert both.kwargs["added_cond_kwargs"]["text_embeds"].flatten().tolist() == [0, 0, 1, 1]


class Stub(Condition):
    def __init__(self, prepared: PreparedCondition):
        super().__init__()
        self.prepared = prepared

    def prepare(self, call):
        return self.prepared

    def at_step(self, *args):
        return {"residual": args}


def test_unknown_prediction_types_are_refused():
    one = torch.ones(1, 1, 1, 1)
    for function in (shift_prediction, exact_prediction):
        with pytest.raises(ValueError, match="`prediction_type` is 'velocity'; it must be one of"):
            function(one, one, one[0, 0, 0, 0], one[0, 0, 0, 0], "velocity")
