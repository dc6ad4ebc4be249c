"""The folder of compiled code: who may write to it, and damaged entries."""

import logging
import os

import pytest

from diffusers_adm.compilation.code_cache import CODE, RECORD, CodeCache, default_cache_dir


posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


@pytest.fixture
def cache(tmp_path):
    return CodeCache(tmp_path / "compiled")


def put(cache, key="abc", code=b"code"):
    folder = cache.new_folder()
    (folder / CODE).write_bytes(code)
    return cache.put(key, folder)


def test_what_is_put_is_found(cache):
    assert cache.is_empty
    assert cache.get("abc") is None
    path = put(cache)
    assert cache.get("abc") == path
    assert path.read_bytes() == b"code"
    assert not cache.is_empty
    assert [entry.name for entry in cache.folder.iterdir()] == ["abc"]  # nothing temporary is left


def test_the_first_of_two_processes_wins(cache):
    put(cache, code=b"first")
    assert put(cache, code=b"second").read_bytes() == b"first"
    assert [entry.name for entry in cache.folder.iterdir()] == ["abc"]


@pytest.mark.parametrize("name, content", [(CODE, b"cod"), (RECORD, b"{"), (RECORD, b"[]")])
def test_a_damaged_entry_is_deleted(cache, caplog, name, content):
    put(cache)
    (cache.folder / "abc" / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert cache.get("abc") is None
    assert "is damaged" in caplog.text
    assert not (cache.folder / "abc").exists()


@posix
def test_code_that_others_can_write_is_refused(cache):
    path = put(cache)
    path.chmod(0o666)
    with pytest.raises(ValueError, match="Others can write to"):
        cache.get("abc")
    path.chmod(0o600)
    path.parent.chmod(0o770)
    with pytest.raises(ValueError, match="Others can write to"):
        cache.get("abc")
    path.parent.chmod(0o700)
    assert cache.get("abc") == path


@posix
def test_links_are_refused(cache, tmp_path):
    put(cache)
    (tmp_path / CODE).write_bytes(b"code")
    (cache.folder / "abc" / CODE).unlink()
    (cache.folder / "abc" / CODE).symlink_to(tmp_path / CODE)
    with pytest.raises(ValueError, match="is a link"):
        cache.get("abc")


@posix
def test_a_folder_that_others_can_write_is_refused(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="Others can write to"):
        CodeCache(folder)
    with pytest.raises(ValueError, match="All users can write to"):
        CodeCache(folder / "below")
    folder.chmod(0o1777)  # as that of /tmp
    CodeCache(folder / "below")


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be used.*`cache_dir`"):
        CodeCache(tmp_path / "file" / "compiled")


def test_what_a_killed_process_left_is_deleted(cache):
    old, new = cache.new_folder(), cache.new_folder()
    os.utime(old, (0, 0))
    CodeCache(cache.folder)
    assert not old.exists()
    assert new.exists()


def test_the_default_is_in_the_cache_of_hugging_face(monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers_adm.compilation.code_cache.HF_HOME", str(tmp_path))
    assert CodeCache().folder == default_cache_dir().resolve() == (tmp_path / "diffusers_adm" / "compiled").resolve()
