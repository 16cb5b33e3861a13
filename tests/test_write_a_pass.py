"""docs/write-a-pass.md, run from top to bottom as a reader would."""

import re
from pathlib import Path

from specqd.passes import Pass, options

PAGE = Path(__file__).resolve().parents[1] / "docs" / "write-a-pass.md"


def test_the_page_runs():
    text = PAGE.read_text()
    blocks = [(m.start(1), m.group(1)) for m in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) >= 6
    seen: dict[str, object] = {"__name__": "write_a_pass"}
    for start, block in blocks:
        first_line = text.count("\n", 0, start)  # so that a traceback names the page's own lines
        exec(compile("\n" * first_line + block, str(PAGE), "exec"), seen)
    written = seen["FoldScale"]
    assert isinstance(written, type) and issubclass(written, Pass)
    assert [(o.name, o.choices, o.doc) for o in options(written)] == [
        ("only_exact", "true | false", "leave alone what would round.")
    ]
