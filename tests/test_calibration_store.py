import os
import time

import pytest
import torch
from small_programs import DIM, Decoder, of

from specqd.passes.quantize.calibration_store import Store, fingerprint


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECQD_CACHE", str(tmp_path))
    return tmp_path


def test_what_is_put_is_got_back_under_the_same_content_only():
    tensors = {"a": torch.arange(6, dtype=torch.uint8).view(2, 3), "b": torch.tensor([1.5])}
    Store.of("x", 1).put("one", tensors)
    got = Store.of("x", 1).get("one")
    assert got is not None and got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    assert Store.of("x", 1).get("two") is None
    assert Store.of("x", 2).get("one") is None


@pytest.mark.parametrize("content", [b"", b"cut off", b"\xff" * 100])
def test_a_damaged_file_counts_as_none(content):
    store = Store.of("x")
    store.put("one", {"a": torch.zeros(3)})
    (file,) = store.folder.iterdir()
    file.write_bytes(content)
    assert store.get("one") is None


def test_a_folder_that_cannot_be_written_keeps_nothing_and_disturbs_nobody(cache):
    (cache / "calibration").write_text("a file in the place of the folder")
    store = Store.of("x")
    store.put("one", {"a": torch.zeros(3)})
    assert store.get("one") is None


def test_stores_of_a_month_ago_are_removed():
    old, young = Store.of("old"), Store.of("young")
    for store in (old, young):
        store.put("one", {"a": torch.zeros(3)})
    month_ago = time.time() - 31 * 86400
    os.utime(old.folder, (month_ago, month_ago))
    Store.of("new").put("one", {"a": torch.zeros(3)})
    assert not old.folder.exists() and young.folder.exists()


def test_the_fingerprint_follows_graph_and_weights():
    def made(body=lambda m, x, _: torch.relu(x), value=1.0, dtype=torch.float32):
        program = of(Decoder(body, w=torch.ones(DIM)))
        program.weights |= {n: torch.ones_like(w) for n, w in program.weights.items()}
        program.weights["lm_head.weight"] = torch.full_like(
            program.weights["lm_head.weight"], value, dtype=dtype
        )
        return fingerprint(program, "target")

    assert made() == made()
    others = [made(value=2.0), made(dtype=torch.bfloat16), made(lambda m, x, _: torch.relu(x) * m.w)]
    assert len({made(), *others}) == 4
