"""Checks of arguments that count something."""

import numpy as np
import pytest

from diffusers_adm.ops.integers import check_integer


@pytest.mark.parametrize("value", [2, 7, np.int64(2)])
def test_integers_pass(value):
    check_integer("factor", value, 2)


@pytest.mark.parametrize("value", [1, -3, 2.0, "2", None])
def test_others_are_refused(value):
    with pytest.raises(ValueError, match=f"`factor` is {value!r}; pass an integer of at least 2 of pixels"):
        check_integer("factor", value, 2, " of pixels")
