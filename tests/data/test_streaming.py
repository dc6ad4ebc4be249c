"""Streamed data: their order, their examples, and positions in them. Ids are in the first channel of the images."""

import collections
import io
import tarfile

import datasets
import pytest
import torch
from shards import CLASSES, stream_arguments, write_shards

from diffusers_adm.data.columns import load_image_dataset
from diffusers_adm.data.images import ImageDataset
from diffusers_adm.data.labels import read_class_names
from diffusers_adm.data.skipped import SkipReport
from diffusers_adm.data.stream_order import ShuffleBuffer, StreamOrder
from diffusers_adm.data.streaming import StreamDataset, count_rows, open_stream


SIZES = [5, 0, 9, 3, 12, 7, 1, 8]  # 45 rows


def open_shards(folder, kind="parquet", sizes=SIZES, **options):
    pattern = write_shards(folder / "shards", sizes, kind, **options)
    class_names = CLASSES if kind == "tar" or options.get("named_classes") is False else None
    return open_stream(**stream_arguments(pattern), cache_dir=str(folder / "cache"), class_names=class_names)


def stream(source, process=0, num_processes=1, num_lanes=1, batch_size=2, buffer_size=6, seed=1, **options):
    order = StreamOrder(source.sizes, seed, batch_size, num_processes, num_lanes, buffer_size)
    images = ImageDataset(source.sample(), 8, seed=seed, **options)
    return StreamDataset(source, order, images, process)


def batches(dataset, num_workers=0, epoch=0, first_batch=0):
    dataset.set_epoch(epoch)
    dataset.first_batch = first_batch
    loader = torch.utils.data.DataLoader(dataset, batch_size=dataset.order.batch_size, num_workers=num_workers)
    return list(loader)


def ids(found):
    """Ids in the batches."""
    return [((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for batch in found]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_shards(tmp_path_factory.mktemp("parquet"))


# 1. Order


@pytest.mark.parametrize("num_processes, num_lanes, batch_size", [(1, 1, 1), (2, 2, 3), (3, 4, 2), (5, 1, 4)])
def test_the_lanes_of_an_epoch_share_all_rows_but_an_incomplete_batch(num_processes, num_lanes, batch_size):
    order = StreamOrder(SIZES, 0, batch_size, num_processes, num_lanes, buffer_size=4)
    found = []
    for process in range(num_processes):
        lengths = [len(order.lane(process, lane)) for lane in range(num_lanes)]
        assert sum(lengths) == order.num_batches * batch_size
        # As many batches as the loader takes from each lane in turn.
        counts = collections.Counter(batch % num_lanes for batch in range(order.num_batches))
        assert lengths == [counts[lane] * batch_size for lane in range(num_lanes)]
        for lane in range(num_lanes):
            positions = list(order.buffer(3, process, lane))
            assert sorted(positions) == list(order.lane(process, lane))
            found += positions
    assert sorted(found) == list(range(45 - 45 % (num_processes * batch_size)))


def test_rows_follow_the_shuffled_shards():
    order = StreamOrder(SIZES, 0, 1)
    for epoch in range(3):
        expected = [(shard, row) for shard in order.shards(epoch) for row in range(SIZES[shard])]
        for first, last in [(0, 45), (7, 31), (44, 45), (20, 20)]:
            found = [(r.shard, row) for r in order.rows(epoch, first, last) for row in range(r.first, r.last)]
            assert found == expected[first:last]
    assert len({tuple(order.shards(epoch)) for epoch in range(5)}) == 5


def test_a_buffer_mixes_as_far_as_it_reaches_and_can_be_found_again():
    whole = list(ShuffleBuffer(100, 1100, 50, seed=3))
    assert sorted(whole) == list(range(100, 1100))
    # What comes at place i was read by then.
    assert all(position <= 100 + place + 50 for place, position in enumerate(whole))
    mean_shift = sum(abs(position - 100 - place) for place, position in enumerate(whole)) / 1000
    assert 25 < mean_shift < 75
    order = StreamOrder([1000], 3, 1, buffer_size=50)
    assert list(order.buffer(2, 0, 0, skipped=700)) == list(order.buffer(2, 0, 0))[700:]
    assert list(ShuffleBuffer(5, 9, 1, seed=0)) == [5, 6, 7, 8]


# 2. Examples


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_examples_are_those_of_a_dataset_that_is_read_at_random(tmp_path, kind):
    """Pixels, crop, flip, class and caption, by the number of the row."""
    options = {"center_crop": False, "random_flip": True}
    shards = open_shards(tmp_path, kind, size=(12, 10))
    if kind == "tar":  # the same images
        pattern = write_shards(tmp_path / "parquet", SIZES, size=(12, 10))
    else:
        pattern = str(tmp_path / "shards" / "*.parquet")
    expected, id2label = load_image_dataset(
        data_files=[pattern], label_column="label", cache_dir=str(tmp_path / "cache")
    )
    assert shards.id2label == id2label
    expected = ImageDataset(expected, 8, seed=1, **options)
    for epoch in range(2):
        expected.set_epoch(epoch)
        for batch in batches(stream(shards, **options), epoch=epoch):
            for images, label in zip(batch["images"], batch["class_labels"], strict=True):
                index = round((float(images[0, 0, 0]) + 1) * 127.5)
                assert torch.equal(images, expected[index]["images"])
                assert label == expected[index]["class_labels"] == index % 3


def test_an_epoch_of_two_processes_and_two_workers_has_each_image_once(source):
    for epoch in range(2):
        seen = []
        for process in range(2):
            found = batches(stream(source, process, 2, num_lanes=2), num_workers=2, epoch=epoch)
            assert len(found) == 11
            seen += sum(ids(found), [])
        assert len(seen) == len(set(seen)) == 44  # of 45: one is left over
    assert ids(batches(stream(source), epoch=0)) != ids(batches(stream(source), epoch=1))


def test_examples_can_be_named_by_their_index(source):
    dataset = stream(source)
    for batch in batches(dataset):
        assert batch["index"].tolist() == ids([batch])[0]
    assert dataset.name_of(4) == "row 4 of 000.parquet"
    assert dataset.name_of(5) == "row 0 of 002.parquet"  # the one between is empty
    assert dataset.name_of(44) == "row 7 of 007.parquet"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_batch_can_be_the_first_one(source, num_workers):
    whole = batches(stream(source, num_lanes=2), num_workers)
    for first in (0, 1, 4, 7, 21, 22):
        assert_same(batches(stream(source, num_lanes=2), num_workers, first_batch=first), whole[first:])


def test_the_number_of_workers_does_not_matter_if_it_divides_the_lanes(source):
    whole = batches(stream(source, num_lanes=2))
    assert_same(batches(stream(source, num_lanes=2), num_workers=1), whole)
    assert_same(batches(stream(source, num_lanes=2), num_workers=2), whole)
    with pytest.raises(ValueError, match="3 workers cannot share 2 lanes"):
        batches(stream(source, num_lanes=2), num_workers=3)


def test_images_that_cannot_be_used_are_named_and_replaced(tmp_path, caplog):
    """Also the last ones of a lane, and at any position."""
    faulty = {3, 4, 20, 44}
    shards = open_shards(tmp_path, faulty=faulty)
    whole = []
    for epoch in range(3):
        skips = SkipReport(tmp_path / "run")
        dataset = stream(shards, num_lanes=2, skips=skips)
        found = batches(dataset, epoch=epoch)
        assert len(found) == 22
        seen = collections.Counter(sum(ids(found), []))
        # Each usable image once, but one that is left over; images in the place of faulty ones twice.
        assert set(seen) <= set(range(45)) - faulty
        assert len(seen) >= 40
        assert sum(seen.values()) == 44
        for first in (5, 21):
            assert_same(batches(dataset, epoch=epoch, first_batch=first), found[first:])
        whole += found
    (reason, names), *others = skips.read().items()
    assert reason == "unreadable"
    assert not others
    assert sorted(names) == [
        "row 3 of 000.parquet (3.png)",
        "row 3 of 004.parquet (20.png)",
        "row 4 of 000.parquet (4.png)",
        "row 7 of 007.parquet (44.png)",
    ]
    assert skips.summary() == "4 images: 4 unreadable"
    assert "row 3 of 004.parquet (20.png) is unreadable" in caplog.text


def test_data_without_any_usable_image_end_with_a_sentence(tmp_path):
    shards = open_shards(tmp_path, faulty=range(45))
    with pytest.raises(RuntimeError, match="45 examples in a row of .*parquet cannot be used"):
        batches(stream(shards, skips=SkipReport(tmp_path)))


def test_small_images_are_left_out(tmp_path):
    shards = open_shards(tmp_path, size=(6, 8))
    with pytest.raises(RuntimeError, match="cannot be used"):
        batches(stream(shards, skips=SkipReport(tmp_path), smallest=(8, 8)))
    assert set(SkipReport(tmp_path).read()) == {"too small"}


# 3. Shards


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_rows_are_counted_once_and_again_after_a_change(tmp_path, kind):
    shards = open_shards(tmp_path, kind, sizes=[3, 4, 2])
    assert shards.sizes == [3, 4, 2]
    (cache,) = (tmp_path / "cache").glob("rows-of-shards-*.json")
    cache.write_text("[3, 4, 5]")  # is read
    assert count_rows(shards.files, str(tmp_path / "cache")) == [3, 4, 5]
    write_shards(tmp_path / "shards", [3, 6, 2], kind)
    assert count_rows(shards.files, str(tmp_path / "cache")) == [3, 6, 2]


def test_tars_are_grouped_as_datasets_does(tmp_path):
    """Names with several dots, folders, hidden files, and files without an ending."""
    names = ["a/1.png", "a/1.txt", "a/2.png", "a/2.txt", ".hidden.png", "README", "b/2.png", "b/2.txt"]
    names += ["b/3.png", "b/3.txt", "b/4.png", "b/4.txt", "b/5.png", "b/5.txt", "b/6.x.y.png", "b/6.png", "a/1.txt"]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    files = {"train": str(tmp_path / "x.tar")}
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True).decode(False)
    count = sum(1 for batch in rows.iter(batch_size=1))
    assert count_rows([files["train"]], str(tmp_path)) == [count] == [8]


def test_facts_tell_shards_apart_wherever_they_are(tmp_path):
    facts = [open_shards(tmp_path / name, sizes=sizes).facts() for name, sizes in (("a", [3, 4]), ("b", [3, 4]))]
    assert facts[0] == facts[1]
    assert facts[0] != open_shards(tmp_path / "c", sizes=[4, 3]).facts()


def test_shards_that_change_meanwhile_end_the_run(tmp_path):
    shards = open_shards(tmp_path, sizes=[6])
    write_shards(tmp_path / "shards", [4])
    with pytest.raises(RuntimeError, match="000.parquet has 4 rows, and had 6 when they were counted"):
        batches(stream(shards))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"data_files": ["x.zip"]}, "all names must end with .parquet"),
        ({"data_files": ["a.tar", "b.parquet"]}, "all names must end with .parquet"),
        ({"data_files": ["missing/*.parquet"]}, "`data_files` cannot be found|has no files"),
        ({"data_files": None}, "got neither"),
        ({"split": "train\\[:5\\]"}, "has the splits train. With `streaming`, name a whole one"),
        ({"image_column": "png"}, "`image_column` is 'png', but .* has the columns image, label, text"),
        ({"image_column": "text"}, "`image_column` 'text' of .* is of type Value"),
        ({"caption_column": "label"}, "`caption_column` 'label' of .* which is not text"),
        ({"label_column": "text"}, "does not name the classes.*--class_names FILE"),
        ({"label_column": None, "class_names": ["a"]}, "`class_names` was given without `label_column`"),
        ({"class_names": ["a", "b", "c"]}, "`class_names` lists 'a', 'b', 'c', but .* names 'cat', 'dog', 'fox'"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, changes, sentence):
    pattern = write_shards(tmp_path / "shards", [2])
    with pytest.raises(ValueError, match=sentence):
        open_stream(**{**stream_arguments(pattern), "cache_dir": str(tmp_path), **changes})


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_dataset_is_streamed_by_its_name(tmp_path, kind):
    """A local copy, which is read as one on the Hub."""
    pattern = write_shards(tmp_path / "copy" / "train", SIZES, kind)
    arguments = stream_arguments(pattern) | {"data_files": None, "dataset_name": str(tmp_path / "copy")}
    shards = open_stream(**arguments, class_names=CLASSES, cache_dir=str(tmp_path / "cache"))
    assert shards.sizes == SIZES
    assert sorted(sum(ids(batches(stream(shards, batch_size=5))), [])) == list(range(45))
    with pytest.raises(ValueError, match="`split` is 'test', but .* has the splits train"):
        open_stream(**arguments, class_names=CLASSES, cache_dir=str(tmp_path / "cache"), split="test")


def test_a_dataset_of_other_files_is_refused(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "train.csv").write_text("image\na.png\n")
    with pytest.raises(ValueError, match="holds neither parquet files nor WebDataset tars, which `streaming` reads"):
        open_stream(dataset_name=str(tmp_path / "copy"), cache_dir=str(tmp_path / "cache"))


def test_a_damaged_shard_is_named(tmp_path):
    pattern = write_shards(tmp_path / "shards", [2, 2])
    file = tmp_path / "shards" / "001.parquet"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="001.parquet cannot be read as parquet"):
        open_stream(**stream_arguments(pattern), cache_dir=str(tmp_path))


def test_labels_get_the_numbers_of_given_names(tmp_path):
    shards = open_shards(tmp_path, named_classes=False)
    assert shards.id2label == {0: "cat", 1: "dog", 2: "fox"}
    raw = {"image": None, "text": None, "label": 2}
    assert shards.example(raw, 0, 0)["label"] == 2
    assert shards.example({**raw, "label": "dog"}, 0, 0)["label"] == 1
    assert shards.example({**raw, "label": -1}, 0, 0) == {
        "image": None,
        "label": -1,
        "caption": "",
        "row": "0 of 000.parquet",
    }
    for wrong in (3, "cow", 0.5):
        with pytest.raises(Exception, match="is none of the 3 classes"):
            shards.example({**raw, "label": wrong}, 0, 0)
    shards.rows_of_classes = {0: 7, 1: 0, 2: 1}
    assert shards.example(raw, 0, 0)["label"] == 1
    shards.allow_unlabelled = False
    with pytest.raises(Exception, match="unlabelled examples are not allowed"):
        shards.example({**raw, "label": None}, 0, 0)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.txt", "x\ny\n", ["x", "y"]),
        ("a.json", '["x"]', ["x"]),
        ("id2label.json", '{"1": "b", "0": "a"}', ["a", "b"]),
    ],
)
def test_class_names_are_read(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert read_class_names(tmp_path / name) == expected


@pytest.mark.parametrize(
    "name, text", [("a.txt", ""), ("a.txt", "x\nx"), ("a.json", "{"), ("a.json", "3"), ("a.txt", "x\n\ny")]
)
def test_wrong_class_names_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="`class_names`"):
        read_class_names(tmp_path / name)
