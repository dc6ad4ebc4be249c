"""Slerp and text diffs against closed forms on the circle, and on the vectors for which they are undefined."""

import math

import numpy as np
import pytest
import torch

from diffusers_adm.conditioning.interpolation import check_weights, slerp, text_diff


def on_circle(degrees: float, norm: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    angle = math.radians(degrees)
    return torch.tensor([[norm * math.cos(angle), norm * math.sin(angle), 0.0]], dtype=dtype)


class TestSlerp:
    @pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 0.9, 1.0])
    def test_turns_at_constant_speed(self, weight):
        found = slerp(on_circle(10, norm=2), on_circle(110, norm=4), weight)
        torch.testing.assert_close(found, on_circle(10 + 100 * weight, norm=2 + 2 * weight), atol=1e-12, rtol=0)

    def test_a_weight_for_each_row(self):
        start, end = on_circle(0).expand(3, -1), on_circle(90).expand(3, -1)
        found = slerp(start, end, torch.tensor([0.0, 0.5, 1.0]))
        torch.testing.assert_close(found, torch.cat([on_circle(x) for x in (0, 45, 90)]), atol=1e-12, rtol=0)

    def test_equal_directions(self):
        vector = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(slerp(vector, vector, 0.3), vector, atol=1e-15, rtol=0)
        torch.testing.assert_close(slerp(vector, 3 * vector, 0.5), 2 * vector, atol=1e-14, rtol=0)

    def test_nearly_equal_directions(self):
        found = slerp(on_circle(0), on_circle(0.004), 0.5)
        torch.testing.assert_close(found, on_circle(0.002), atol=1e-9, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_opposite_directions(self, dtype):
        start = torch.tensor([[3.0, 0.0, 4.0]], dtype=dtype)
        path = torch.cat([slerp(start, -start, weight) for weight in (0.0, 0.25, 0.5, 0.75, 1.0)])
        torch.testing.assert_close(path.norm(dim=1), torch.full((5,), 5.0, dtype=dtype))
        cosines = path @ start[0] / 25
        expected = torch.tensor([math.cos(x * math.pi / 4) for x in range(5)], dtype=dtype)
        torch.testing.assert_close(cosines, expected, atol=1e-6, rtol=0)
        assert path.isfinite().all()

    def test_zero_has_no_direction(self):
        torch.testing.assert_close(
            slerp(torch.zeros(1, 2), torch.tensor([[2.0, 4.0]]), 0.25)[0], torch.tensor([0.5, 1])
        )
        assert torch.equal(slerp(torch.zeros(1, 2), torch.zeros(1, 2), 0.5), torch.zeros(1, 2))

    def test_rows_of_a_batch_do_not_depend_on_each_other(self):
        a = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        b = torch.stack([a[0], -a[1], 2 * a[2], torch.randn(6, generator=torch.Generator().manual_seed(2))])
        together = slerp(a, b, 0.4)
        for row in range(4):
            torch.testing.assert_close(together[row : row + 1], slerp(a[row : row + 1], b[row : row + 1], 0.4))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        # Sums of squares of such norms overflow in float16, were they computed in it.
        a, b = (600 * torch.randn(2, 64, generator=torch.Generator().manual_seed(n)) for n in range(2))
        found = slerp(a.to(dtype), b.to(dtype), 0.5)
        assert found.dtype == dtype
        expected = slerp(a.to(dtype).double(), b.to(dtype).double(), 0.5)
        # One rounding of the result: half of 2**-10 or 2**-7 of the largest value.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, atol=0, rtol=eps)

    def test_noise_keeps_its_shape_and_norm(self):
        a, b = (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(2))
        middle = slerp(a, b, 0.5)
        assert middle.shape == a.shape
        torch.testing.assert_close(middle.norm(), (a.norm() + b.norm()) / 2)


class TestTextDiff:
    def test_is_the_formula_of_the_paper_with_the_norm_of_the_image(self):
        image, source, target = on_circle(0, norm=7), on_circle(90, norm=2), on_circle(180, norm=5)
        # (target - source) / |...| lies at 225 degrees, 135 from the image by the shorter way, and backwards.
        found = text_diff(image, source, target, 1 / 3)
        torch.testing.assert_close(found, on_circle(-45, norm=7), atol=1e-12, rtol=0)

    def test_strength_0_is_the_image(self):
        image = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
        source, target = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(text_diff(image, source, target, 0.0), image)

    def test_one_pair_of_texts_for_all_images(self):
        images = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        source, target = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1))
        found = text_diff(images, source, target, torch.tensor([0.1, 0.2, 0.3]))
        for row, strength in enumerate((0.1, 0.2, 0.3)):
            torch.testing.assert_close(found[row], text_diff(images[row : row + 1], source, target, strength)[0])

    def test_equal_texts_have_no_direction(self):
        with pytest.raises(ValueError, match="no direction between them"):
            text_diff(on_circle(0), on_circle(30), on_circle(30, norm=4), 0.5)


@pytest.mark.parametrize("weights", [-0.1, 1.5, float("nan"), [0.0, 2.0], "0.5", torch.tensor([0.5, -1.0]), None])
def test_weights_outside_of_0_and_1_are_refused(weights):
    with pytest.raises(ValueError, match=r"`weights` holds .* must lie in \[0, 1\]"):
        check_weights("weights", weights)


def test_weights_as_a_list():
    assert check_weights("weights", 0.5) == [0.5]
    assert check_weights("weights", (0, 1)) == [0.0, 1.0]
    assert check_weights("weights", torch.tensor([0.0, 1.0])) == [0.0, 1.0]
    assert check_weights("weights", np.linspace(0, 1, 3)) == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="`weights` is empty"):
        check_weights("weights", [])
