"""
Adds the keywords of Unicode CLDR to sets of emoji, so that "flame" and "hot" find the fire as well: it writes parquet
files with the column `captions`, a list of texts for each image.

    python data/emoji_keywords.py join data/noto-emoji-64/train.parquet train.parquet \\
        --held_out data/noto-emoji-64/test.parquet
    python training/train_adm.py --data_files train.parquet --caption_column captions ...

The captions are the name of the emoji in the set, its name in CLDR and its keywords, in lower case. Those of a skin
tone variant are those of the emoji without a skin tone, each followed by the skin tone: "wave, dark skin tone".

With `--familiar data/popular.txt`, emoji of that list also have its other words for them, three times each; with
`--only_familiar` the file has no other rows, to be listed several times in the data of a training.

The keywords are in data/emoji-keywords, which was made from the npm package `emojibase-data`, version 17.0.0, and from
the embedded sets with code points:

    curl -O https://registry.npmjs.org/emojibase-data/-/emojibase-data-17.0.0.tgz
    python data/emoji_keywords.py make emojibase-data-17.0.0.tgz data/emoji-keywords \\
        --names noto-emoji-64-train.parquet noto-emoji-64-test.parquet
"""

import argparse
import json
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value


FOLDER = Path(__file__).parent / "emoji-keywords"
MEMBER = "package/en/data.json"  # of the archive
VARIATION_SELECTOR = "FE0F"  # asks for the colour image of a character; sets and CLDR differ in where they write it
PLAIN = str.maketrans({"“": None, "”": None, "–": "-"})  # characters of CLDR that the names of the sets do not have
SKIN_TONES = re.compile(r"(?:, (?:light|medium-light|medium|medium-dark|dark) skin tone)+$")
REGIONAL_INDICATOR = "regional indicator"
FAMILIAR_REPEATS = 3  # of the other words for familiar emoji


# 1. The tables: keywords by code points, code points by name


def normalize(code_points: str) -> str:
    """Code points as in `1F9D1-200D-2696`: upper case, without variation selectors."""
    return "-".join(part for part in code_points.upper().split("-") if part != VARIATION_SELECTOR)


def split_name(name: str) -> tuple[str, str]:
    """The name of an emoji without its skin tones, and these, if any: `("waving hand", ", dark skin tone")`."""
    match = SKIN_TONES.search(name)
    return (name[: match.start()], match[0]) if match else (name, "")


def make_keywords(emoji: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """
    Keywords by normalized code points, from the entries of emojibase's `data.json`: the name in CLDR first, each one
    once, in lower case and without quotation marks. Skin tone variants have no entry.
    """
    keywords = {}
    for entry in emoji:
        if not entry["label"].startswith(REGIONAL_INDICATOR):
            words = [text.lower().translate(PLAIN) for text in (entry["label"], *entry.get("tags", ()))]
            keywords[normalize(entry["hexcode"])] = list(dict.fromkeys(words))
    return dict(sorted(keywords.items()))


def make_names(paths: Sequence[Path]) -> dict[str, str]:
    """Normalized code points by name without skin tones, from sets with the columns `text` and `unified`."""
    names: dict[str, str] = {}
    for path in paths:
        for row in pq.read_table(path, columns=["text", "unified"]).to_pylist():
            name, code_points = split_name(row["text"])[0], normalize(row["unified"])
            # One name in the sets stands for two emoji: the longer sequence says more ("man in tuxedo").
            names[name] = max(names.get(name, ""), code_points, key=len)
    return dict(sorted(names.items()))


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """JSON with one line for each entry."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read_table(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


# 2. The captions of a set


def find_code_points(table: pa.Table, names: Mapping[str, str]) -> list[str | None]:
    """Normalized code points of each row without skin tones: from the column `unified`, or else from the name."""
    if "unified" in table.column_names:
        return [normalize(text) for text in table["unified"].to_pylist()]
    return [names.get(split_name(text)[0]) for text in table["text"].to_pylist()]


def make_captions(name: str, keywords: Sequence[str], name_repeats: int = 1) -> list[str]:
    """The name `name_repeats` times, then the keywords with the skin tones of the name, without the name."""
    base, tones = split_name(name)
    return [name] * name_repeats + [word + tones for word in keywords if word != base]


def read_words(path: Path) -> dict[str, list[str]]:
    """Other words by name, from lines such as `automobile, car`; lines with # are comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    names = [[word.strip() for word in line.split(",")] for line in lines if line.strip() and not line.startswith("#")]
    return {name: words for name, *words in names}


def join(
    source: Path,
    target: Path,
    held_out: Path | None = None,
    name_repeats: int = 1,
    familiar: Path | None = None,
    only_familiar: bool = False,
) -> tuple[list[list[str]], list[str]]:
    """
    Writes the rows of `source` with the column `captions` to `target`. The captions of a row come from the entry of its
    own code points; a row without an entry has only its name.

    Args:
        source (`Path`), target (`Path`): Parquet files. `source` has the column `text`, and `unified` if its names are
            not those of the embedded sets.
        held_out (`Path`, *optional*): A set for evaluation. None of its emoji, in any skin tone, may be in `source`,
            and none of their names is a caption: a keyword of one emoji may be the name of another.
        name_repeats (`int`, defaults to 1): How many times the name is in each list, so that it is drawn more often
            than each keyword.
        familiar (`Path`, *optional*): A list such as `data/popular.txt`, whose other words for an emoji become captions
            of it, `FAMILIAR_REPEATS` times each.
        only_familiar (`bool`, defaults to `False`): Whether to write no rows but those of emoji in `familiar`.

    Returns:
        `tuple` of the captions of each row and the names of the rows without an entry.

    Raises:
        ValueError: If `source` and `held_out` share an emoji.
    """
    keywords, names = read_table("keywords"), read_table("names")
    table = pq.read_table(source)
    code_points, texts = find_code_points(table, names), table["text"].to_pylist()
    held_out_names: set[str] = set()
    if held_out is not None:
        other = pq.read_table(held_out, columns=[n for n in pq.read_schema(held_out).names if n in ("text", "unified")])
        held_out_points = {point for point in find_code_points(other, names) if point}
        shared = sorted({name for name, point in zip(texts, code_points, strict=True) if point in held_out_points})
        if shared:
            raise ValueError(
                f"{len(shared)} emoji of {source} are also in {held_out}, such as {shared[0]!r}. Remove them from one "
                "of the two."
            )
        held_out_names = {split_name(text)[0] for text in other["text"].to_pylist()}
        held_out_names |= {keywords[point][0] for point in held_out_points if point in keywords}
    own = [[word for word in keywords.get(point, ()) if word not in held_out_names] for point in code_points]
    captions = [make_captions(name, words, name_repeats) for name, words in zip(texts, own, strict=True)]
    other_words = {} if familiar is None else read_words(familiar)
    for name, found in zip(texts, captions, strict=True):
        found += other_words.get(name, []) * FAMILIAR_REPEATS
    if only_familiar:
        rows = [row for row, name in enumerate(texts) if name in other_words]
        table, texts = table.take(rows), [texts[row] for row in rows]
        captions, code_points = [captions[row] for row in rows], [code_points[row] for row in rows]
    features = Features({**Features.from_arrow_schema(table.schema), "captions": List(Value("string"))})
    table = pa.table([*table.columns, pa.array(captions)], schema=features.arrow_schema)
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, target, compression="none")
    return captions, [name for name, point in zip(texts, code_points, strict=True) if point not in keywords]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("join", help="add the column `captions` to a set of emoji")
    command.add_argument("source", type=Path, help="parquet file with the column text, and unified if it has it")
    command.add_argument("target", type=Path, help="parquet file to write")
    command.add_argument("--held_out", type=Path, help="parquet file of the emoji kept for evaluation")
    command.add_argument("--name_repeats", type=int, default=1, help="times that the name is in each list")
    command.add_argument("--familiar", type=Path, help="list of emoji with other words for them, as data/popular.txt")
    command.add_argument("--only_familiar", action="store_true", help="write the rows of that list only")
    command = commands.add_parser("make", help="make the tables of data/emoji-keywords")
    command.add_argument("archive", type=Path, help="the npm package emojibase-data, a .tgz file")
    command.add_argument("folder", type=Path, help="folder to write")
    command.add_argument("--names", type=Path, nargs="+", required=True, help="parquet files with text and unified")
    args = parser.parse_args(argv)
    if args.command == "make":
        with tarfile.open(args.archive) as archive:
            emoji = json.load(archive.extractfile(MEMBER))
        for name, table in (("keywords", make_keywords(emoji)), ("names", make_names(args.names))):
            write_table(args.folder / f"{name}.json", table)
            print(f"{args.folder / name}.json: {len(table)} entries")
    else:
        if args.name_repeats < 1:
            parser.error(f"--name_repeats is {args.name_repeats}. Pass at least 1.")
        if args.only_familiar and args.familiar is None:
            parser.error("--only_familiar needs --familiar, the list of these emoji.")
        captions, without = join(
            args.source, args.target, args.held_out, args.name_repeats, args.familiar, args.only_familiar
        )
        mean = sum(map(len, captions)) / len(captions)
        distinct = len({text for texts in captions for text in texts})
        print(f"{args.target}: {len(captions)} emoji with {mean:.1f} captions each, {distinct} distinct ones")
        print(f"{len(without)} emoji have no keywords" + (f": {', '.join(without)}" if without else ""))


if __name__ == "__main__":
    main()
