"""The command line: what each verb prints, how errors end, and that Ctrl-C ends cleanly."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from toy import compile_toy, save_toy, write_tokenizer

from specqd import bench
from specqd.cli import main
from specqd.errors import InputError
from specqd.runtime.model import load

CAPACITY = 40_000
ENDLESS = 400_000
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}<s>"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    compiled = compile_toy(folder)
    save_toy(folder / "toy", compiled, write_tokenizer(folder, TEMPLATE), capacity=CAPACITY)
    return folder / "toy"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


VERBS = [
    "compile",
    "generate",
    "tune",
    "inspect",
    "bench",
    "demo",
    "fetch",
    "passes",
    "explain",
    "rewrite",
    "diff",
    "profile",
    "synthesize-images",
]


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_within_80_columns(capsys, monkeypatch, verb: str):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"Example: specqd {verb}" in out
    assert max(map(len, out.splitlines())) <= 80


def test_help_lists_the_verbs(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f" {verb} " in out for verb in VERBS)


def test_generate_prints_the_same_text_with_and_without_draft(capsys, toy: Path):
    expected = load(toy).generate("ab", 30)
    for options in ([], ["--no-speculate"], ["--draft-length", "2"], ["--threads", "1"]):
        code, out, err = run(capsys, "generate", str(toy), "-p", "ab", "-n", "30", *options)
        assert (code, out, err) == (0, expected.text + "\n", "")


def test_the_help_of_generate_shows_each_option_whole_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "generate", "--help")
    assert "--explain-speculation" in out
    assert "\u2026" not in out


def test_a_budget_for_the_caches_limits_the_prompt(capsys, toy: Path):
    code, out, err = run(capsys, "generate", str(toy), "-p", "ab", "--cache-mb", "1e-9")
    assert (code, out) == (2, "")
    assert "1e-09 MB holds not even a block of 16 tokens" in err
    two_blocks = 2 * float(err.split("takes ")[1].split(" MB")[0])
    for letters, expected in ((20, 0), (40, 2)):
        code, _, err = run(
            capsys, "generate", str(toy), "-p", "a" * letters, "--raw", "--cache-mb", str(two_blocks)
        )
        assert code == expected
    assert "the prompt has 40 tokens and the cache holds 32" in err


def test_stats_go_to_standard_error(capsys, toy: Path):
    code, _, err = run(capsys, "generate", str(toy), "-p", "ab", "-n", "9", "--stats", "--raw")
    assert code == 0
    assert [line.split()[0] for line in err.splitlines()] == ["prompt", "answer", "drafting"]
    assert err.startswith("prompt    2 tokens, ")


def test_stop_strings_end_the_text(capsys, toy: Path):
    whole = load(toy).generate("ab", 30).text
    code, out, err = run(
        capsys,
        "generate",
        str(toy),
        "-p",
        "ab",
        "-n",
        "30",
        "--stop",
        "never",
        "--stop",
        whole[4:6],
        "--stats",
    )
    assert (code, out) == (0, whole[: whole.index(whole[4:6])] + "\n")
    assert "a stop string was met" in err


def test_rounds_are_explained_legibly_without_colour(capsys, toy: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ("generate", str(toy), "-p", "ab", "-n", "30")
    _, expected, _ = run(capsys, *arguments)
    code, out, err = run(capsys, *arguments, "--explain-speculation")
    legend, *rounds = err.splitlines()
    assert (code, out) == (0, expected)
    assert legend == "level <- its draft, how many drafts stood: which stood [which fell] > its own"
    assert all(line.startswith("target <- draft ") and len(line) <= 80 for line in rounds)
    assert any("3/3: " in line and "[" not in line for line in rounds)
    assert any("[" in line and "] > " in line and "3/3" not in line for line in rounds)
    assert "\x1b" not in err


def test_what_became_of_drafts_is_coloured(toy: Path, monkeypatch):
    import io

    from rich.console import Console

    from specqd.cli import rounds
    from specqd.runtime.asking import Round

    out = io.StringIO()
    on_terminal = Console(file=out, force_terminal=True, color_system="standard", width=80)
    monkeypatch.setattr("rich.console.Console", lambda **_: on_terminal)
    show = rounds.printer(load(toy).text)
    show(Round("target", "draft", (11, 12, 13), (11, 14)))
    show(Round("target", "draft", (7, 12), (7,)))
    _, stood, special = out.getvalue().splitlines()
    assert "\x1b[32ma\x1b[0m" in stood
    assert "\x1b[9;31mbc\x1b[0m" in stood
    assert "\x1b[1md\x1b[0m" in stood
    assert "<7>" in special


def test_a_prompt_from_standard_input(capsys, toy: Path, monkeypatch):
    _, expected, _ = run(capsys, "generate", str(toy), "-p", "ab")
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"read": staticmethod(lambda: "ab")}))
    assert run(capsys, "generate", str(toy), "-p", "-")[1] == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["generate", "{toy}", "-p", "a" * (CAPACITY + 1), "--raw"],
            "prompt has 40001 tokens and the cache holds 40000",
        ),
        (["generate", "{toy}/none", "-p", "a"], "is no artifact"),
        (["generate", "{toy}", "-p", "", "--raw"], "the prompt is empty"),
        (["generate", "{toy}", "-p", "a", "-n", "0"], "cannot generate 0 tokens"),
        (["generate", "{toy}", "-p", "a", "--threads", "0"], "cannot run on 0 threads"),
        (["generate", "{toy}", "-p", "a", "--draft-length", "0"], "cannot draft 0 tokens"),
        (["inspect", "{toy}/none"], "is no artifact"),
        (["bench", "{toy}", "--prompts", "99"], "26 built-in prompts"),
        (["bench", "{toy}", "--size", "b=1"], "is a language model, which --against and --size are not for"),
        (["profile", "{toy}", "--size", "b=1"], "is a language model, which has no sizes to give"),
        (["bench", "{toy}", "--tokens", "1"], "1 new tokens give no rate"),
        (["compile", "nowhere", "-o", "{toy}"], "exists and is not empty"),
        (["compile", "nowhere", "-o", "x", "--context", "0"], "context of 0 cannot be used"),
        (
            ["compile", "nowhere", "-o", "x", "--plan", "draft:3 <-"],
            "does not begin with the name of an entry",
        ),
        (["compile", "nowhere", "-o", "x", "--isa", "z80"], "z80"),
        (["passes", "no-such-pass"], "no pass 'no-such-pass'"),
        (["fetch", "smollm2", "-o", "{toy}"], "exists and is not empty"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_2(capsys, toy: Path, arguments: list[str], sentence: str):
    code, out, err = run(capsys, *(argument.format(toy=toy) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_wrong_usage_exits_with_2(capsys):
    assert run(capsys, "generate")[0] == 2
    assert run(capsys, "no-such-verb")[0] == 2


def test_a_full_disk_anywhere_is_one_sentence(capsys, toy: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr("specqd.runtime.model.load", full)
    code, _, err = run(capsys, "generate", str(toy), "-p", "a")
    assert code == 2
    assert err == "error: no space left on the disk of /tmp/x: make room and try again\n"


def test_an_artifact_for_another_cpu_is_refused_before_its_code_is_loaded(capsys, tmp_path: Path):
    compiled = replace(compile_toy(tmp_path), cpu_features=("avx9000",), library=b"would crash")
    save_toy(tmp_path / "a", compiled, write_tokenizer(tmp_path))
    code, _, err = run(capsys, "generate", str(tmp_path / "a"), "-p", "a")
    assert code == 2
    assert "compiled for a CPU with avx9000, which this one" in err


def test_inspect_says_what_is_inside(capsys, toy: Path):
    code, out, _ = run(capsys, "inspect", str(toy), "--verify")
    assert code == 0
    for text in (
        "target <- draft",
        "40000 positions",
        "hashed just now",
        "tokenizer.json",
        "artifacts you trust",
    ):
        assert text in out
    _, out, _ = run(capsys, "inspect", str(toy), "--json")
    fields = json.loads(out)
    assert fields["chain"] == ["target", "draft"]
    assert fields["memory"]["caches"] == 2 * 2 * CAPACITY  # of two caches, 2 bytes a position


def test_inspect_notices_a_flipped_bit(capsys, toy: Path, tmp_path: Path):
    import shutil

    copy = shutil.copytree(toy, tmp_path / "copy")
    content = bytearray((copy / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(content)
    code, _, err = run(capsys, "inspect", str(copy), "--verify")
    assert code == 2
    assert "weights.safetensors was changed or damaged" in err


def test_passes_are_listed_with_their_options(capsys):
    code, out, _ = run(capsys, "passes")
    assert code == 0
    assert "fuse-rms-norm" in out


FIGURES = {
    "bandwidth_gbps", "plain_tokens_per_s", "plain_bandwidth_fraction", "draft_tokens_per_s",
    "draft_bandwidth_fraction", "speculative_tokens_per_s", "speedup", "acceptance_rate", "tokens_per_verify",
    "verify_cost", "prefill_tokens_per_s", "load_s", "peak_rss_mb", "identical", "levels", "planned_speedup", "plan",
    "overhead_fraction",
}  # fmt: skip


def test_bench_gives_every_figure(capsys, toy: Path):
    code, out, err = run(capsys, "bench", str(toy), "--json", "--quick", "--prompts", "2", "--tokens", "16")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert figures.keys() >= FIGURES
    assert figures["identical"] is True
    assert (figures["prompts"], figures["tokens_compared"]) == (2, 32)
    assert figures["bandwidth_source"] == "numpy"
    assert figures["verify_cost"][0] == 1
    assert len(figures["verify_cost"]) == 5
    assert 0 <= figures["acceptance_rate"] <= 1
    assert 1 <= figures["tokens_per_verify"] <= 8
    assert 20 < figures["peak_rss_mb"] < 400
    assert 0 < figures["overhead_fraction"] < 1
    assert (figures["plan"], figures["planned_speedup"]) == ("target <- draft@fixed:3", None)
    (level,) = figures["levels"]
    assert (level["name"], level["kind"]) == ("draft", "shared_cache")
    assert level["acceptance"] == figures["acceptance_rate"] == level["accepted"] / level["examined"]
    assert level["accepted"] <= level["examined"] <= level["proposed"]
    assert level["cost"] > 0


def test_bench_gives_the_levels_of_the_plan_and_what_was_planned(capsys, tmp_path: Path):
    compiled = compile_toy(tmp_path)
    plan = "target <- suffix:2@fixed:3 | other@fixed:2 <- suffix:1@fixed:1"
    changes = {"plan": plan, "planned_speedup": 1.25, "chain": ("target", "draft", "other")}
    save_toy(tmp_path / "a", compiled, write_tokenizer(tmp_path, TEMPLATE), capacity=CAPACITY, **changes)
    figures = bench.run(tmp_path / "a", prompts=1, new_tokens=30, quick=True)
    assert (figures["plan"], figures["planned_speedup"], figures["identical"]) == (plan, 1.25, True)
    assert [(level["name"], level["kind"]) for level in figures["levels"]] == [
        ("suffix", "search"),
        ("other", "own_cache"),
        ("suffix", "search"),
    ]
    code, out, _ = run(capsys, "bench", str(tmp_path / "a"), "--quick", "--prompts", "1", "--tokens", "8")
    assert code == 0
    assert out.count("\nlevel ") == 3
    assert "\nplanned_speedup              1.25\n" in out


def test_bench_of_a_target_alone(tmp_path: Path):
    compiled = compile_toy(tmp_path)
    files = write_tokenizer(tmp_path, TEMPLATE)
    save_toy(tmp_path / "a", compiled, files, capacity=CAPACITY, chain=("target",), plan="target")
    figures = bench.run(tmp_path / "a", prompts=1, new_tokens=8, quick=True)
    assert (figures["levels"], figures["plan"], figures["acceptance_rate"]) == ([], "target", None)


def test_bench_notices_a_draft_that_changes_the_tokens(toy: Path, monkeypatch):
    def skewed(model, prompt, new_tokens, **how):
        made = original(model, prompt, new_tokens, **how)
        return made if how.get("speculate") is False else replace(made, tokens=[*made.tokens[:-1], 1])

    original = bench.Model.generate
    monkeypatch.setattr(bench.Model, "generate", skewed)
    figures = bench.run(toy, prompts=1, new_tokens=8, quick=True)
    assert figures["identical"] is False


def test_bench_needs_room(tmp_path: Path):
    save_toy(tmp_path / "a", compile_toy(tmp_path), write_tokenizer(tmp_path))
    with pytest.raises(InputError, match=r"measuring takes 225 positions and the cache holds 64"):
        bench.run(tmp_path / "a", prompts=1, quick=True)


def test_ctrl_c_ends_with_the_text_so_far(tmp_path: Path):
    endless = tmp_path / "endless"
    # More text than a pipe holds: the command cannot end before the signal, however slow this test is.
    compiled = compile_toy(tmp_path)
    save_toy(endless, compiled, write_tokenizer(tmp_path), capacity=ENDLESS, eos_token_ids=())
    command = [
        sys.executable,
        "-m",
        "specqd.cli",
        "generate",
        str(endless),
        "-p",
        "ab",
        "-n",
        str(ENDLESS - 100),
        "--stats",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert first + rest == (first + rest).rstrip("\n") + "\n"
    assert "interrupted" in err
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_error(toy: Path):
    command = f"{sys.executable} -m specqd.cli generate {toy} -p ab -n 2000 | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ
    )
    assert "Traceback" not in done.stderr


def test_the_demo_counts_bytes_of_passes_and_not_of_tokens_that_were_looked_up(toy: Path):
    from specqd.cli.demo import _bytes_per_token
    from specqd.runtime.model import load

    model = load(toy)
    stats = model.generate([1, 2, 3], 60, plan="target <- suffix:1@fixed:3", ignore_eos=True).stats
    assert stats.drafted > 0
    step = model.engine.step_bytes("target", 1, 33)
    assert _bytes_per_token(model, [stats]) == pytest.approx(stats.rounds * step / 59)
    both = model.generate([1, 2, 3], 60, plan="target <- draft@fixed:3", ignore_eos=True).stats
    drafts = both.levels[0].passes * model.engine.step_bytes("draft", 1, 33)
    assert _bytes_per_token(model, [both]) == pytest.approx((both.rounds * step + drafts) / 59)
