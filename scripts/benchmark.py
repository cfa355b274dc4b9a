# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""How fast is it: seconds per frame, times real time, memory, and how near the AR comes to the limit of the memory.

    python -m scripts.benchmark --preset base --quantize int8
    python -m scripts.benchmark --model checkpoints/starter --json
    python -m scripts.benchmark --preset base --frames 100 --repeat 1 --baseline no-cache

One window of 150 MIDI rows after 150 prompt frames, greedy; medians of --repeat runs after a short one. A --preset has
random weights. The AR's steps read all weights and all that the cache holds: these bytes per second, over what as many
threads as the AR takes read of a large tensor, are the share of the limit. The no-cache baseline computes the whole
sequence for every frame, as the published program does; it runs once. CPU seconds say more on a machine that is not
quiet.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

import torch

from modeling_midivalle import MidiValleConfig, MidiValleForConditionalGeneration
from modeling_midivalle.configuration_midivalle import SIZES, UNITS_PER_FRAME, UNITS_PER_TICK
from modeling_midivalle.decoding_midivalle_ar import FrameDecoder, is_small, threads
from modeling_midivalle.generation_midivalle import GeneratedFrames
from scripts.models.model_folder import load_model, model_folder
from scripts.rendering.manifest import MOST_THREADS
from scripts.rendering.resources import bytes_of_row
from scripts.wording import counted

MARKS = (100, 250, 1000)  # frames at which the cost of a frame is looked at
AROUND = 20  # frames before them that are looked at
READ_BYTES = 2**28
WARM_UP = 20  # frames


class BenchmarkError(ValueError):
    """Arguments that cannot be used; one sentence."""


class Clock:
    """Seconds and CPU seconds of each part, run by run."""

    def __init__(self, device: torch.device):
        self.device, self.runs = device, []

    def start(self) -> None:
        """A new run."""
        self.runs.append({})

    def measure(self, part: str, work: Callable, *inputs):
        """What `work(*inputs)` returns; its time counts for `part`."""
        self._wait()
        wall, cpu = time.perf_counter(), time.process_time()
        result = work(*inputs)
        self._wait()
        self.runs[-1][part] = (time.perf_counter() - wall, time.process_time() - cpu)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def medians(self) -> dict[str, tuple[float, float]]:
        """Median seconds and CPU seconds of each part, and of the whole of a run."""
        runs = [run | {"whole": tuple(map(sum, zip(*run.values())))} for run in self.runs]
        return {part: tuple(statistics.median(run[part][i] for run in runs) for i in (0, 1)) for part in runs[0]}


def make_model(args: argparse.Namespace) -> MidiValleForConditionalGeneration:
    """The model of a folder, or one of a preset's size with random weights."""
    if args.model:
        model = load_model(model_folder(args.model), args.device, args.quantize, args.dtype)
    else:
        torch.manual_seed(0)
        model = MidiValleForConditionalGeneration(MidiValleConfig.from_preset(args.preset)).eval().to(args.device)
        for decoder in (model.ar, model.nar):
            decoder.to(getattr(torch, args.dtype))
        if args.quantize:
            model.quantize_(args.quantize)
    return model


def check_memory(model, args: argparse.Namespace) -> None:
    """BenchmarkError if the rows need more memory than there is in all: the system would end the process."""
    needed = args.batch * bytes_of_row(model.config, args.midi_rows + args.prompt_frames + args.frames, 2)  # at least
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if model.device.type == "cuda":
        total = torch.cuda.mem_get_info()[1]
    if needed > total:
        sizes = f"more than {needed / 2**30:.0f} GiB, and there are {total / 2**30:.0f}"
        raise BenchmarkError(f"--batch {args.batch}, --midi-rows {args.midi_rows}: need {sizes}; give fewer")


def make_inputs(model, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Rows of notes spread over prompt and target `midi_ids (B, N, 6)`, and a prompt of noise `wave (B, 1, L)`."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (args.batch, args.midi_rows), generator=generator)

    ticks = draw(0, (args.prompt_frames + args.frames) * UNITS_PER_FRAME // UNITS_PER_TICK).sort().values
    fields = [draw(4, 92), draw(4, 68), draw(10, 300), draw(388, 772), ticks % 384 + 4, ticks // 384 + 4]
    wave = torch.randn(args.batch, 1, args.prompt_frames * model.config.hop_length, generator=generator)
    return {"midi_ids": torch.stack(fields, -1).to(model.device), "wave": 0.1 * wave.to(model.device)}


def ar_inputs(model, midi_ids: torch.Tensor, prompt: torch.Tensor) -> tuple:
    """Arguments of a `FrameDecoder` up to the frames: `prompt` `(B, K, P)`, its BOS, MIDI rows `(B, N, 6)`, lengths."""
    lengths = torch.full((len(prompt),), prompt.shape[-1], device=prompt.device)
    ids = prompt[:, 0]
    if model.config.ar_config.use_target_bos:
        ids = torch.nn.functional.pad(ids, (0, 1), value=model.config.ar_config.bos_token_id)
    return ids, torch.ones_like(ids), (midi_ids, torch.ones_like(midi_ids[..., 0])), lengths


@torch.no_grad()
def run_once(model, inputs: dict, frames: int, clock: Clock) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Prompt encoding, AR, NAR and decoding: when each frame of the AR was chosen, the prompt's codes `(B, K, P)` and
    the first codebook `(B, T)`."""
    clock.start()
    prompt, moments = clock.measure("encode", model.codec.encode_codes, inputs["wave"]), []
    ids, mask, midi, lengths = ar_inputs(model, inputs["midi_ids"], prompt)
    uniform = torch.zeros(*prompt.shape[:2], frames, device=prompt.device)  # greedy: nothing is drawn with it

    def choose(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        moments.append(time.perf_counter())
        return logits.argmax(-1)

    def run_ar() -> GeneratedFrames:
        decoder, means = FrameDecoder(model.ar, ids, mask, midi, lengths, frames), bool(model.num_vector_axes)
        codes = decoder.decode(choose, uniform[:, 0], model.config.ar_config.codebook_size, keep_logits=means)
        return GeneratedFrames(codes, model._mean_vectors(0, decoder.kept) if means else None)

    first = clock.measure("ar", run_ar)
    context, ends = (prompt[..., :0], torch.zeros_like(lengths)), torch.full_like(lengths, frames)
    known = (midi, (prompt, lengths), context, first, ends)
    made = clock.measure("nar", model._generate_nar, *known, 0.0, uniform[:, 1:])
    keys = model.played_keys(*midi, lengths, frames)
    clock.measure("decode", model.codec.decode_codes, made.codes, keys and keys.struck, made.vectors)
    return moments, prompt, first.codes


def measure(model, args: argparse.Namespace) -> tuple[Clock, list[list[float]], torch.Tensor, torch.Tensor]:
    """`run_once`, `args.repeat` times: times, moments of each run, prompt and first codebook."""
    inputs, clock, stamps = make_inputs(model, args), Clock(model.device), []
    run_once(model, inputs, min(args.frames, WARM_UP), Clock(model.device))
    for run in range(args.repeat):
        say(f"run {run + 1} of {args.repeat}")
        moments, prompt, first = run_once(model, inputs, args.frames, clock)
        stamps.append(moments)
    return clock, stamps, prompt, first


@torch.no_grad()
def measure_baseline(model, args: argparse.Namespace, prompt: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds of an AR that computes the whole sequence for every frame, and its first codebook `(B, T)`."""
    ids, mask, (midi_ids, midi_mask), lengths = ar_inputs(model, make_inputs(model, args)["midi_ids"], prompt)
    size, known, clock = model.config.ar_config.codebook_size, ids.shape[1], Clock(model.device)

    def run() -> torch.Tensor:
        codes = ids
        for frame in range(args.frames):
            if frame % 10 == 0:
                say(f"without a cache: frame {frame} of {args.frames}")
            shared = {"midi_ids": midi_ids, "midi_attention_mask": midi_mask, "prompt_lengths": lengths}
            logits = model.ar(codes, use_cache=False, logits_to_keep=1, **shared).logits[:, -1, :size]
            codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], 1)
        return codes[:, known:]

    clock.start()
    codes = clock.measure("ar", run)
    return clock.runs[0]["ar"][0], codes


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over a large tensor reads, the best of 10."""
    tensor, clock = torch.ones(READ_BYTES // 4, device=device), Clock(device)
    for _ in range(10):
        clock.start()
        clock.measure("read", tensor.sum)
    return READ_BYTES / min(run["read"][0] for run in clock.runs)


def bytes_of_step(model, args: argparse.Namespace, prompt: torch.Tensor) -> float:
    """What the AR reads for a frame halfway after `prompt` `(B, K, P)`: the weights of blocks and head, and the filled
    cache, whose keys and values may be of another type."""
    parts = (model.ar.model.layers, model.ar.model.norm, model.ar.lm_head)
    weights = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    config = model.ar.config
    places = args.batch * (args.midi_rows + args.prompt_frames + config.use_target_bos + args.frames / 2)
    decoder = FrameDecoder(model.ar, *ar_inputs(model, make_inputs(model, args)["midi_ids"], prompt), 1)
    stored = decoder.stored_dtype or model.ar.lm_head.weight.dtype
    cache = 2 * places * config.num_hidden_layers * config.hidden_size * stored.itemsize
    return sum(tensor.numel() * tensor.element_size() for tensor in weights) + cache


def costs(stamps: list[list[float]], frames: int) -> dict[int, float]:
    """Median seconds of the `AROUND` frames before each mark; none where steps cannot be watched (CUDA graphs)."""
    steps = [[b - a for a, b in zip(moments, moments[1:])] for moments in stamps if len(moments) == frames]
    marks = [mark for mark in MARKS if AROUND < mark <= frames] if steps else []
    return {m: statistics.median(s for run in steps for s in run[m - 1 - AROUND : m - 1]) for m in marks}


def benchmark(args: argparse.Namespace) -> dict:
    """Measure what the command line says; the entries of the JSON line."""
    model = make_model(args)
    check_memory(model, args)
    clock, stamps, prompt, first = measure(model, args)
    total, medians, marks = args.frames * args.batch, clock.medians(), costs(stamps, args.frames)
    parts = {
        part: {"seconds_per_frame": wall / total, "cpu_seconds_per_frame": cpu / total}
        | {"real_time_factor": total / model.config.frame_rate / max(wall, 1e-9), "seconds": wall}
        for part, (wall, cpu) in medians.items()
    }
    device = model.device.type
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else rss_mib()  # before the large tensor
    with threads(1 if is_small(model.ar, args.batch) else torch.get_num_threads()):
        bandwidth = read_bandwidth(model.device)
    speed = bytes_of_step(model, args, prompt) * args.frames / medians["ar"][0]
    result = {key: parts["whole"][key] for key in ("seconds_per_frame", "real_time_factor")}
    result |= {"peak_memory_mb": peak, "bandwidth_share": speed / bandwidth, "speedup_over_baseline": None}
    if args.baseline:
        seconds, codes = measure_baseline(model, args, prompt)
        result |= {"speedup_over_baseline": seconds / medians["ar"][0], "baseline_seconds": seconds}
        result["baseline_same_codes"] = (codes == first).double().mean().item()
    result |= {"parts": parts, "ar_bytes_per_second": speed, "read_bytes_per_second": bandwidth}
    result |= {"frame_seconds": {str(mark): seconds for mark, seconds in marks.items()}}
    result["growth"] = {
        f"{a}-{MARKS[-1]}": marks[MARKS[-1]] / marks[a] for a in marks if MARKS[-1] in marks and a < 1000
    }
    settings = ("preset", "model", "frames", "batch", "midi_rows", "prompt_frames", "quantize", "dtype", "repeat")
    result |= {name: getattr(args, name) for name in settings} | {"device": device}
    result |= {"threads": torch.get_num_threads(), "processor": processor(model.device), "torch": torch.__version__}
    return result | {"date": str(date.today())}


def rss_mib() -> float:
    """Most memory that this process has held, MiB."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**20 if sys.platform == "darwin" else 2**10)


def processor(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def say(message: str) -> None:
    """Progress, on standard error."""
    print(f"benchmark: {message}", file=sys.stderr, flush=True)


def report(result: dict) -> str:
    """The result as lines for a reader."""
    what = result["model"] or f"preset {result['preset']}, random weights"
    lines = [
        f"{what}, {result['quantize'] or result['dtype']}, batch {result['batch']}, "
        f"{counted(result['frames'], 'frame')}; {result['processor']}, "
        f"{counted(result['threads'], 'thread')}, torch {result['torch']}, {result['date']}"
    ]
    for name, part in result["parts"].items():
        wall, cpu = (part[key] * 1e3 for key in ("seconds_per_frame", "cpu_seconds_per_frame"))
        speed = f"{part['real_time_factor']:.2f}x real time, {part['seconds']:.2f} s"
        lines.append(f"{name:7} {wall:9.3f} ms a frame ({cpu:.3f} CPU), {speed}")
    lines.append(
        f"AR reads {result['ar_bytes_per_second'] / 1e9:.1f} of {result['read_bytes_per_second'] / 1e9:.1f} GB/s: "
        f"{result['bandwidth_share']:.0%}; peak memory {result['peak_memory_mb']:.0f} MiB"
    )
    for mark, seconds in result["frame_seconds"].items():
        grown = result["growth"].get(f"{mark}-{MARKS[-1]}")
        lines.append(
            f"frame {mark}: {seconds * 1e3:.3f} ms" + (f"; frame {MARKS[-1]}: {grown:.2f} times" if grown else "")
        )
    if result["speedup_over_baseline"] is not None:
        lines.append(
            f"without a cache: {result['baseline_seconds']:.1f} s, {result['speedup_over_baseline']:.1f} times ours; "
            f"{result['baseline_same_codes']:.2%} of the codes are the same"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(SIZES), default="base", help="size (%(default)s)")
    parser.add_argument("--model", metavar="FOLDER", help="a model folder or Hub id instead of a preset")
    parser.add_argument("--frames", type=int, default=1000, help="new frames, 50 a second (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="rows side by side (%(default)s)")
    parser.add_argument("--quantize", choices=("int8",), help="weights of both decoders")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the decoders (%(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--repeat", type=int, default=5, help="runs, of which the median counts (%(default)s)")
    parser.add_argument("--baseline", choices=("no-cache",), help="also run the AR without a cache, once")
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--midi-rows", type=int, default=150, help="default: %(default)s")
    parser.add_argument("--prompt-frames", type=int, default=150, help="default: %(default)s")
    args = parser.parse_args(argv)
    args.preset = None if args.model else args.preset
    counts = {name: getattr(args, name) for name in ("frames", "batch", "repeat", "midi_rows", "prompt_frames")}
    if wrong := [
        name for name, count in (counts | {"threads": 1 if args.threads is None else args.threads}).items() if count < 1
    ]:
        raise BenchmarkError(f"--{wrong[0].replace('_', '-')} must be at least 1")
    if (args.threads or 1) > MOST_THREADS:
        raise BenchmarkError(f"--threads {args.threads} must be at most {MOST_THREADS}")
    if args.prompt_frames + args.frames > 1600:
        raise BenchmarkError(f"--frames {args.frames}: one window holds 1600 frames of prompt and target at most")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: no GPU is available")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 on success, 2 on arguments that cannot be used."""
    try:
        args = parse(argv)
        if args.threads:
            torch.set_num_threads(args.threads)
        result = benchmark(args)
    except ValueError as error:
        say(error)
        return 2
    except RuntimeError as error:
        if "memory" not in str(error):  # torch has no class for it on a CPU
            raise
        say(f"not enough memory for --batch {args.batch} and --midi-rows {args.midi_rows}; give fewer")
        return 2
    print(json.dumps(result) if args.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
