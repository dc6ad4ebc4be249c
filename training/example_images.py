#!/usr/bin/env python
"""
Makes small data sets of images that are not 8-bit RGB, to try the commands of docs/your_own_images.md:

    python training/example_images.py --kind scans --output_dir runs/data/scans

- `scans`: slices of a head as in magnetic resonance imaging. 16-bit PNG files, grey, with 12-bit values.
- `bands`: fields, forest, soil and water from above. TIFF files, five bands (blue, green, red, red edge, near
  infrared), surface reflectance times 10000 in 16 bits.
- `vorticity`: vorticity of a turbulent flow in 1/s: random Fourier modes with a known spectrum, and a mean of zero.
  `.npy` files of 32-bit floating point numbers, or one parquet file.
- `spectrograms`: chirps of birds, 64 frequencies x 256 frames. 8-bit PNG files, 0 to 255 for -80 to 0 dB.

The images are drawn from simple distributions, and an image depends only on the seed and its number. The package is
not needed, but NumPy, Pillow and, for TIFF and parquet files, tifffile and pyarrow.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


BANDS = ("blue", "green", "red", "red edge", "near infrared")
# Typical reflectance of the bands in percent. That of plants lies between soil and leaves, by the share of leaves.
WATER, SOIL, LEAVES = [6, 5, 3, 2, 1], [9, 13, 18, 21, 25], [3, 6, 3, 18, 45]
# Spectrum of the enstrophy, k**-2 from the lowest wave number on, cut off at this one. Mean square of the vorticity.
MAX_WAVE_NUMBER, VORTICITY_STD = 8, 12.0
SAMPLE_RATE, DECIBEL_RANGE = 22050, 80.0


# 1. One image of each kind


def draw_scan(rng: np.random.Generator, size: int) -> np.ndarray:
    """A slice of a head: skin and fat, skull, grey and white matter, ventricles; noise of a magnitude image."""
    fine = 4 * size  # drawn at four times the size, so that edges are smooth
    y, x = np.mgrid[-1 : 1 : fine * 1j, -1 : 1 : fine * 1j]
    angle = rng.normal(0, 0.12)
    x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    x, y = x - rng.normal(0, 0.03), y - rng.normal(0, 0.03)
    width, length = rng.uniform(0.68, 0.8), rng.uniform(0.84, 0.94)
    radius, direction = np.hypot(x / width, y / length), np.arctan2(y / length, x / width)

    def waves(frequencies: range, scale: float) -> np.ndarray:
        """A smooth random function of the direction."""
        return sum(scale / n**0.5 * rng.normal() * np.cos(n * direction + rng.uniform(0, 7)) for n in frequencies)

    image = np.zeros_like(x)
    image[radius < 1] = 2900  # fat
    image[radius < 0.91] = 260  # skull
    image[radius < 0.83] = 1150  # grey matter
    folds = 0.68 + waves(range(9, 17), 0.07)
    image[(radius < np.minimum(folds, 0.79)) & (np.abs(x) > 0.025)] = 2000  # white matter of two hemispheres
    ventricle = rng.uniform(0.09, 0.17)
    for side in (-1, 1):
        bend = x - side * (0.10 + 0.35 * (y - 0.05) ** 2)
        image[(bend / (0.55 * ventricle)) ** 2 + (y / (2.4 * ventricle)) ** 2 < 1] = 420
    image = image.reshape(size, 4, size, 4).mean(axis=(1, 3))
    # Uneven sensitivity of the coils, and the magnitude of a complex signal with noise.
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    image *= rng.uniform(0.85, 1.05) * (1 + 0.12 * (rng.normal() * x + rng.normal() * y))
    noise = rng.normal(0, 35, (2, size, size))
    return np.hypot(image + noise[0], noise[1]).round().clip(0, 4095).astype(np.uint16)


def draw_bands(rng: np.random.Generator, size: int) -> np.ndarray:
    """Land from above: a mosaic of fields in rows, patches of forest, and often water. Five correlated bands."""
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    angle = rng.uniform(0, np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    # Fields: strips with borders at random places, each strip cut again.
    strip = np.floor((across + 2) * 3.2 + rng.uniform(0, 1)).astype(int)
    field = np.floor((along + 2) * 2.2 + rng.uniform(0, 1, 64)[strip]).astype(int)
    leaves = rng.beta(0.7, 0.7, (64, 64))[strip, field]
    leaves = leaves + 0.06 * smooth_noise(rng, size, 3)
    forest = smooth_noise(rng, size, 2.5) > 1.0
    leaves = np.where(forest, 0.8 + 0.05 * smooth_noise(rng, size, 1), leaves).clip(0, 1)[..., None]
    reflectance = leaves * np.array(LEAVES) + (1 - leaves) * np.array(SOIL)
    reflectance[forest] *= 0.7  # shadows of the crowns
    river = np.abs(across - rng.uniform(-0.3, 1.3) - 0.08 * np.sin(5 * along + rng.uniform(0, 7))) < 0.06
    reflectance[river] = WATER
    reflectance *= 1 + 0.04 * smooth_noise(rng, size, 4)[..., None]
    reflectance += rng.normal(0, 0.25, reflectance.shape)
    return (100 * reflectance).round().clip(0, 10000).astype(np.uint16)


def draw_vorticity(rng: np.random.Generator, size: int) -> np.ndarray:
    """A periodic Gaussian random field with the spectrum k**-2 up to `MAX_WAVE_NUMBER`."""
    wave_number = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(size, 1 / size)]))
    power = np.zeros_like(wave_number)
    inside = (wave_number > 0) & (wave_number <= MAX_WAVE_NUMBER)
    power[inside] = wave_number[inside] ** -3.0  # a ring has about 2 pi k modes, so the spectrum of the rings is k**-2
    power *= VORTICITY_STD**2 / power.sum()
    noise = np.fft.fft2(rng.normal(size=(size, size)))  # of white noise: all modes have the variance size**2
    return np.fft.ifft2(noise * np.sqrt(power) * size).real.astype(np.float32)


def draw_spectrogram(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Power of a short-time Fourier transform of two to five syllables of chirps over background noise, in 8 bits."""
    window_length, hop = 2 * height, height // 2
    time = np.arange(hop * (width - 1) + window_length) / SAMPLE_RATE
    sound = 0.002 * rng.normal(size=time.shape)
    syllables = rng.integers(2, 6)
    for number in range(syllables):
        length = rng.uniform(0.1, 0.25) * time[-1]
        start = (number + rng.uniform(0.15, 0.5)) / syllables * time[-1]
        progress = (time - start) / length
        envelope = np.where((progress > 0) & (progress < 1), np.sin(np.pi * progress.clip(0, 1)) ** 2, 0)
        low, high = rng.uniform(1500, 3000), rng.uniform(3500, 6000)
        bend, trill = rng.choice([-1.0, 1.0]), rng.uniform(0, 300)
        frequency = low + (high - low) * (0.5 + 0.5 * bend * (2 * progress.clip(0, 1) - 1))
        frequency = frequency + trill * np.sin(2 * np.pi * 25 * time)
        phase = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
        sound += 10 ** rng.uniform(-0.8, 0) * envelope * (np.sin(phase) + 0.1 * np.sin(2 * phase))
    frames = np.lib.stride_tricks.sliding_window_view(sound, window_length)[::hop]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(window_length), axis=1))[:, 1:].T[::-1]  # high ones at the top
    decibel = 20 * np.log10(spectrum / (window_length / 4) + 1e-9)
    return ((decibel / DECIBEL_RANGE + 1) * 255).round().clip(0, 255).astype(np.uint8)


def smooth_noise(rng: np.random.Generator, size: int, blur: float) -> np.ndarray:
    """Gaussian noise, blurred with this standard deviation in 1/32 of the image; mean 0, standard deviation 1."""
    frequencies = np.meshgrid(*2 * [np.fft.fftfreq(size)])
    transfer = np.exp(-2 * (np.pi * blur * size / 32) ** 2 * (frequencies[0] ** 2 + frequencies[1] ** 2))
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * transfer).real
    return (noise - noise.mean()) / noise.std()


# 2. Files


def write_tiff(path: Path, image: np.ndarray) -> None:
    import tifffile

    tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig")


def write_png(path: Path, image: np.ndarray) -> None:
    Image.fromarray(image).save(path)  # uint16 arrays become 16-bit PNG files


def write_parquet(path: Path, images: list[np.ndarray]) -> None:
    """One file with the column `image` of nested lists."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": [image.tolist() for image in images]}), path)


# The function that draws an image of a size, the size, the ending of its files, the function that writes one.
Kind = tuple[Callable[..., np.ndarray], tuple[int, ...], str, Callable[[Path, np.ndarray], None]]
KINDS: dict[str, Kind] = {
    "scans": (draw_scan, (32,), "png", write_png),
    "bands": (draw_bands, (32,), "tif", write_tiff),
    "vorticity": (draw_vorticity, (32,), "npy", np.save),
    "spectrograms": (draw_spectrogram, (64, 256), "png", write_png),
}


def make_images(kind: str, num_images: int, seed: int = 0, size: int | None = None) -> list[np.ndarray]:
    """The first images of a kind. `size`: the side of square ones, in place of 32."""
    draw, shape, _, _ = KINDS[kind]
    if size is not None:
        if len(shape) > 1:
            raise SystemExit(f"error: `size` is {size}, but {kind} are not square. Omit it.")
        shape = (size,)
    number = list(KINDS).index(kind)
    return [draw(np.random.default_rng((seed, number, index)), *shape) for index in range(num_images)]


def save_images(kind: str, folder: Path, images: list[np.ndarray]) -> None:
    """Writes files `00000` and so on with the ending of the kind."""
    _, _, ending, write = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        write(folder / f"{index:05}.{ending}", image)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", required=True, choices=KINDS)
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder of the images.")
    parser.add_argument("--num_images", type=int, default=1000, help="Number of images.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed.")
    parser.add_argument("--size", type=int, help="Side of square images in pixels (32).")
    parser.add_argument(
        "--parquet", action="store_true", help="Write images.parquet, with nested lists, instead of a file per image."
    )
    args = parser.parse_args(argv)
    images = make_images(args.kind, args.num_images, args.seed, args.size)
    if args.parquet:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_parquet(args.output_dir / "images.parquet", images)
    else:
        save_images(args.kind, args.output_dir, images)
    values = np.stack(images)
    print(f"{len(images)} images {images[0].shape}, {values.dtype}, {values.min():g} to {values.max():g}")


if __name__ == "__main__":
    main()
