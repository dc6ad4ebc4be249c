"""
Finding damage in checkpoints: the manifest with the size and hash of each file, and the structure of file formats.

`manifest.json` is the last file that is written to a checkpoint. A file that is missing, or whose bytes are others than
those that were written, is found by it. Checkpoints of earlier versions have no manifest: in those, the structure shows
files that were cut short or emptied, but not changed bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .run_state import PICKLE_SUFFIXES


MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
HASHING_THREADS = 4  # hashing releases Python's lock; a disk rarely delivers more than four threads hash


def write_manifest(folder: str | os.PathLike) -> None:
    """Writes sizes (bytes) and SHA-256 hashes of all files in `folder` and its subfolders as its `manifest.json`."""
    names = [name for name in _file_names(folder) if name != MANIFEST_NAME]
    files = [Path(folder, name) for name in names]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = list(pool.map(_hash_file, files))
    entries = {
        name: {"size": file.stat().st_size, "sha256": digest}
        for name, file, digest in zip(names, files, hashes, strict=True)
    }
    text = json.dumps({"version": MANIFEST_VERSION, "files": entries}, indent=2)
    with open(Path(folder, MANIFEST_NAME), "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: str | os.PathLike, hashes: bool = True) -> str | None:
    """
    Compares a checkpoint with its manifest, and looks at the structure of its files.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint. Files that its manifest does not name are ignored.
        hashes (`bool`, defaults to `True`): Also compare the hashes, which reads all of its bytes once. Files are
            hashed in several threads, without being loaded into memory.

    Returns:
        `str`: The file and its fault in words; None if there is none.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        damaged = (Path(folder, name) for name in _file_names(folder) if _is_damaged(Path(folder, name)))
        file = next(damaged, None)
        return None if file is None else f"{file} ({file.stat().st_size:,} bytes) is damaged"
    try:
        content = json.loads(manifest.read_bytes())
        sizes = {name: int(entry["size"]) for name, entry in content["files"].items()}
        expected = {name: str(entry["sha256"]) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} ({manifest.stat().st_size:,} bytes) is damaged"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} ({file.stat().st_size:,} bytes) is damaged: {size:,} bytes were written"
    if hashes:
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            for name, digest in zip(expected, pool.map(_hash_file, (folder / name for name in expected)), strict=True):
                if digest != expected[name]:
                    file = folder / name
                    return f"{file} ({file.stat().st_size:,} bytes) is damaged: its SHA-256 hash is another one"
    return None


def _hash_file(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _file_names(folder: str | os.PathLike) -> list[str]:
    """The files of a folder, relative to it and with forward slashes, sorted."""
    return sorted(file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file())


def _is_damaged(file: Path) -> bool:
    """Whether a file of a checkpoint was cut short or emptied, by the structure of its format."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # compares the size of the file with that of its tensors
                return False
        if file.suffix == ".json":
            json.loads(file.read_bytes())
    except (SafetensorError, ValueError):  # ValueError also for bytes that are not text
        return True
    if file.suffix in PICKLE_SUFFIXES:
        return not zipfile.is_zipfile(file)  # `torch.save` writes zip files, whose directory is at the end
    return file.suffix == ".yaml" and file.stat().st_size == 0
