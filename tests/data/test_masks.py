"""Random masks: their shares and shapes, and that nothing but seed, epoch and example decides about them."""

import random
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_adm.training import MASK_SHARES, ImageDataset, InpaintingDataset, random_keep_mask


def masks(number, kind=None, resolution=16, seed=0):
    generator = random.Random(seed)
    return torch.stack([random_keep_mask(resolution, generator, kind) for _ in range(number)])


def is_half(keep_mask):
    """All unknown pixels are on one side of a line, and fill it."""
    rows, columns = keep_mask[0].bool().all(1), keep_mask[0].bool().all(0)
    by_rows = torch.equal(keep_mask[0].bool(), rows[:, None].expand(keep_mask.shape[1:]))
    by_columns = torch.equal(keep_mask[0].bool(), columns[None].expand(keep_mask.shape[1:]))
    changes = (rows if by_rows else columns).int().diff().abs().sum()
    return (by_rows or by_columns) and changes == 1


class TestRandomKeepMask:
    @pytest.mark.parametrize("kind", [*MASK_SHARES, None])
    @pytest.mark.parametrize("resolution", [1, 2, 7, 32])
    def test_values_and_shape(self, kind, resolution):
        keep_mask = masks(40, kind, resolution)
        assert keep_mask.shape == (40, 1, resolution, resolution)
        assert keep_mask.dtype == torch.float32
        assert keep_mask.unique().tolist() in ([0.0], [0.0, 1.0])
        assert (keep_mask == 0).flatten(1).any(dim=1).all()  # there is always something to inpaint

    @pytest.mark.parametrize("kind", [*MASK_SHARES, None])
    def test_height_and_width(self, kind):
        """Boxes and halves scale with both sides."""
        keep_mask = masks(300, kind, (8, 40))
        assert keep_mask.shape == (300, 1, 8, 40)
        masked = keep_mask == 0
        assert masked.flatten(1).any(dim=1).all()
        heights, widths = masked.any(dim=3).sum(dim=2).flatten(), masked.any(dim=2).sum(dim=2).flatten()
        if kind == "half":
            assert all(is_half(each) for each in keep_mask)
            assert set(heights[widths == 40].tolist()) <= set(range(2, 7))  # 0.3 to 0.7 of 8
            assert set(widths[heights == 8].tolist()) == set(range(12, 29))  # of 40
        elif kind == "boxes":
            assert (heights.min(), widths.min()) == (2, 8)  # 0.2 of both
        elif kind == "strokes":
            assert widths.double().mean() > heights.double().mean()

    def test_kinds(self):
        assert (masks(3, "full") == 0).all()
        halves = masks(200, "half", 20)
        assert all(is_half(keep_mask) for keep_mask in halves)
        # The four sides, and shares of unknown pixels around a half.
        corners = Counter(
            tuple(int(keep_mask[0, y, x]) for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))) for keep_mask in halves
        )
        assert set(corners) == {(0, 1, 0, 1), (1, 0, 1, 0), (0, 0, 1, 1), (1, 1, 0, 0)}
        shares = 1 - halves.mean(dim=(1, 2, 3))
        assert 0.3 - 1e-6 <= shares.min() < 0.4  # means of float32
        assert 0.6 < shares.max() <= 0.7 + 1e-6
        for kind in ("boxes", "strokes"):
            shares = 1 - masks(300, kind, 32).mean(dim=(1, 2, 3))
            assert shares.min() < 0.1
            assert shares.max() > 0.5
            assert shares.max() < 1
            assert not any(is_half(keep_mask) for keep_mask in masks(20, kind, 32))

    def test_a_single_box_is_a_rectangle(self, monkeypatch):
        monkeypatch.setattr("diffusers_adm.data.masks.MAX_BOXES", 1)
        for keep_mask in masks(50, "boxes", 20):
            ys, xs = torch.where(keep_mask[0] == 0)
            height, width = int(ys.max() - ys.min()) + 1, int(xs.max() - xs.min()) + 1
            assert len(ys) == height * width
            assert 4 <= height <= 14
            assert 4 <= width <= 14

    def test_a_stroke_hangs_together(self, monkeypatch):
        monkeypatch.setattr("diffusers_adm.data.masks.MAX_STROKES", 1)
        for keep_mask in masks(30, "strokes", 24):
            unknown = {tuple(place) for place in torch.nonzero(keep_mask[0] == 0).tolist()}
            reached, frontier = set(), [next(iter(unknown))]
            while frontier:
                y, x = frontier.pop()
                if (y, x) in unknown and (y, x) not in reached:
                    reached.add((y, x))
                    frontier += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            assert reached == unknown

    def test_shares_of_the_kinds(self, monkeypatch):
        """Full ones and halves can be told from the others."""
        assert sum(MASK_SHARES.values()) == pytest.approx(1)
        keep_mask = masks(2000, resolution=24)
        full = (keep_mask == 0).flatten(1).all(dim=1).double().mean()
        half = np.mean([is_half(each) for each in keep_mask])
        for share, expected in ((full, MASK_SHARES["full"]), (half, MASK_SHARES["half"])):
            assert abs(share - expected) < 4 * (expected * (1 - expected) / len(keep_mask)) ** 0.5

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="`kind` is 'circle'; it must be one of"):
            random_keep_mask(8, random.Random(0), "circle")


class TestDataset:
    @pytest.fixture
    def images(self):
        colours = [(10 * i, 255 - 10 * i, 7) for i in range(12)]
        return datasets.Dataset.from_dict(
            {"image": [Image.new("RGB", (16, 16), colour) for colour in colours], "label": list(range(12))},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
        )

    def test_masks_are_added_to_the_examples(self, images):
        plain, masked = ImageDataset(images, 16, seed=3), InpaintingDataset(images, 16, seed=3)
        for index in range(len(images)):
            example = dict(masked[index])
            assert example.pop("keep_mask").shape == (1, 16, 16)
            assert example.keys() == plain[index].keys()
            assert all(torch.equal(example[name], value) for name, value in plain[index].items())

    def test_masks_combine_with_conditions(self, images):
        example = InpaintingDataset(images, 16, condition="low_resolution")[0]
        assert set(example) == {"images", "class_labels", "conditions", "index", "keep_mask"}

    def test_seed_epoch_and_example_decide(self, images):
        def all_masks(seed=0, epoch=0):
            dataset = InpaintingDataset(images, 16, seed=seed)
            dataset.set_epoch(epoch)
            return torch.stack([dataset[index]["keep_mask"] for index in reversed(range(len(images)))])

        random.seed(1)
        first = all_masks()
        random.seed(2)
        assert torch.equal(first, all_masks())
        assert not torch.equal(first, all_masks(seed=1))
        assert not torch.equal(first, all_masks(epoch=1))
        assert len({tuple(keep_mask.flatten().tolist()) for keep_mask in first}) > 6

    def test_workers_give_the_same(self, images):
        dataset = InpaintingDataset(images, 16)
        loader = torch.utils.data.DataLoader(dataset, batch_size=6, num_workers=2)
        batches = torch.cat([batch["keep_mask"] for batch in loader])
        assert torch.equal(batches, torch.stack([dataset[index]["keep_mask"] for index in range(len(images))]))
