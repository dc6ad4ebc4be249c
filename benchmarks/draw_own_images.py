"""
Figures of docs/your_own_images.md: data and samples of the four kinds that `training/example_images.py` makes, and a
comparison of the two in values of the data.

    python benchmarks/draw_own_images.py scans --data runs/data/scans --samples runs/scans-samples --output scans.png

The folders hold the files of `training/example_images.py` and of `diffusers_adm.evaluation.sample`.
"""

from pathlib import Path

import matplotlib
import numpy as np
from measuring import make_parser
from PIL import Image


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


# Properties of the data that `training/example_images.py` makes.
NUM_BANDS, NIR, RED, GREEN = 5, 4, 2, 1
MAX_WAVE_NUMBER, VORTICITY_STD = 8, 12.0
DECIBEL_RANGE = 80.0

COLORS = {"data": "tab:blue", "samples": "tab:orange"}
SHOWN_REFLECTANCE = 0.45  # white in images of the bands


def read_image(path: Path) -> np.ndarray:
    """The values of one file: `(height, width)`, or with channels last."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix in (".tif", ".tiff"):
        import tifffile

        return tifffile.imread(path)
    with Image.open(path) as image:
        return np.array(image)


def read_folder(folder: Path) -> np.ndarray:
    """All images of a folder, or of the `samples.npz` in it."""
    if (folder / "samples.npz").exists():
        images = np.load(folder / "samples.npz", allow_pickle=False)["arr_0"]
        return images[..., 0] if images.shape[-1] == 1 else images
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".tif", ".tiff", ".npy"))
    return np.stack([read_image(path) for path in paths])


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """The first images in rows, `(rows, columns)` of them, with a border of one pixel."""
    columns = min(columns, len(images))
    rows = len(images) // columns
    padding = [(0, 0), (0, 1), (0, 1)] + [(0, 0)] * (images.ndim - 3)
    tiles = np.pad(images[: rows * columns].astype(float), padding, constant_values=np.nan)
    tiles = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)
    return tiles.reshape(rows * tiles.shape[1], columns * tiles.shape[3], *tiles.shape[4:])[:-1, :-1]


def enstrophy_spectrum(fields: np.ndarray) -> np.ndarray:
    """
    Mean square of the Fourier modes of fields `(N, size, size)`, summed over the rings of wave numbers around 0, 1,
    ..., size / 2: the parts of the mean square of the field.
    """
    size = fields.shape[-1]
    power = (np.abs(np.fft.fft2(fields) / size**2) ** 2).mean(axis=0)
    ring = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(size, 1 / size)])).round().astype(int)
    return np.bincount(ring.ravel(), power.ravel())[: size // 2 + 1]


def compare_scans(axes: plt.Axes, sets: dict[str, np.ndarray]) -> None:
    for name, images in sets.items():
        axes.hist(images.ravel(), bins=64, range=(0, 4095), density=True, histtype="step", color=COLORS[name])
    axes.set(yscale="log", xlabel="value (12 bits)", ylabel="density")


def compare_bands(axes: plt.Axes, sets: dict[str, np.ndarray]) -> None:
    for name, images in sets.items():
        nir, red = (images[..., band].astype(float) for band in (NIR, RED))
        ndvi = (nir - red) / np.maximum(nir + red, 1)
        axes.hist(ndvi.ravel(), bins=60, range=(-1, 1), density=True, histtype="step", color=COLORS[name])
        corners = np.corrcoef(images.reshape(-1, NUM_BANDS).T.astype(float))
        print(f"{name}: correlation of red and near infrared {corners[RED, NIR]:.2f}")
    axes.set(xlabel="vegetation index (NDVI)", ylabel="density")


def compare_vorticity(axes: plt.Axes, sets: dict[str, np.ndarray]) -> None:
    for name, images in sets.items():
        spectrum = enstrophy_spectrum(images)
        axes.loglog(np.arange(1, len(spectrum)), spectrum[1:], ".-", color=COLORS[name])
        largest = abs(images.mean(axis=(1, 2))).max()
        print(f"{name}: standard deviation {images.std():.2f} 1/s, mean of an image up to {largest:.2f} 1/s")
    axes.set(xlabel="wave number", ylabel="mean square in 1/s$^2$", ylim=(1e-3, 200))
    axes.axvline(MAX_WAVE_NUMBER, color="grey", lw=0.5)
    axes.set_title(f"standard deviation {VORTICITY_STD:g} 1/s; nothing above {MAX_WAVE_NUMBER}", fontsize=8)


def compare_spectrograms(axes: plt.Axes, sets: dict[str, np.ndarray]) -> None:
    for name, images in sets.items():
        decibel = (images[..., ::-1, :] / 255.0 - 1) * DECIBEL_RANGE
        axes.plot(decibel.mean(axis=(0, 2)), color=COLORS[name])
        axes.plot(np.quantile(decibel, 0.99, axis=(0, 2)), color=COLORS[name], ls=":")
    axes.set(xlabel="frequency (number from below)", ylabel="level in dB")
    axes.set_title("mean, and 99th percentile (dotted)", fontsize=8)


def show(axes: plt.Axes, kind: str, images: np.ndarray, columns: int) -> None:
    tiles = mosaic(images, columns)
    options = {
        "scans": {"cmap": "gray", "vmin": 0, "vmax": 3500},
        "vorticity": {"cmap": "RdBu_r", "vmin": -40, "vmax": 40},
        "spectrograms": {"cmap": "magma", "vmin": 0, "vmax": 255},
    }
    if kind == "bands":
        tiles = np.nan_to_num(tiles[..., [NIR, RED, GREEN]] / 10000 / SHOWN_REFLECTANCE, nan=1).clip(0, 1)
    axes.imshow(tiles, interpolation="nearest", **options.get(kind, {}))
    axes.set_axis_off()


# Images of each set, and in each row of the figure.
SHOWN = {"scans": (12, 4), "bands": (12, 4), "vorticity": (12, 4), "spectrograms": (12, 2)}
COMPARISONS = {
    "scans": compare_scans,
    "bands": compare_bands,
    "vorticity": compare_vorticity,
    "spectrograms": compare_spectrograms,
}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "output")
    parser.add_argument("kind", choices=SHOWN)
    parser.add_argument("--data", type=Path, required=True, help="Folder of the training images.")
    parser.add_argument("--samples", type=Path, required=True, help="Folder of the samples.")
    args = parser.parse_args(argv)
    sets = {"data": read_folder(args.data), "samples": read_folder(args.samples)}
    for name, images in sets.items():
        print(f"{name}: {len(images)} images {images[0].shape}, {images.dtype}, {images.min():g} to {images.max():g}")

    figure, panels = plt.subplots(1, 3, figsize=(10, 2.6), dpi=90, width_ratios=(2, 2, 1.5), layout="constrained")
    number, columns = SHOWN[args.kind]
    for axes, (name, images) in zip(panels, sets.items(), strict=False):
        show(axes, args.kind, images[:number], columns)
        axes.set_title(name, color=COLORS[name])
    COMPARISONS[args.kind](panels[2], sets)
    panels[2].tick_params(labelsize=7)
    canvas = figure.canvas
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(128, dither=Image.Dither.NONE).save(args.output)
    plt.close(figure)


if __name__ == "__main__":
    main()
