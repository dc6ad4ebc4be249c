"""EMA: the weights that train come back, whatever happens in between."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from diffusers_adm.training.ema import ema_weights


@pytest.fixture(params=[False, True], ids=["loop", "foreach"])
def model_and_ema(request):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    ema = EMAModel(model.parameters(), decay=0.5, foreach=request.param)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        ema.step(model.parameters())
    return model, ema


def copies(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def assert_equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_averages_inside_and_trained_weights_after(model_and_ema):
    model, ema = model_and_ema
    trained, averages = copies(model.parameters()), copies(ema.shadow_params)
    assert not torch.equal(trained[0], averages[0])
    with ema_weights(ema, model.parameters()):  # a generator
        assert_equal(model.parameters(), averages)
    assert_equal(model.parameters(), trained)
    assert_equal(ema.shadow_params, averages)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions(model_and_ema, error):
    model, ema = model_and_ema
    trained = copies(model.parameters())
    with pytest.raises(error, match="validation failed"), ema_weights(ema, model.parameters()):
        raise error("validation failed")
    assert_equal(model.parameters(), trained)
    with ema_weights(ema, model.parameters()):
        pass
    assert_equal(model.parameters(), trained)


def test_nesting_is_refused_and_leaves_the_trained_weights(model_and_ema):
    model, ema = model_and_ema
    trained = copies(model.parameters())
    with (
        pytest.raises(RuntimeError, match="cannot be nested"),
        ema_weights(ema, model.parameters()),
        ema_weights(ema, model.parameters()),
    ):
        pass
    assert_equal(model.parameters(), trained)
