"""
The guide docs/from_vae_to_diffusion.md: its code runs as it is, and its models are as good as the page says.

The tolerances are several times the differences between seeds, so that they hold for the roundings of any processor.
"""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from markdown_pages import REPOSITORY, blocks
from PIL import Image
from scipy import stats


GUIDE = REPOSITORY / "docs" / "from_vae_to_diffusion.md"
FIGURES = ("vae_gamma", "vae_emoji", "vae_diffusion", "vae_latent_diffusion")
TRUTH = stats.gamma(2)  # density x exp(-x)


def run_guide() -> SimpleNamespace:
    """Runs all blocks, and returns their variables."""
    namespace: dict[str, object] = {"__name__": "guide"}
    for block in blocks(GUIDE):
        exec(compile(block.padded, GUIDE.name, "exec"), namespace)
    return SimpleNamespace(**namespace)


@pytest.mark.slow
@pytest.mark.draws
def test_the_guide_is_right(tmp_path, monkeypatch):
    """One test, because its parts need the variables of all blocks, which take about a minute."""
    (tmp_path / "data").symlink_to(REPOSITORY / "data")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    guide = run_guide()

    check_vae_of_gamma(guide)
    check_vae_of_emoji(guide)
    check_diffusion_of_gamma(guide)
    check_latent_diffusion(guide)
    for name in FIGURES:
        with Image.open(tmp_path / "docs" / "images" / f"{name}.png") as figure:
            assert figure.size[0] > 600
            assert len(figure.convert("RGB").getcolors(maxcolors=2**20)) > 50


def check_quantiles(samples: torch.Tensor, tolerance: float) -> None:
    """Quantiles of `samples` against those of the gamma distribution; `tolerance` is part of its standard deviation."""
    probabilities = np.array([0.01, 0.05, 0.25, 0.5, 0.75, 0.95])
    found = np.quantile(samples.double().numpy(), probabilities)
    np.testing.assert_allclose(found, TRUTH.ppf(probabilities), atol=tolerance * TRUTH.std(), rtol=0)


def check_vae_of_gamma(guide: SimpleNamespace) -> None:
    # The loss is the two terms in nats, here from their formulas.
    x = torch.tensor([[0.3], [2.0], [5.0]])
    torch.manual_seed(1)
    reconstruction, kl = guide.vae.loss_terms(x)
    torch.manual_seed(1)
    mean, log_std = guide.vae.encoder(x).chunk(2, dim=1)
    torch.testing.assert_close(kl, (0.5 * (mean**2 + (2 * log_std).exp() - 1) - log_std).mean())
    decoded_mean, decoded_log_std = guide.vae.decoder(mean + log_std.exp() * torch.randn(3, 1)).chunk(2, dim=1)
    squares = ((x - decoded_mean) / decoded_log_std.exp()) ** 2
    expected = (0.5 * squares + decoded_log_std + 0.5 * math.log(2 * math.pi)).mean()
    torch.testing.assert_close(reconstruction, expected, rtol=1e-4, atol=1e-5)

    # Training: both terms move as the page says, and their sum falls to the entropy.
    start, end = guide.history[:20].mean(dim=0), guide.history[-100:].mean(dim=0)
    assert start[1] < 0.2 < 0.7 < end[1]  # KL
    assert end[0] < start[0] - 1
    assert abs(end.sum() - TRUTH.entropy()) < 0.05

    # The learned standard deviation gives the distribution; the fixed one a blurred one, however long it is trained.
    learned, fixed = guide.excess.tolist()
    assert -0.003 < learned < 0.03  # bounded by 0, except for sampling noise
    assert 0.10 < fixed < 0.15
    assert guide.distances[0] < 0.06
    assert 0.14 < guide.distances[1] < 0.26
    assert guide.distances[2] < 0.03
    check_quantiles(guide.samples, tolerance=0.08)
    assert (guide.samples < 0).float().mean() < 0.01
    assert 0.04 < (guide.fixed_samples < 0).float().mean() < 0.08

    # The latent space: the decoder is the map of quantiles. The latent may run either way.
    probabilities = np.linspace(0.05, 0.95, 19)
    latents = torch.tensor(stats.norm.ppf(probabilities), dtype=torch.float32)[:, None]
    with torch.no_grad():
        decoded = guide.vae.decode(latents).mean[:, 0].sort().values
    np.testing.assert_allclose(decoded, TRUTH.ppf(probabilities), atol=0.4)


def check_vae_of_emoji(guide: SimpleNamespace) -> None:
    assert guide.emoji["train"].shape[1:] == (3, 16, 16)
    assert -1 <= guide.emoji["train"].min() < -0.9 < 0.9 < guide.emoji["train"].max() <= 1
    start, end = guide.image_history[:20].mean(dim=0), guide.image_history[-100:].mean(dim=0)
    assert end[0] < start[0] - 500
    assert 30 < end[1] < 80

    # The optimal standard deviation is the root of the mean squared error: the maximum of the normal likelihood.
    train, test = guide.emoji["train"], guide.emoji["test"]
    with torch.no_grad():
        error = (guide.image_vae.decode(guide.image_vae.encode(train).sample()).mean - train).square().mean().sqrt()
    assert abs(guide.image_vae.log_std.exp() / error - 1) < 0.15

    def psnr(images):
        return 10 * math.log10(4 / (images - test).square().mean())

    assert psnr(guide.reconstructions) > psnr(train.mean(dim=0)) + 5.5  # of held-out images
    blurry = guide.contrast(guide.reconstructions), guide.contrast(guide.prior_samples)
    assert max(blurry) < 0.95 * guide.contrast(test)
    # The line begins and ends with the reconstructions of its ends.
    torch.testing.assert_close(guide.between[[0, -1]], guide.reconstructions[[0, 13]], rtol=0, atol=1e-4)


def check_diffusion_of_gamma(guide: SimpleNamespace) -> None:
    mean = guide.terms.mean(dim=1)
    assert mean[0] < -1  # reconstruction: the log of a density above 1
    assert (mean[1:] > 0).all()  # KL divergences
    assert mean[-1] < 1e-4  # prior: nothing is left of the data
    assert mean[1:6].sum() > mean[6:].sum() / 2
    excess = guide.diffusion_excess.mean()
    error = guide.diffusion_excess.std() / len(guide.diffusion_excess) ** 0.5
    assert error < 0.01
    assert -3 * error < excess < 0.08
    assert excess < guide.excess[1]
    check_quantiles(guide.diffusion_samples, tolerance=0.1)
    assert (guide.diffusion_samples < 0).float().mean() < 0.02


def check_latent_diffusion(guide: SimpleNamespace) -> None:
    prior, diffusion = guide.energies
    assert 0 < diffusion < 0.6 * prior
    # Independent of the energy distance: the corners of most emoji are white, and those of good samples as well.
    corners = [
        images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean() for images in (guide.emoji["train"], guide.latent_samples)
    ]
    assert abs(corners[0] - corners[1]) < 0.15


def test_the_figures_are_small():
    text = GUIDE.read_text(encoding="utf-8")
    assert re.findall(r"\]\(images/(\w+)\.png\)", text) == list(FIGURES)
    for name in FIGURES:
        assert (REPOSITORY / "docs" / "images" / f"{name}.png").stat().st_size < 80_000
