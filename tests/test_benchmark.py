# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.benchmark`: that it runs and agrees with itself, not how fast it is."""

import json

import pytest
import torch

from modeling_midivalle import decoding_midivalle_ar
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


def test_the_large_tensor_is_read_as_the_ar_reads_and_not_counted(monkeypatch):
    """A small AR takes one thread; 256 MiB of the benchmark's own are no memory of the model's."""
    asked, before = [], torch.get_num_threads()
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: asked.append(torch.get_num_threads()) or 1e9)
    monkeypatch.setattr(benchmark, "rss_mib", lambda: 900.0 if asked else 700.0)
    try:
        torch.set_num_threads(2)
        result = benchmark.benchmark(benchmark.parse([*SMALL, "--frames", "2", "--repeat", "1"]))
        assert torch.get_num_threads() == result["threads"] == 2
    finally:
        torch.set_num_threads(before)
    assert asked == [1] and result["peak_memory_mb"] == 700


def test_the_cache_counts_as_it_is_stored(monkeypatch):
    """Of int8 layers in 16 bits, on processors that attend so."""
    args = benchmark.parse([*SMALL, "--frames", "30", "--quantize", "int8"])
    model, found = benchmark.make_model(args), []
    for has_bf16 in (False, True):
        monkeypatch.setattr(decoding_midivalle_ar, "_has_bf16_attention", lambda device, has=has_bf16: has)
        found.append(benchmark.bytes_of_step(model, args, torch.zeros(1, 4, 7, dtype=torch.long)))
    config = model.ar.config
    places = 9 + 7 + config.use_target_bos + 15  # MIDI rows, prompt frames, half of the new frames
    assert found[0] - found[1] == 2 * places * config.num_hidden_layers * config.hidden_size * 2


def test_a_folder_is_no_preset(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    args = benchmark.parse(["--model", str(tmp_path), *SMALL[2:], "--frames", "2", "--repeat", "1"])
    result = benchmark.benchmark(args)
    assert (result["preset"], result["model"]) == (None, str(tmp_path))


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
