"""Graph rewrites: the Pass contract, the Pipeline, and the general passes.

    program = Pipeline.parse("insert-kv-cache, fuse-rms-norm, derive-draft, draft: cast-mxfp4")(program)

`registered()` gives every pass by name and `options(pass_type)` what it can be told; docs/write-a-pass.md
shows how to add one.
"""

from .contract import Note, Pass, Progress, Refusal, Result
from .options import Option, options
from .pipeline import Applied, Pipeline, Step, Watcher
from .registry import registered

__all__ = [
    "Applied",
    "Note",
    "Option",
    "Pass",
    "Pipeline",
    "Progress",
    "Refusal",
    "Result",
    "Step",
    "Watcher",
    "options",
    "registered",
]
