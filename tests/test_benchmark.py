# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.benchmark`: that it runs and agrees with itself, not how fast it is."""

import json

import pytest

from scripts import benchmark

SMALL = ("--preset", "tiny", "--midi-rows", "9", "--prompt-frames", "7", "--repeat", "2")


def test_one_json_line_that_agrees_with_itself(capsys):
    arguments = ("--frames", "30", "--batch", "2", "--baseline", "no-cache", "--json")
    assert benchmark.main([*SMALL, *arguments]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and "run 2 of 2" in err
    result = json.loads(out)
    assert result["real_time_factor"] == pytest.approx(1 / (50 * result["seconds_per_frame"]))
    for part in result["parts"].values():
        assert part["seconds"] == pytest.approx(part["seconds_per_frame"] * 30 * 2)
    assert set(result["parts"]) == {"encode", "ar", "nar", "decode", "whole"}
    share = result["ar_bytes_per_second"] / result["read_bytes_per_second"]
    assert result["bandwidth_share"] == pytest.approx(share) and result["peak_memory_mb"] > 50
    baseline = result["baseline_seconds"] / result["parts"]["ar"]["seconds"]
    assert result["speedup_over_baseline"] == pytest.approx(baseline)
    assert result["baseline_same_codes"] == 1  # greedy, in fp32
    assert result["frame_seconds"] == {} == result["growth"]  # no frame 100


def test_int8_as_text(capsys):
    assert benchmark.main([*SMALL, "--frames", "110", "--quantize", "int8", "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    assert "preset tiny, random weights, int8, batch 1, 110 frames" in out and "frame 100: " in out


def test_growth_is_between_marks():
    steps = [0.001] * 500 + [0.003] * 500
    stamps = [[sum(steps[:i]) for i in range(1000)]]
    found = benchmark.costs(stamps, 1000)
    assert found == pytest.approx({100: 0.001, 250: 0.001, 1000: 0.003})
    assert benchmark.costs([[0.0]], 1000) == {}  # a graph is captured once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--frames", "0"), "--frames must be at least 1"),
        (("--frames", "1594"), "1600 frames"),
        (("--threads", "-1"), "--threads must be"),
        (("--threads", "100000"), "--threads 100000 must be at most 1024"),
        (("--batch", "9" * 20), f"--batch {'9' * 20}, --midi-rows 9: need more than"),
        (("--midi-rows", "100000000"), "--batch 1, --midi-rows 100000000: need more than"),
        (("--model", "nowhere"), "--model nowhere: no such folder"),
    ],
)
def test_what_cannot_be_used(capsys, change, message):
    assert benchmark.main([*SMALL, *change]) == 2
    assert message in capsys.readouterr().err


def test_a_single_frame(monkeypatch, capsys):
    """Fewer frames than codebooks."""
    monkeypatch.setattr(benchmark, "READ_BYTES", 2**20)
    assert benchmark.main([*SMALL, "--frames", "1", "--repeat", "1"]) == 0


def test_too_little_memory_is_one_sentence(monkeypatch, capsys):
    """Other errors of torch's stay what they are."""

    def fail(args):
        raise RuntimeError(said)

    monkeypatch.setattr(benchmark, "benchmark", fail)
    said = "DefaultCPUAllocator: can't allocate memory"
    assert benchmark.main([*SMALL]) == 2
    assert capsys.readouterr().err == "benchmark: not enough memory for --batch 1 and --midi-rows 9; give fewer\n"
    said = "shapes"
    with pytest.raises(RuntimeError, match="shapes"):
        benchmark.main([*SMALL])
