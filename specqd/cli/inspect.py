"""`specqd inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from specqd.artifact import Manifest, open_artifact
from specqd.cli.app import ArtifactDir, app
from specqd.manifest import BLOCK, ModuleRecord, Selection

__all__ = ["inspect"]


@app.command()
def inspect(
    directory: ArtifactDir,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file again, also those known.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest and the sizes as JSON.")
    ] = False,
) -> None:
    """Say what an artifact holds, without running its code.

    Example: specqd inspect smollm2.specqd --verify
    """
    manifest = open_artifact(directory, verify=verify).manifest
    if as_json:
        print(json.dumps({**manifest.model_dump(mode="json"), "memory": _memory(manifest)}, indent=2))
        return
    for name, value in _facts(manifest):
        print(f"{name:<10} {value}")
    print(
        f"{'files':<10} {len(manifest.files)}, "
        + ("all hashed just now" if verify else "all as they were built")
    )
    for name, record in manifest.files.items():
        print(f"{'':<10} {record.size:>12,}  {name}")
    for refused in manifest.refusals:
        print(f"{'refused':<10} {refused.step} on {refused.entry}, {refused.node}: {refused.why}")
    print("lib.so is native code that runs with your rights: load only artifacts you trust.")


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    if manifest.module is not None:
        return _facts_of_module(manifest, manifest.module)
    memory = _memory(manifest)
    entries = dict.fromkeys(function.entry for function in manifest.functions)
    rows = {e: ", ".join(str(f.rows) for f in manifest.functions if f.entry == e) for e in entries}
    return [
        ("model", f"{manifest.family}, from {manifest.source or 'a module'}"),
        ("built by", f"specqd {manifest.specqd_version}"),
        ("pipeline", manifest.pipeline),
        ("plan", manifest.plan),
        *(
            (("entry"), f"{e}: {memory['weights_of'][e] / 1e6:.1f} MB of weights, rows {rows[e]}")
            for e in entries
        ),
        *(("sparse", f"{e}: {text}") for e in entries for text in _sparse(manifest, e)),
        *(("cache", text) for text in _caches(manifest)),
        *([("selection", _selection(manifest.selection))] if manifest.selection else []),
        ("context", f"{manifest.capacity} positions"),
        (
            "vocabulary",
            f"{manifest.vocab_size}, ends at {', '.join(map(str, manifest.eos_token_ids)) or 'no token'}",
        ),
        (
            "CPU",
            f"{manifest.triple}, {manifest.isa}, needs {', '.join(manifest.cpu_features) or 'no more'}",
        ),
        (
            "memory",
            f"{memory['weights'] / 1e6:.1f} MB weights, {memory['caches'] / 1e6:.1f} MB caches, "
            f"{memory['scratch'] / 1e6:.1f} MB scratch",
        ),
    ]


def _facts_of_module(manifest: Manifest, module: ModuleRecord) -> list[tuple[str, str]]:
    needs = ", ".join(manifest.cpu_features) or "no more"
    return [
        ("model", f"{manifest.family}, no language model"),
        ("built by", f"specqd {manifest.specqd_version}"),
        ("pipeline", manifest.pipeline),
        *(("takes", str(tensor)) for tensor in module.inputs),
        *(("keeps", str(tensor)) for tensor in module.states),
        *(("gives", str(tensor)) for tensor in module.outputs),
        *(("tuned", f"{k.workload} as {k.schedule}: {k.share:.0%} of the usual time") for k in module.tuned),
        ("CPU", f"{manifest.triple}, {manifest.isa}, needs {needs}"),
    ]


def _sparse(manifest: Manifest, entry: str) -> Iterator[str]:
    """Say which matrices are stored without their zeros, and in how many bytes."""
    sizes = manifest.sizes("weight", entry)
    for name in sizes:
        whole, _, part = name.rpartition("-")
        if part == "values":
            nbytes = sum(sizes[f"{whole}-{other}"] for other in ("values", "masks", "starts"))
            yield f"{whole}, {nbytes / 1e6:.2f} MB"


def _caches(manifest: Manifest) -> Iterator[str]:
    sizes = manifest.sizes("cache")
    for name, cache in manifest.caches.items():
        keys, values = (sizes[f"{name}_{part}"] / BLOCK for part in "kv")
        yield (
            f"{name}: {cache.layers} layers x {cache.kv_heads} heads, {keys:.0f} bytes of {cache.key_dtype} keys and "
            f"{values:.0f} of {cache.value_dtype} values a position"
        )
        if cache.recent is not None:
            recent = sum(manifest.sizes("recent")[f"{name}_recent_{part}"] for part in "kv")
            yield (
                f"{name}: packed block by block, beside {recent / 1e6:.1f} MB a sequence for the newest in BF16, of "
                f"which the block that is written and {cache.recent} positions before it are read"
            )
            yield f"{name}: " + (
                "texts that begin alike share nothing: BF16 that the first rows after it read would be gone"
                if cache.recent
                else "texts that begin alike share whole blocks"
            )


def _selection(selection: Selection) -> str:
    options = ", ".join(f"{name} {value}" for name, value in selection.options.items())
    how = f"{selection.method} ({options})" if options else selection.method
    return f"{selection.tokens} positions for {selection.entry} by {how}, every {selection.every}"


def _memory(manifest: Manifest) -> dict[str, Any]:
    """Bytes that running takes, by kind, and the weights that each entry reads."""
    entries = dict.fromkeys(function.entry for function in manifest.functions)
    return {
        "weights": sum(manifest.sizes("weight").values()),
        "caches": manifest.cache_bytes(manifest.capacity) + manifest.recent_bytes,
        "scratch": sum(manifest.sizes("scratch").values()),
        "weights_of": {entry: sum(manifest.sizes("weight", entry).values()) for entry in entries},
    }
