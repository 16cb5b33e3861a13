"""Files that are whole or not there, and cached ones that notice when they were cut or changed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from specqd.codegen.checked_file import read_checked, write_checked
from specqd.staging import write_whole


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "new" / "file"
    for content in (b"first", b""):
        write_whole(path, content)
        assert path.read_bytes() == content and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("step", ["os.replace", "pathlib.Path.write_bytes"])
def test_what_cannot_be_written_leaves_nothing_and_the_old_file(tmp_path: Path, monkeypatch, step: str):
    path = tmp_path / "file"
    write_checked(path, b"old")
    monkeypatch.setattr(step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    write_checked(path, b"new")
    assert read_checked(path) == b"old" and os.listdir(tmp_path) == ["file"]


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path):
    path = tmp_path / "file"
    assert read_checked(path) is None
    write_checked(path, b"content")
    assert read_checked(path) == b"content"
    whole = path.read_bytes()
    spoilt = [whole[:end] for end in range(len(whole))]
    spoilt += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for content in spoilt:
        path.write_bytes(content)
        assert read_checked(path) is None
