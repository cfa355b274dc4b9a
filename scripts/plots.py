# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Piano roll above spectrogram, on one time axis.

python -m scripts.plots demo.wav demo.mid demo.png
python -m scripts.plots span.wav demo.mid span.png --start 60     # of scripts.render demo.mid span.wav --start 60
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
from scipy.signal import stft

from processing.audio_midivalle import read_audio, to_mono_32k
from tokenization.midi_midivalle import load_performance

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  after the choice of a backend without a screen
from matplotlib.collections import PatchCollection  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from scripts.unfinished import unfinished_file

SAMPLING_RATE = 32_000
LOWEST_HZ, HIGHEST_HZ, ROWS = 27.5, 14_080.0, 432  # nine octaves, four rows a semitone
MAX_COLUMNS = 2_000
RANGE_DB = 80.0
SOFTEST_PEAK_DB = -100.0  # below it a file is silent, and silence is dark


def log_spectrogram(wave: np.ndarray) -> np.ndarray:
    """`wave` (samples,) at 32 kHz -> dB relative to its peak `(ROWS, columns)`, rows geometric in frequency."""
    hop = max(256, -(-len(wave) // MAX_COLUMNS))
    window = min(max(4096, 2 * hop), len(wave))
    hop = min(hop, window)
    frequencies, _, spectrum = stft(wave, SAMPLING_RATE, nperseg=window, noverlap=window - hop, boundary="zeros")
    level = np.log10(np.maximum(np.abs(spectrum), 1e-10)) * 20
    wanted = np.geomspace(LOWEST_HZ, HIGHEST_HZ, ROWS)
    place = np.interp(wanted, frequencies, np.arange(len(frequencies)))
    low = np.floor(place).astype(int)
    share = (place - low)[:, None]
    level = level[low] * (1 - share) + level[np.minimum(low + 1, len(level) - 1)] * share
    return np.maximum(level - max(level.max(), SOFTEST_PEAK_DB), -RANGE_DB)


def draw_spectrogram(axis, wave: np.ndarray):
    """Draw the spectrogram of `wave` (samples,) at 32 kHz on a matplotlib axis: s by semitones above 27.5 Hz."""
    image = log_spectrogram(wave)
    octaves = np.log2(HIGHEST_HZ / LOWEST_HZ)
    extent = (0, len(wave) / SAMPLING_RATE, 0, octaves)
    axis.imshow(image, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-RANGE_DB, vmax=0)
    axis.set_yticks(np.arange(0, octaves), [f"{LOWEST_HZ * 2**octave:g}" for octave in range(int(octaves))])
    axis.set_ylabel("frequency, Hz")
    axis.set_xlabel("time, s")


def draw_piano_roll(axis, notes: np.ndarray):
    """Draw `notes` (fields onset, duration, pitch, velocity) on a matplotlib axis; darker is louder."""
    boxes = [Rectangle((n["onset"], n["pitch"] - 0.4), n["duration"], 0.8) for n in notes]
    collection = PatchCollection(boxes, cmap="viridis_r")
    collection.set_array(notes["velocity"])
    collection.set_clim(0, 127)
    axis.add_collection(collection)
    axis.set_ylim(20, 109)
    axis.set_yticks(range(24, 109, 12), [f"C{octave}" for octave in range(1, 9)])
    axis.set_ylabel("key")


def plot_render(wave: np.ndarray, notes: np.ndarray, title: str = ""):
    """A matplotlib figure: `notes` (with pedal) above the spectrogram of `wave` (samples,) at 32 kHz."""
    figure, (roll, spectrogram) = pyplot.subplots(
        2, sharex=True, figsize=(12, 7), layout="constrained", height_ratios=(2, 3)
    )
    draw_piano_roll(roll, notes)
    draw_spectrogram(spectrogram, wave)
    spectrogram.set_xlim(0, len(wave) / SAMPLING_RATE)
    roll.set_title(title, parse_math=False)  # names of files may hold dollars
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("audio", metavar="AUDIO.wav", help="WAV or FLAC")
    parser.add_argument("midi", metavar="INPUT.mid", help="the performance that was rendered")
    parser.add_argument("output", metavar="OUTPUT.png", help="replaced if it exists")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="where in the MIDI the audio begins, s")
    args = parser.parse_args(argv)
    if not 0 <= args.start < math.inf:
        print(f"plots: --start {args.start} must be 0 or more", file=sys.stderr)
        return 2
    if not Path(args.output).suffix.strip("."):  # matplotlib would write another file, with .png behind the name
        print(f"plots: {args.output}: has no ending that tells the kind of picture; add .png", file=sys.stderr)
        return 2
    try:
        wave = to_mono_32k(*read_audio(args.audio))
        notes = load_performance(args.midi).notes
        notes["onset"] -= args.start
    except ValueError as error:  # MidiError or AudioError
        print(f"plots: {error}", file=sys.stderr)
        return 2
    figure = plot_render(wave, notes, f"{Path(args.midi).name}, rendered")
    output = Path(args.output)
    try:
        with unfinished_file(output) as partial:
            figure.savefig(partial, dpi=100, format=output.suffix[1:].lower())
    except (ValueError, OSError) as error:  # another ending than of a picture; a folder that is not there
        print(f"plots: {args.output}: cannot be written ({getattr(error, 'strerror', None) or error})", file=sys.stderr)
        return 2
    finally:
        pyplot.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
