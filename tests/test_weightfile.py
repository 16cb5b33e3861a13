"""The weight file: aligned, mapped without copying, readable by safetensors, strict about damage."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from specqd.errors import ArtifactError
from specqd.weightfile import ALIGNMENT, read_weights, write_weights

DTYPES = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
)


@settings(max_examples=60, deadline=None)
@given(weights=st.dictionaries(st.text("abc.µ", min_size=1), ARRAYS, max_size=5))
def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    write_weights(path, weights)
    ours, theirs = read_weights(path), load_file(path)
    assert list(ours) == list(weights)
    for name, array in weights.items():
        for found in (ours[name], theirs[name]):
            assert found.dtype == array.dtype
            assert found.shape == array.shape
            assert found.tobytes() == array.tobytes()
        assert not array.size or ours[name].ctypes.data % ALIGNMENT == 0


def test_arrays_are_views_of_one_private_map(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    write_weights(path, {"a": np.arange(5, dtype=np.uint16), "b": np.arange(7, dtype=np.float32)})
    before = path.read_bytes()
    weights = read_weights(path)
    assert weights["a"].base is not None
    assert weights["b"].ctypes.data - weights["a"].ctypes.data == ALIGNMENT
    weights["a"][:] = 9  # DLPack wants writable memory; the file must not follow
    assert path.read_bytes() == before


def test_a_weight_keeps_its_pages_alive_after_the_rest_is_gone(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    write_weights(path, {"a": np.arange(1000, dtype=np.int32)})
    kept = read_weights(path)["a"]
    path.unlink()
    assert kept.sum() == 499500


def test_progress_adds_up(tmp_path: Path):
    told: list[int] = []
    write_weights(tmp_path / "w", {"a": np.zeros(100, np.uint8)}, told.append)
    assert sum(told) == 128


@pytest.mark.parametrize("keep", [0, 4, 8, 20, 64, 100, 191])
def test_a_cut_off_file_is_said_so(tmp_path: Path, keep: int):
    path = tmp_path / "w.safetensors"
    write_weights(path, {"a": np.zeros(100, np.uint8)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"cut off|not readable"):
        read_weights(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "U8", "shape": [4], "data_offsets": [-64, -60]},
        {"dtype": "U8", "shape": [4], "data_offsets": [0, 5]},
        {"dtype": "U8", "shape": [-4], "data_offsets": [4, 0]},
        {"dtype": "F8", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]},
        {"dtype": "U8", "data_offsets": [0, 4]},
        7,
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, entry: object):
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(ArtifactError, match="'a'"):
        read_weights(path)


@pytest.mark.parametrize("text", [b"[]", b"{nonsense", b"\xff\xfe{}"])
def test_a_header_that_is_no_table_is_refused(tmp_path: Path, text: bytes):
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ArtifactError, match="header"):
        read_weights(path)


def test_missing_file_and_unknown_dtype(tmp_path: Path):
    with pytest.raises(ArtifactError, match="cannot read"):
        read_weights(tmp_path / "none")
    with pytest.raises(ArtifactError, match="complex128"):
        write_weights(tmp_path / "w", {"a": np.zeros(3, complex)})
