"""Embeddings of emoji by a CLIP of toy size, in a folder as `encode_embeddings` leaves it."""

import datasets
from runs import flags
from toy_models import WORDS

from diffusers_adm.data import encode_embeddings


def write_emoji_captions(path, source, count=None):
    """A parquet file of emoji with a column `captions`: lists of none, one or two texts of `WORDS`."""
    data = datasets.load_dataset("parquet", data_files=str(source), split="train")
    data = data if count is None else data.select(range(count))
    words = [f"{WORDS[index % 10]} {WORDS[index // 10 % 10]}" for index in range(len(data))]
    lists = [[[], [text], [text, f"a {text}"]][index % 3] for index, text in enumerate(words)]
    data = data.add_column("captions", lists, feature=datasets.List(datasets.Value("string")))
    data.to_parquet(str(path))
    return str(path)


def save_embeddings(folder, clip, data_files, **arguments):
    """The folder, of the images in a parquet file."""
    given = {"clip": clip, "data_files": data_files, "output_dir": folder, **arguments}
    encode_embeddings.main(flags(**{name: value for name, value in given.items() if value is not None}))
    return str(folder)
