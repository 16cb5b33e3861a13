"""How rows and blocks of output channels are divided among registers, tasks and threads."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["THREADS", "row_tiles", "tasks"]

#: threads among which work should divide evenly; more come in multiples of it
THREADS = 2


def row_tiles(rows: int, limit: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Cut `rows` into `((first row, rows in a tile), repeats)`, tiles of at most `limit` rows.

    Few rows are cut evenly (8 at limit 6 is 4 + 4); many are a loop of full tiles and a rest.
    """
    if rows <= 4 * limit:
        count = -(-rows // limit)
        sizes = [rows // count + (i < rows % count) for i in range(count)]
        start = 0
        for size in sorted(set(sizes), reverse=True):
            yield (start, size), sizes.count(size)
            start += size * sizes.count(size)
        return
    yield (0, limit), rows // limit
    if rows % limit:
        yield (rows // limit * limit, rows % limit), 1


def tasks(blocks: int, rows: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Cut `blocks` into `(first block, tasks, blocks a task)` for the thread pool.

    One row needs several blocks at a time to have enough independent chains; more rows bring their own. Among
    the widths that do, the one that leaves an even number of equal tasks is taken (threads come in even numbers).
    """
    wanted = max(1, min(limit // min(rows, limit), 4))
    # A narrower width that splits evenly beats a wide one that leaves a thread idle for a task.
    choices = sorted(range(1, wanted + 1), key=lambda w: (_waste(blocks, w), -w))
    width = choices[0]
    yield 0, blocks // width, width
    if blocks % width:
        yield blocks - blocks % width, 1, blocks % width


def _waste(blocks: int, width: int, threads: int = THREADS) -> float:
    """Fraction of time lost when `blocks` are done `width` at a time by `threads`; few chains cost as well."""
    count = -(-blocks // width)
    longest = -(-count // threads) * width
    latency = {1: 0.30, 2: 0.10}.get(width, 0.0)
    return round(longest * threads / blocks - 1 + latency, 2)
