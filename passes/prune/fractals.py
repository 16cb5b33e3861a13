"""Images without data: fractals of iterated function systems, as FractalDB and the calibration of pruned networks use.

After Kataoka et al. (arXiv 2101.08515) and the image generator of Lazarevich et al. (arXiv 2104.15023), whose network
for colours, trained on photographs, is replaced by smooth random fields of colour.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["fractals", "variants"]

_TRIAL, _CHAINS = 512, 1024  # pixels a side on which a system is judged; points that move at once
_POINTS = 200_000
_FILLED = 0.2
_MARGIN = 6  # pixels
_INSTANCES = 0.25  # share of a category's images that differ in stamps and colours alone


def variants() -> np.ndarray:
    """Return the 25 weights [25, 6] of a category: none, or one of a..f times 0.2, 0.6, 1.4 or 1.8."""
    scales = [np.where(np.arange(6) == at, scale, 1.0) for at in range(6) for scale in (0.2, 0.6, 1.4, 1.8)]
    return np.stack([np.ones(6), *scales])


def fractals(count: int, size: tuple[int, int] = (224, 224), seed: int = 0) -> Iterator[np.ndarray]:
    """Yield images uint8 [H, W, 3]; the same ones for the same arguments.

    25 and more images are of several categories, each with 25 variants and as many instances of each as a quarter of
    the number of variants that there are; fewer are variants of one category.
    """
    rng = np.random.default_rng(seed)
    instances = max(1, int(np.ceil(_INSTANCES * count / 25)))
    made = 0
    while made < count:
        system, chances = _category(rng)
        for weights in variants():
            cloud = _chaos_game(system * weights, chances, _POINTS, rng)
            for _ in range(min(instances, count - made)):
                yield _augmented(_rendered(cloud, size, rng), rng)
                made += 1


def _category(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw maps [N, 6] (a to f) and their chances until they fill a fifth of an image."""
    while True:
        system = rng.uniform(-1, 1, (rng.integers(2, 8), 6))
        areas = np.abs(system[:, 0] * system[:, 3] - system[:, 1] * system[:, 2]) + 1e-5
        chances = areas / areas.sum()
        cloud = _chaos_game(system, chances, _POINTS // 2, rng)
        places = _places(cloud, (_TRIAL, _TRIAL))
        if len(np.unique(places[0] * _TRIAL + places[1])) >= _FILLED * _TRIAL**2:
            return system, chances


def _chaos_game(system: np.ndarray, chances: np.ndarray, points: int, rng: np.random.Generator) -> np.ndarray:
    """Return points [2, n] of the attractor: many chains from the origin, without their first steps."""
    steps, settle = -(-points // _CHAINS), 20
    maps = rng.choice(len(system), (steps + settle, _CHAINS), p=chances)
    x = y = np.zeros(_CHAINS)
    cloud = np.empty((2, steps, _CHAINS))
    with np.errstate(over="ignore", invalid="ignore"):
        for step, chosen in enumerate(maps):
            a, b, c, d, e, f = system[chosen].T
            x, y = a * x + b * y + e, c * x + d * y + f
            if step >= settle:
                cloud[:, step - settle] = x, y
    # A system that expands throws points far away: those would shrink the rest to a dot.
    return cloud[:, (np.abs(cloud) < 1e3).all(0)].reshape(2, -1)


def _places(cloud: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Stretch points to rows and columns [2, n] of an image, with a margin."""
    if not cloud.size:
        return np.zeros((2, 0), dtype=np.int64)
    low, high = cloud.min(1, keepdims=True), cloud.max(1, keepdims=True)
    margin = min(_MARGIN, min(size) // 4)
    room = np.array(size)[:, None] - 2 * margin - 1
    return (margin + (cloud - low) / np.maximum(high - low, 1e-9) * room).astype(np.int64)


def _rendered(cloud: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Stamp a random 3x3 pattern at each point, and colour the result: float64 [H, W, 3] in 0..1."""
    rows, columns = _places(cloud, size)
    patterns = rng.integers(1, 512, rows.size)
    hits = np.zeros((size[0] + 2, size[1] + 2))
    for bit in range(9):
        stamped = (patterns >> bit & 1).astype(bool)
        flat = (rows[stamped] + bit // 3) * hits.shape[1] + columns[stamped] + bit % 3
        hits += np.bincount(flat, minlength=hits.size).reshape(hits.shape)
    hits = hits[1:-1, 1:-1, None]
    light = 0.4 + 0.6 * np.log1p(hits) / max(np.log1p(hits.max()), 1e-9)
    return np.where(hits > 0, light * _field(size, rng), _field(size, rng))


def _field(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Colours that change smoothly, from a random grid of 2 to 5 a side: float64 [H, W, 3] in 0..1."""
    grid = rng.uniform(0, 1, (rng.integers(2, 6), rng.integers(2, 6), 3))
    for axis, length in enumerate(size):
        at = np.linspace(0, grid.shape[axis] - 1, length)
        low = np.minimum(at.astype(int), grid.shape[axis] - 2)
        share = (at - low).reshape(-1, *[1] * (2 - axis))
        grid = np.take(grid, low, axis) * (1 - share) + np.take(grid, low + 1, axis) * share
    return grid


def _augmented(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flip, turn by up to 30 degrees, blur, and stretch to 0..255."""
    image = image[:: rng.choice((1, -1)), :: rng.choice((1, -1))]
    image = _blurred(_turned(image, np.deg2rad(rng.uniform(-30, 30))), int(rng.choice(np.arange(1, 17, 2))))
    low, high = image.min(), image.max()
    return np.round((image - low) / max(high - low, 1e-9) * 255).astype(np.uint8)


def _turned(image: np.ndarray, angle: float) -> np.ndarray:
    """Turn around the centre; what comes from outside is what is nearest to it."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width] - np.array([height - 1, width - 1]).reshape(2, 1, 1) / 2
    rows = np.cos(angle) * y - np.sin(angle) * x + (height - 1) / 2
    columns = np.sin(angle) * y + np.cos(angle) * x + (width - 1) / 2
    return image[
        np.clip(rows.round(), 0, height - 1).astype(int), np.clip(columns.round(), 0, width - 1).astype(int)
    ]


def _blurred(image: np.ndarray, size: int) -> np.ndarray:
    """Blur with a Gaussian of an odd size, whose deviation is what OpenCV takes for that size."""
    deviation = 0.3 * ((size - 1) / 2 - 1) + 0.8
    kernel = np.exp(-0.5 * ((np.arange(size) - size // 2) / deviation) ** 2)
    for axis in (0, 1):
        padded = np.pad(
            image, [(size // 2, size // 2) if axis == a else (0, 0) for a in range(3)], mode="edge"
        )
        parts = (np.take(padded, range(at, at + image.shape[axis]), axis) * k for at, k in enumerate(kernel))
        image = sum(parts) / kernel.sum()
    return image
