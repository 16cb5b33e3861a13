"""When something is selected: at lengths of the text, once it is long enough to pay."""

from __future__ import annotations

import pytest

from specqd.manifest import Selection
from specqd.runtime.selecting import Schedule


def selection(above: int) -> Selection:
    return Selection(
        entry="draft",
        method="snapkv",
        options={},
        tokens=64,
        above=above,
        every=32,
        window=8,
        sinks=2,
        recent=16,
    )


@pytest.mark.parametrize(
    ("above", "prompt", "dues"),
    [
        (256, 10, [257, 289]),  # not before the text is long enough
        (256, 256, [257, 289]),
        (256, 300, [300, 332]),  # at the end of a long prompt
        (64, 10, [96, 128]),
        (64, 70, [70, 102]),
    ],
)
def test_a_draft_sees_a_short_text_whole(above: int, prompt: int, dues: list[int]) -> None:
    schedule = Schedule(selection(above), slots=512, drops=False)
    schedule.begin(prompt)
    found = [schedule.due]
    schedule.done()
    assert [*found, schedule.due] == dues
    assert schedule.dropped == 0


def test_a_target_selects_when_its_cache_is_full_at_the_latest() -> None:
    schedule = Schedule(selection(500), slots=128, drops=True)
    assert schedule.due == 128
    schedule.begin(1000)
    assert schedule.due == 128
    schedule.done()
    assert (schedule.dropped, schedule.due) == (64, 160)
