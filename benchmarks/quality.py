"""Does compiling change what a model says? Perplexity and greedy choices, against transformers.

Perplexity: the compiled BF16 target reads a text in windows and its logits are scored; transformers scores
the same windows with the same BF16 weights in float32 arithmetic. Greedy choices: transformers, in BF16 and
in float32, is fed each compiled answer token by token; where it would have chosen another token, its two best
logits are compared with the rounding of BF16.

    python benchmarks/quality.py                                    # SmolLM2 on Python's own help texts
    python benchmarks/quality.py --model FOLDER --text FILE --prompts FILE.jsonl
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
import transformers
from compiled import Compiled
from subject import add_options, prepare, prompts

_ROWS = 16  # the longest pass that outputs every row's logits
_ROUNDING = 2.0**-8  # BF16 keeps 8 significant bits: neighbours differ by 2^-8 to 2^-7 of their size

Window = list[int]


def main() -> None:
    """Measure, print, and write what `report` writes."""
    options = _options()
    subject = prepare(options)
    compiled = Compiled(subject.artifact, options.threads)
    torch.set_num_threads(compiled.engine.threads)
    windows = _windows(compiled, _text(options.text), options.tokens, options.window)
    ours = [_compiled_nll(compiled, window) for window in windows]
    chosen = prompts(subject, compiled.model)[: options.answers]
    answers = [(prompt, _answer(compiled, prompt, options.new_tokens)) for prompt in chosen]
    eager = _eager(subject.checkpoint, torch.float32)
    theirs = [_eager_nll(eager, window) for window in windows]
    tables = [_perplexity(np.concatenate(ours), np.concatenate(theirs))]
    choices = {"float32": [_choices(eager, *answer) for answer in answers]}
    eager = _eager(subject.checkpoint, torch.bfloat16)
    choices["bfloat16"] = [_choices(eager, *answer) for answer in answers]
    tables.append(_agreement(choices, sum(len(tokens) for _, tokens in answers)))
    details = {
        "model": subject.name,
        "text": options.text.name if options.text else "pydoc_data.topics of this Python",
        "tokens scored": sum(len(window) - 1 for window in windows),
        "window": options.window,
        "answers": len(answers),
        "new tokens": options.new_tokens,
        "isa": compiled.engine.manifest.isa,
    }
    rounds = [{"choices": choices, "nll": {"compiled": _sums(ours), "transformers float32": _sums(theirs)}}]
    report.write(f"quality-{subject.name}", tables, details, rounds, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare perplexity and greedy choices with transformers.")
    add_options(parser)
    parser.add_argument("--text", type=Path, help="held-out text (default: Python's help topics)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the text to score")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are scored together")
    parser.add_argument("--answers", type=int, default=8, help="prompts to answer")
    parser.add_argument("-n", "--new-tokens", type=int, default=128, help="new tokens a prompt")
    report.add_options(parser)
    return parser.parse_args()


def _text(path: Path | None) -> str:
    if path is not None:
        return path.read_text("utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _windows(compiled: Compiled, text: str, tokens: int, window: int) -> list[Window]:
    """Cut the text's first tokens into windows that do not overlap; the first of each is not scored."""
    found = compiled.model.encode(text[: tokens * 8], raw=True)[:tokens]
    return [found[at : at + window] for at in range(0, len(found), window) if len(found) - at > 1]


def _compiled_nll(compiled: Compiled, window: Window) -> np.ndarray:
    """Negative log-likelihood of each token but the first, in nats, from passes of 16 rows and of one."""
    engine, scores = compiled.engine, []
    at = 0
    while at < len(window):
        rows = _ROWS if len(window) - at >= _ROWS else 1
        engine.step(compiled.target, window[at : at + rows], at)
        logits = engine.logits(compiled.target, rows).reshape(rows, -1)
        following = window[at + 1 : at + rows + 1]
        scores.append(_nll(logits[: len(following)], following))
        at += rows
    return np.concatenate(scores)


def _nll(logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    exact = logits.astype(np.float64)
    top = exact.max(axis=-1, keepdims=True)
    total = np.log(np.exp(exact - top).sum(axis=-1)) + top[:, 0]
    return np.asarray(total - exact[np.arange(len(tokens)), list(tokens)])


def _eager(checkpoint: Path, dtype: torch.dtype) -> Any:
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(checkpoint, dtype=dtype, attn_implementation="eager").eval()


@torch.inference_mode()
def _eager_nll(model: Any, window: Window) -> np.ndarray:
    logits = model(input_ids=torch.tensor([window])).logits[0, :-1].float().numpy()
    return np.concatenate(
        [_nll(logits[at : at + 64], window[1:][at : at + 64]) for at in range(0, len(logits), 64)]
    )


def _answer(compiled: Compiled, prompt: list[int], new_tokens: int) -> list[int]:
    return compiled.model.generate(prompt, new_tokens, speculate=False, ignore_eos=True).tokens


@torch.inference_mode()
def _choices(model: Any, prompt: list[int], answer: list[int]) -> list[dict[str, float]]:
    """Feed a compiled answer as generation would; return what was chosen otherwise, and how narrowly."""
    cache = transformers.DynamicCache(config=model.config)
    found: list[dict[str, float]] = []
    tokens = prompt
    for at, token in enumerate(answer):
        logits = model(input_ids=torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits[
            0, -1
        ]
        best = torch.topk(logits.float(), 2)
        first, second = best.values.tolist()
        if best.indices[0] != token:
            gap = (first - second) / max(abs(first), abs(second))
            chosen, runner_up = best.indices.tolist()
            names = {"compiled": token, "transformers": chosen, "second": runner_up}
            found.append({"at": at, "gap": gap, "absolute": first - second, **names})
        tokens = [token]
    return found


def _perplexity(ours: np.ndarray, theirs: np.ndarray) -> report.Table:
    both = [math.exp(values.mean()) for values in (ours, theirs)]
    difference = both[0] / both[1] - 1
    rows = [
        [
            "compiled BF16",
            f"{both[0]:.4f}",
            f"{100 * difference:+.4f} %",
            f"{np.abs(ours - theirs).max():.4f}",
        ],
        ["transformers, float32 arithmetic", f"{both[1]:.4f}", "", ""],
    ]
    figures = {"compiled": both[0], "transformers float32": both[1], "relative difference": difference}
    headings = ["perplexity", "of the text", "difference", "largest difference of a token, nats"]
    return report.Table("The same BF16 weights:", headings, rows, {"perplexity": figures})


def _agreement(choices: dict[str, list[list[dict[str, float]]]], tokens: int) -> report.Table:
    rows, figures = [], {}
    # Where float32 chooses as the compiled model did, it is BF16 that departed.
    exact = {(i, choice["at"]) for i, found in enumerate(choices["float32"]) for choice in found}
    for dtype, answers in choices.items():
        others = [(i, choice) for i, found in enumerate(answers) for choice in found]
        gaps = Counter(_class(choice["gap"]) for _, choice in others)
        second = sum(choice["second"] == choice["compiled"] for _, choice in others)
        alone = sum((i, choice["at"]) not in exact for i, choice in others)
        counts = [len(others), gaps["one"], gaps["two"], gaps["more"], second]
        total, *rest = map(str, counts)
        absolute = max((choice["absolute"] for _, choice in others), default=0.0)
        rows.append(
            [
                dtype,
                f"{total} of {tokens}",
                *rest,
                "" if dtype == "float32" else str(alone),
                f"{absolute:.4f}",
            ]
        )
        largest = max((choice["gap"] for _, choice in others), default=0.0)
        names = ("differ", "within 2^-8", "within 2^-7", "beyond", "runner-up")
        figures[dtype] = {
            **dict(zip(names, counts, strict=True)),
            "largest gap": largest,
            "largest absolute gap": absolute,
            "float32 agrees": alone,
        }
    headings = ["transformers eager", "tokens that differ", "its best two within 2^-8", "2^-8 to 2^-7", "further apart",
                "compiled choice is its second", "float32 chooses as compiled", "largest gap, absolute"]  # fmt: skip
    title = (
        "Greedy choices that differ from the compiled answer's, by the relative gap of the two best logits:"
    )
    return report.Table(title, headings, rows, {"choices": figures})


def _class(gap: float) -> str:
    return "one" if gap <= _ROUNDING else "two" if gap <= 2 * _ROUNDING else "more"


def _sums(scores: Sequence[np.ndarray]) -> list[float]:
    return [float(score.sum()) for score in scores]


if __name__ == "__main__":
    main()
