"""Hostile values for arguments, and what a call may do with them: work, or refuse in words."""

import math

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image


REFUSALS = (ValueError, TypeError, ImportError)
HUGE = 10**9

NUMBERS = [
    0, 1, 2, -1, 3, 10, HUGE, -HUGE, 10**30, True, False,
    0.0, 1.0, 0.5, -0.5, 1.5, 2.0, 1e-30, 1e30, 1e300, math.nan, math.inf, -math.inf, 1j,
    np.float32(0.5), np.float64(math.nan), np.int64(2), np.bool_(True),
]  # fmt: skip
OTHERS = [
    None, "", "x", "0", "a cat", "ddim2", "2,2", "pil", "np", "pt", "latent", "\0", "é" * 1000, b"", b"x",
    object(), int, print, ..., {}, {"a": 1}, set(), range(2),
    [], (), [None], [0], [1, 1], [0, "x"], ["a", "b"], [["a"]], [math.nan], [0.5, 0.5], [True], ["\ud800"], [HUGE],
]  # fmt: skip


def _nan(*shape: int) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor.view(-1)[0] = math.nan
    return tensor


def _arrays() -> list:
    tensors = [
        torch.tensor(0), torch.tensor(0.5), torch.tensor(math.nan), torch.tensor([]), torch.zeros(1), torch.zeros(2),
        torch.zeros(0, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 4, 4),
        torch.zeros(3, 8, 8), torch.zeros(3, 4, 4), torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 4, 4), _nan(1, 3, 8, 8),
        _nan(1, 3, 4, 4), torch.full((1, 3, 8, 8), math.inf), torch.full((1, 3, 8, 8), 1e30), torch.zeros(8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1, 3, 8, 8, dtype=torch.float16),
        torch.zeros(1, 3, 8, 8, dtype=torch.complex64), torch.zeros(1, 3, 8, 8, dtype=torch.bool),
        torch.zeros(1, 3, 8, 8, dtype=torch.int64), torch.zeros(1, 3, 8, 8, device="meta"),
        torch.zeros(1, 3, 8, 8).to_sparse(), torch.zeros(1, 3, 8, 8, requires_grad=True), torch.zeros(1, 3, 7, 9),
        torch.zeros(1, 12, 16), torch.zeros(1, 16), torch.zeros(2, 16), _nan(1, 16), _nan(1, 12, 16),
        torch.zeros(1, 12),
        torch.ones(1, 12, dtype=torch.long), torch.zeros(2, 12, 16), torch.zeros(1, 5, 16), torch.zeros(0, 12, 16),
        torch.zeros(1, 0, 16), torch.full((1, 12), math.nan), torch.full((1, 16), 1e38), torch.zeros(1, 3, 8, 8, 8),
        torch.tensor([1, 2]), torch.tensor([-1]), torch.tensor([True]), torch.tensor(2**40),
    ]  # fmt: skip
    arrays = [
        np.zeros((8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 8, 3)),
        np.full((8, 8, 3), np.nan), np.full((8, 8, 3), 7.0), np.zeros((8, 8)), np.zeros((2, 8, 8, 3)), np.array("x"),
        np.array([None, 1]), np.zeros((8, 8, 3), complex), np.array(0), np.zeros(3),
        np.zeros((8, 8, 3), "datetime64[s]"),
        np.zeros((8, 8, 3), np.longdouble), np.zeros((8, 8, 3), np.uint64), np.zeros((8, 8, 3), bool),
    ]  # fmt: skip
    return tensors + arrays


def _images() -> list:
    images = [
        Image.new(mode, (8, 8))
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16")
    ]
    images += [Image.new("RGB", size) for size in ((1, 1), (4, 4), (0, 0), (16, 8), (8, 0))]
    return [*images, [Image.new("RGB", (8, 8)), None], [Image.new("RGB", (8, 8)), Image.new("RGB", (4, 4))], [[]]]


def _generators() -> list:
    used = torch.Generator().manual_seed(0)
    return [used, [used], [used, used], [used, None], (used,), [None], type(used)]


VALUES = [*NUMBERS, *OTHERS, *_arrays(), *_images(), *_generators()]
ANYTHING = st.one_of(
    st.sampled_from(VALUES),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(-2, 6), st.floats(), st.text(max_size=3), st.none()), max_size=3),
)


def check_refusal(error: Exception) -> str:
    assert str(error).strip(), f"{type(error).__name__} without a message"
    return "refused"


def all_finite(values: object) -> bool:
    if isinstance(values, torch.Tensor):
        return bool(values.isfinite().all())
    if isinstance(values, (np.ndarray, np.generic, float)):
        return bool(np.isfinite(values).all())
    if isinstance(values, dict):
        values = list(values.values())
    return all(map(all_finite, values)) if isinstance(values, (list, tuple)) else True
