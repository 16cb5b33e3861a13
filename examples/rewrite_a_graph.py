"""Rewrite a decoder's graph and see what happened: python examples/rewrite_a_graph.py path/to/model."""

import sys

import torch

import specqd
from specqd.passes.watchers import Timing, diff, verify

program = specqd.capture(sys.argv[1])
print(program, end="\n\n")

pipeline = specqd.Pipeline.parse(
    "insert-kv-cache{capacity=512}, fuse-rms-norm, fuse-rope, fuse-linear, "
    "derive-draft, draft: cast-mxfp4{scale=search}, draft: share-kv"
)
timing = Timing()
some_tokens = torch.arange(8)[None] + 1
program = pipeline(program, timing, diff(print), verify(some_tokens))

print(f"\n{program}\n\n{timing}\n")
for event in program.history:
    for node, why in event.refused:
        print(f"{event.step} left {node} of {event.entry} alone: {why}")
