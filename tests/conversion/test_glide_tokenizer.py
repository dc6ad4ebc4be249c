"""GLIDE's tokenizer, with a small vocabulary of its kind, against byte pairs in plain Python."""

import gzip
import json
import random
import unicodedata

import pytest
import regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from diffusers_adm.conversion import load_glide_tokenizer


LENGTH = 24
# Where GPT-2's code cuts.
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
TRAINING = [
    "a corgi in a field, don't you'll we've it's",
    "the the the cat is on the mat 1234 1990",
    "είναι οδος σίσυφος",
    "привет мир",
    "😀😀 日本語 👍🏽",
]
STRINGS = [
    *("", "a", " ", "  ", "   a   b  ", "\t\n a\r\n\tb", "line\nbreak\n\n", "\n \n \n", "trailing   ", "   leading"),
    *("a\u00a0b\u2003c\u3000d\u200bz", "a\x1cb\x1fc", "a\x85b", "\x00\x01\x7f\x80", "\u2028\u2029a", "\ufeffbom"),
    *("I'M DON'T WE'RE they'LL you'VE he'D it'S 's 'S", "'''''", "''s 'sS", "a's's's", "quotes “x” ‘y’ «z»", "—–-"),
    *("1234567890 ½ ² ٣٤ Ⅷ 万", "x²+y³=z⁴", "3rd 2nd", "$100,000.00 @user #tag", "!!!???...---___", "१२३ हिन्दी"),
    *("e\u0301 é Å A\u030a", "a\u0300\u0301\u0302", "\u0300alone", "soft\u00adhyphen", "ʼn", "Ĳ ĳ", "ﬁ ﬀ", "ẞ ß SS"),
    *("😀", "👩‍👩‍👧‍👦 family", "🏳️‍🌈🏴󠁧󠁢󠁥󠁮󠁧󠁿", "👍🏽", "🇩🇪", "zero\u200bwidth", "\u180e\u200d", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙"),
    *(
        "שלום עולם",
        "مرحبا بالعالم 123",
        "日本語のテキスト",
        "한국어 텍스트",
        "中文字符，标点。",
        "mixed日本and한국",
        "ไทย ภาษา",
    ),
    *("ΟΔΟΣ", "ΣΊΣΥΦΟΣ ΣΑΣ", "Σ", "ΑΣ'Σ", "ΑΣ. ΒΣ", "A\u0301Σ", "ΑΣ\u0301", "ΑΣ\u0345Β", "ΣΣ ΣΣ", "ʰΣ", "1Σ", "AʰΣʰ b"),
    *(
        "İstanbul IĞDIR ı",
        "i̇",
        "ǅ ǈ Ǆ",
        "ĀĒĪ ŠČŽ ŁÓDŹ",
        "Привет МИР",
        "ᾼ ῼ ᾈ",
        "Ω Å K",
        "ΩΜΈΓΑ",
        "Dž",
        "CamelCaseHTTPServer",
    ),
    *("<|endoftext|>", "a <|endoftext|> b", "<|ENDOFTEXT|>", "x" * 500, "the " * 300, "a corgi in a field", "A Corgi."),
]


@pytest.fixture(scope="module")
def vocabulary():
    """Tokens by their numbers, and pairs: all bytes, about a hundred merges of them, and the end."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=456, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TRAINING * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    return {**model["vocab"], "<|endoftext|>": len(model["vocab"])}, [tuple(pair) for pair in model["merges"]]


@pytest.fixture(scope="module")
def folder(vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tokens, pairs = vocabulary
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]))
    return folder


def byte_letters():
    """GPT-2's letter for each byte: itself where it can be seen, else one of those from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(unseen)}


def encode(text, vocabulary):
    """Numbers and mask by definition: of all pairs side by side, the one that was learned first is joined first."""
    tokens, pairs = vocabulary
    ranks, letters, numbers = {pair: i for i, pair in enumerate(pairs)}, byte_letters(), []
    for word in WORDS.findall(text.lower()):
        parts = [letters[byte] for byte in word.encode()]
        while True:
            known = [ranks[pair] for pair in zip(parts, parts[1:], strict=False) if pair in ranks]
            if not known:
                break
            first, second = pairs[min(known)]
            joined, i = [], 0
            while i < len(parts):
                is_pair = parts[i : i + 2] == [first, second]
                joined.append(first + second if is_pair else parts[i])
                i += 2 if is_pair else 1
            parts = joined
        numbers += [tokens[part] for part in parts]
    numbers = numbers[:LENGTH]
    padding = LENGTH - len(numbers)
    return numbers + [len(tokens) - 1] * padding, [1] * len(numbers) + [0] * padding


def random_strings(number):
    letters = "abcABC  '\t\n123ΣσςİıéÉ日한😀👍🏽\u200d\u0301שم.,!?<|>_-\u00a0sStTdDmMlLvVeErR"
    generator = random.Random(0)
    return ["".join(generator.choice(letters) for _ in range(generator.randint(1, 30))) for _ in range(number)]


def check(tokenizer, vocabulary, strings):
    encoded = tokenizer(strings, padding="max_length", truncation=True)
    for text, ids, mask in zip(strings, encoded["input_ids"], encoded["attention_mask"], strict=True):
        assert (ids, mask) == encode(text, vocabulary), repr(text)


class TestTokens:
    def test_of_difficult_strings(self, folder, vocabulary):
        tokenizer = load_glide_tokenizer(folder, LENGTH)
        check(tokenizer, vocabulary, STRINGS + random_strings(300))
        assert len({tuple(encode(text, vocabulary)[0]) for text in STRINGS}) > 70  # or it could not fail

    def test_after_saving_and_loading(self, folder, vocabulary, tmp_path):
        load_glide_tokenizer(folder, LENGTH).save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        check(tokenizer, vocabulary, STRINGS)
        assert len(tokenizer) == len(vocabulary[0]) == tokenizer.pad_token_id + 1
        assert tokenizer.model_max_length == LENGTH
        assert tokenizer.num_special_tokens_to_add() == 0

    def test_of_every_letter_that_has_another_case(self, folder, vocabulary):
        """Those of Unicode's that Python knows: newer ones are made small by the tokenizer alone."""
        changed = [chr(code) for code in range(0x20000) if chr(code).lower() != chr(code)]
        assert len(changed) > 1300
        check(load_glide_tokenizer(folder, LENGTH), vocabulary, [f"a {letter}b" for letter in changed])

    def test_of_every_kind_of_character(self, folder, vocabulary):
        """Three of each of Unicode's categories, before and behind letters and spaces."""
        by_category = {}
        for code in [*range(0x3100), *range(0xF900, 0x10000), *range(0x1F600, 0x1F650)]:
            by_category.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
        del by_category["Cn"]  # not assigned: other versions of Unicode know them
        assert len(by_category) > 25
        letters = [letter for known in by_category.values() for letter in {known[0], known[len(known) // 2], known[-1]}]
        check(load_glide_tokenizer(folder, LENGTH), vocabulary, [f"a{c}{c}b {c}1 {c} {c}" for c in letters])

    def test_what_gpt2s_own_tokenizer_gives_is_something_else(self, vocabulary):
        """Without small letters, and with an end in the text."""
        tokens, pairs = vocabulary
        backend = Tokenizer(models.BPE(vocab=tokens, merges=pairs))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<|endoftext|>", model_max_length=LENGTH
        )
        for text in ("A Corgi.", "a <|endoftext|> b"):
            with pytest.raises(AssertionError):
                check(tokenizer, vocabulary, [text])


class TestSources:
    @pytest.mark.parametrize(
        "names",
        [
            ("vocab.json", "merges.txt"),
            ("encoder.json", "vocab.bpe"),
            ("encoder.json.gz", "vocab.bpe.gz"),
        ],
    )
    def test_files(self, folder, vocabulary, tmp_path, names):
        for name, source in zip(names, ("vocab.json", "merges.txt"), strict=True):
            data = (folder / source).read_bytes()
            (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        check(load_glide_tokenizer(tmp_path, LENGTH), vocabulary, STRINGS[:40])

    def test_a_tokenizer_of_transformers(self, vocabulary, tmp_path):
        tokens, pairs = vocabulary
        backend = Tokenizer(models.BPE(vocab=tokens, merges=pairs))
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(tmp_path)
        check(load_glide_tokenizer(str(tmp_path), LENGTH), vocabulary, STRINGS)

    def test_default_length(self, folder):
        assert load_glide_tokenizer(folder).model_max_length == 128

    def test_bad_input(self, folder, vocabulary, tmp_path):
        with pytest.raises(ValueError, match="holds neither a tokenizer nor vocab.json and merges.txt or"):
            load_glide_tokenizer(tmp_path / "absent")
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path / "words")
        with pytest.raises(ValueError, match="not a byte-pair tokenizer like"):
            load_glide_tokenizer(tmp_path / "words")
        for name, content, message in (
            ("vocab.json", "{", "vocab.json and merges.txt in .* cannot be read"),
            (
                "vocab.json",
                json.dumps(vocabulary[0] | {"!!": 9999}),
                "tokens of .* are not numbered from 0 without gaps",
            ),
            ("merges.txt", "#version: 0.2\na b c\n", "not a vocabulary and pairs of its tokens"),
            ("merges.txt", "a zzz\n", "not a vocabulary and pairs of its tokens"),
        ):
            broken = tmp_path / "broken"
            broken.mkdir(exist_ok=True)
            for file in ("vocab.json", "merges.txt"):
                (broken / file).write_bytes((folder / file).read_bytes())
            (broken / name).write_text(content)
            with pytest.raises(ValueError, match=message):
                load_glide_tokenizer(broken)
