"""What was measured of each level by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from specqd.planning.prediction import Predictor
from specqd.planning.recording import Recording

__all__ = ["LevelCost", "level_costs"]


@dataclass(frozen=True)
class LevelCost:
    """What was measured of one level.

    `step` is the time of a pass of one row over a plain step of the target, `passes` the same by rows;
    `acceptance` the share of the positions of the answers at which it says what the target says (None: the target).
    """

    name: str
    step: float
    acceptance: float | None
    passes: dict[int, float]


def level_costs(predictor: Predictor, chain: Sequence[str]) -> list[LevelCost]:
    """Sum up what is known of the entries of a chain, target first, at the middle of the answers."""
    costs, target = predictor.costs, chain[0]
    middle = sum(costs.positions) // 2
    plain = costs.of(target, 1, middle, again=True)
    return [
        LevelCost(
            name=name,
            step=costs.of(name, 1, middle, again=True) / plain,
            acceptance=None if name == target else _acceptance(predictor.recordings, name),
            # The target checks drafts after a pass of another level.
            passes={rows: costs.of(name, rows, middle, again=False) / plain for rows in costs.checking[name]},
        )
        for name in chain
    ]


def _acceptance(recordings: Sequence[Recording], name: str) -> float:
    return mean(
        run.tokens[0] == one.text[place] for one in recordings for place, run in one.runs[name].items()
    )
