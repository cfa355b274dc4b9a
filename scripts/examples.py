# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The bundled music, made here: example performances and the prompts of the starter checkpoint.

    python -m scripts.examples midi --output space/examples
    python -m scripts.examples prompts --piano steinway_splendid.tar ... --output checkpoints/starter/prompts
    python -m scripts.examples recordings --piano steinway_splendid.tar ... --output results/listen

The examples are public-domain works written out by us; the interpretation is a tempo and a loudness curve, voicing and
pedal. The prompts are our own music. The recordings are examples on the pianos and in the rooms of prompts, to be held
against what a model makes of both. Equal arguments write equal MIDI files.
"""

import argparse
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from scripts.audio.composing import Piece, Voice, perform
from scripts.audio.pianos import SAMPLING_RATE, SourceError, load_piano, performance_level
from scripts.audio.rooms import Room
from scripts.unfinished import WriteError, check_output_folder
from tokenization.midi_midivalle import load_performance

PROMPT_SECONDS = 6.0
RECORDING_SECONDS = 25.0

# J. S. Bach, Prelude BWV 846, bars 1 to 19: per half bar a bass, a tenor held to its end and three broken notes.
BACH_BARS = """
C4 E4 G4 C5 E5 | C4 D4 A4 D5 F5 | B3 D4 G4 D5 F5 | C4 E4 G4 C5 E5 | C4 E4 A4 E5 A5 | C4 D4 F#4 A4 D5 | B3 D4 G4 D5 G5
B3 C4 E4 G4 C5 | A3 C4 E4 G4 C5 | D3 A3 D4 F#4 C5 | G3 B3 D4 G4 B4 | G3 Bb3 E4 G4 C#5 | F3 A3 D4 A4 D5 | F3 Ab3 D4 F4 B4
E3 G3 C4 G4 C5 | E3 F3 A3 C4 F4 | D3 F3 A3 C4 F4 | G2 D3 G3 B3 F4 | C3 E3 G3 C4 E4
""".replace("|", " ").split()

# F. Chopin, Prelude op. 28 no. 7, complete: melody with its chords, bass, left-hand chords. Two tied inner notes apart.
CHOPIN_RIGHT = """
E4:1 | C#5:.75 D5:.25 D4+G#4+B4:1 D4+G#4+B4 | D4+G#4+B4:2 D5+F#5:1 | C5+D#5:.75 C#5+E5:.25 C#5+A5:1 C#5+A5
C#5+A5:2 E4+C#5:1 | C#4+A#4:.75 D4+B4:.25 F#4+D5:1 F#4+D5 | F#4+D5:2 D4+G#4:1
D4+G#4:.75 C#4+A4:.25 C#4+C#5:1 C#4+C#5 | C#4+C#5:2 r:1 | C#5:.75 D5:.25 D4+G#4+B4:1 D4+G#4+B4
D4+G#4+B4:2 D5+F#5:1 | C5+D#5:.75 C#5+E5:.25 C#5+E5+A5+C#6:1 A5+C#6 | A#4+C#5+E5+A#5+C#6:2 A#4+C#5:1
A#4+C#5:.75 B4+D5:.25 B4+F#5:1 A4+F#5 | G#4+F#5:2 D4+G#4:1 | D4+B4:.75 C#4+A4:.25 A4+C#5+A5:1 C#5+A5 | C#5+A5:2.6
"""
CHOPIN_BASS = "r:1 | E2:3 | r | A2 | r | E2 | r | A1 | r | E2 | r | A2 | r | B1 | r | A1"
CHOPIN_LEFT = """
r:2 E3+E4:1 E3+E4 | E3+E4:2 r:2 A3+E4:1 A3+E4 | A3+E4:2 r:2 E3+B3:1 E3+B3 | E3+B3:2 r:2 E3+A3+E4:1 E3+A3+E4
E3+A3+E4:2 r:2 E3+E4:1 E3+E4 | E3+E4:2 r:2 A3+E4+A4:1 A3+E4+A4 | F#3+C#4+E4+F#4:2 r:2 F#3+D4:1 F#3+B3+D4
E3+B3+D4:2 r:2 E3+A3+E4:1 A3+E4 | A3+E4:2.6
"""


def _bach() -> Piece:
    """Each bar swells; the phrases lean into bars 5, 12 and 14 and come to rest in bar 19. The last chord is ours."""
    bars = [BACH_BARS[i : i + 5] for i in range(0, len(BACH_BARS), 5)]
    half = [(2 * i, bars[i // 2]) for i in range(2 * len(bars))]
    bass = " ".join(f"{notes[0]}:2" for _, notes in half)
    tenor = " ".join(f"r:.25 {notes[1]}:1.75" for _, notes in half)
    upper = " ".join(f"r:.5 {a}:.25 {b} {c} {a} {b} {c}" for _, (_, _, a, b, c) in half)
    last = 4 * len(bars)
    tempo = [(0, 56), (2, 70), (14, 72), (16, 68), (18, 74), (42, 72), (43.5, 60), (45, 72), (64, 74), (68, 68)]
    tempo += [(last - 4, 58), (last - 1, 40), (last, 34)]
    swell = [50, 57, 62, 53, 68, 60, 68, 58, 53, 60, 54, 68, 58, 72, 57, 54, 50, 56, 46]
    dynamics = [(4 * i + 1.5, v) for i, v in enumerate(swell)] + [(last, 38)]
    voices = (Voice(bass, 7, 1.02), Voice(tenor, -2, 1.02), Voice(upper, 0, 1.15), Voice("C3+G3+E4+C5:4", -2, 1, last))
    return Piece(voices, tuple(tempo), tuple(dynamics), (*range(0, last + 1, 4),), last + 3.5)


def _chopin() -> Piece:
    """Two-bar phrases: each yields before its last chord; the climax is the F sharp seventh chord of bar 12."""
    tempo, dynamics = [(0, 52)], [(0, 46)]
    loud = (54, 60, 52, 54, 56, 84, 62, 46)
    for i, top in enumerate(loud):
        start = 1 + 6 * i
        tempo += [(start, 66), (start + 1.5, 76), (start + 3, 70), (start + 4.5, 54)]
        dynamics += [(start, top - 8), (start + 1.5, top), (start + 3, top - 2), (start + 5, top - 14)]
    tempo[21:25] = [(31, 62), (32.5, 66), (34, 48), (36, 46)]  # into the climax, and time for it to sound
    tempo[-2:] = [(46, 48), (48, 36)]
    dynamics[-3:] = [(44.5, 46), (46, 40), (48, 34)]
    dynamics[21:25] = [(31, 66), (32.5, 78), (34, 88), (36, 64)]
    tied = (Voice("E4:2", 12, 1.0, 24), Voice("G#4:1", -4, 1.0, 25))
    voices = (Voice(CHOPIN_RIGHT, 14, 1.03), *tied, Voice(CHOPIN_BASS, 4, 0.6), Voice(CHOPIN_LEFT, -8, 0.95))
    pedal = sorted({*range(1, 48, 6), *range(6, 48, 6), 34})  # with the bass, at each upbeat, and at the climax
    return Piece(voices, tuple(tempo), tuple(dynamics), tuple(pedal), 49.5, beats_per_bar=3)


EXAMPLES = {"chopin_prelude_op28_no7": _chopin, "bach_prelude_c_bwv846": _bach}

# Six seconds each, from the lowest octave to the highest and from piano to forte, since the model hears the piano here.
PROMPT_MUSIC = {
    "broad": Piece(
        (
            Voice("r:.5 Bb4:.75 G4:.25 Eb5:.5 Ab4+C5+Eb5+Ab5:1 G5:.5 F5 D5+F5+Bb5+D6:.75 C6:.25 Bb5:.5 Ab5", 10, 1.05),
            Voice("Eb2:.5 Bb2 G3 Bb3 | Ab1 Eb2 C3 Ab3 | Bb1 F2 Ab2+D3:1 | Eb1+Eb2:2", 0, 1.05),
            Voice("G5:.5 Bb5 Eb6 G6 Bb6:1.5", 2, 1.0, 6),
        ),
        ((0, 86), (3, 102), (5, 96), (8, 84)),
        ((0, 38), (2, 62), (4, 92), (5, 84), (6, 54), (8, 34)),
        (0, 2, 4, 6),
        9.5,
        0.12,
    ),
    "lament": Piece(
        (
            Voice("A4:1 C#5 D5:.75 E5:.25 D5:1 F5:.5 E5 C#5:.75 E5:.25 D6:1.5", 12, 1.04),
            Voice("A3+F4:1 A3+E4 A3+D4+F#4 G3+D4+G4 F3+D4+Bb4 G3+C#4+G4 F3+A4+D5:1.5", -6, 1.0),
            Voice("D2:1 C#2 C2 B1 Bb0+Bb1 A0+A1 D1+D2:1.5", 3, 1.05),
        ),
        ((0, 66), (4, 76), (5.5, 68), (7, 60)),
        ((0, 34), (3, 70), (4, 88), (5, 74), (6, 38)),
        (0, 1, 2, 3, 4, 5, 6),
        9.0,
        0.12,
    ),
    "scherzo": Piece(
        (
            Voice("C5:.25 D5 E5 F5 G5 A5 B5 C6 | E6:.5 C6 G5 E5 | F5+A5:.5 r F#5+A5 r | G5+B5+D6+G6:1 r:.5", 8, 0.8),
            Voice("C2+C3:.5 r G3+C4+E4 r | A1+A2 r A3+C4+E4 r | D2+D3 r D1+D2 r | G1+G2:1 r:.5", 4, 0.7),
            Voice("E7:.5 D7 B6 G6:.25 F6 D6 B5 G5:.5 E5+C6:2", -2, 1.0, 7.5),
            Voice("C1+G1:3", 0, 1.0, 9.5),
        ),
        ((0, 112), (6, 122), (8, 112), (11, 92)),
        ((0, 58), (2, 76), (6, 106), (7.5, 60), (9.5, 42), (11, 36)),
        (2, 2.8, 6, 6.8, 7.5, 9.5),
        12.5,
        0.12,
    ),
}

LICENCES = {
    "steinway_splendid": ("public domain", "AKAI Splendid Grand samples, prepared by sfzinstruments"),
    "yamahaC3_close": ("CC BY 4.0", "Headroom Piano by Bengt Nilsson, close microphones"),
    "yamahaC3_decca": ("CC BY 4.0", "Headroom Piano by Bengt Nilsson, Decca tree microphones"),
    "upright_kw": ("CC0", "Upright Piano KW, freepats project"),
}


@dataclass(frozen=True)
class Prompt:
    """One bundled prompt: music of `PROMPT_MUSIC` on a piano of `LICENCES` in a room of `scripts.audio.rooms.ROOMS`."""

    name: str
    description: str
    piano: str
    room: str
    music: str


PROMPTS = (
    Prompt("steinway_studio", "Steinway grand in a studio", "steinway_splendid", "studio", "broad"),
    Prompt("steinway_concert_hall", "Steinway grand in a concert hall", "steinway_splendid", "concert_hall", "lament"),
    Prompt("yamaha_chamber_hall", "Yamaha C3, close, in a chamber hall", "yamahaC3_close", "chamber_hall", "scherzo"),
    Prompt("yamaha_decca_living_room", "Yamaha C3, distant, at home", "yamahaC3_decca", "living_room", "broad"),
    Prompt("upright_living_room", "Kawai upright at home", "upright_kw", "living_room", "lament"),
    Prompt("upright_old_tape", "Kawai upright on an old tape", "upright_kw", "old_tape", "scherzo"),
)

RECORDINGS = (("chopin_prelude_op28_no7", "steinway_studio"), ("bach_prelude_c_bwv846", "upright_living_room"))


def write_examples(output: Path) -> list[Path]:
    """Write the example performances as MIDI files; returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{name}.mid" for name in EXAMPLES]
    for seed, (path, compose) in enumerate(zip(paths, EXAMPLES.values(), strict=True)):
        path.write_bytes(perform(compose(), seed).dumps_midi())  # `dump_midi` says nothing of a full disk
    return paths


def write_prompts(pianos: dict[str, Path], output: Path) -> list[str]:
    """Render every prompt and write NAME.flac (6.0 s, mono, 32 kHz, 16 bit), NAME.mid and prompts.json, whose first
    entry is the default prompt.

    Args:
        pianos: path of each piano of `LICENCES` by its name.
        output: folder, made if absent.
    Returns:
        The prompts' names.
    Raises:
        SourceError: a piano is missing or unreadable; nothing is written then.
    """
    check_pianos(pianos, set(LICENCES))
    entries, files = [], {}
    for seed, prompt in enumerate(PROMPTS):
        score = perform(PROMPT_MUSIC[prompt.music], seed)
        sound = record(prompt, load_performance(score).notes, pianos, PROMPT_SECONDS)
        files |= {f"{prompt.name}.mid": score.dumps_midi(), f"{prompt.name}.flac": sound}
        licence, attribution = LICENCES[prompt.piano]
        entries.append(
            {"name": prompt.name, "description": prompt.description, "piano": prompt.piano, "room": prompt.room}
            | {"licence": licence, "attribution": f"{attribution}; simulated room; music and rendering by this project"}
        )
    files["prompts.json"] = (json.dumps(entries, indent=2) + "\n").encode()
    write_files(files, output)
    return [prompt.name for prompt in PROMPTS]


def write_recordings(pianos: dict[str, Path], output: Path) -> list[str]:
    """Render the beginnings of `RECORDINGS` and write EXAMPLE_PROMPT_sampled.flac (25 s), on the piano and in the room
    of that prompt. Returns the files' names; else as `write_prompts`."""
    chosen = [(example, prompt) for example, name in RECORDINGS for prompt in PROMPTS if prompt.name == name]
    check_pianos(pianos, {prompt.piano for _, prompt in chosen})
    files = {}
    for example, prompt in chosen:
        notes = load_performance(perform(EXAMPLES[example](), list(EXAMPLES).index(example))).notes
        notes = notes[notes["onset"] < RECORDING_SECONDS]
        files[f"{example}_{prompt.name}_sampled.flac"] = record(prompt, notes, pianos, RECORDING_SECONDS)
    write_files(files, output)
    return list(files)


def check_pianos(pianos: dict[str, Path], needed: set[str]) -> None:
    """`SourceError` if one of the pianos is not there."""
    if missing := sorted(needed - set(pianos)):
        raise SourceError(f"no piano named {', '.join(missing)}: give each by --piano PATH/NAME or PATH/NAME.tar")


def record(prompt: Prompt, notes: np.ndarray, pianos: dict[str, Path], seconds: float) -> bytes:
    """A FLAC file (mono, 32 kHz, 16 bit) of notes on the piano and in the room of a prompt."""
    seed = PROMPTS.index(prompt)
    dry = load_piano(str(pianos[prompt.piano]))(notes, seconds)
    wave = Room(prompt.room, seed, jitter=0.0)(dry, performance_level(notes), np.random.default_rng(seed))
    sound = io.BytesIO()
    soundfile.write(sound, wave, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return sound.getvalue()


def write_files(files: dict[str, bytes], output: Path) -> None:
    """Files of a folder, by name: now that every piano has played."""
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 on success, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m scripts.examples", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    midi = commands.add_parser("midi", help="write the example performances")
    midi.add_argument("--output", type=Path, default=Path("space/examples"), help="folder (default: %(default)s)")
    for name, output, words in (
        ("prompts", "checkpoints/starter/prompts", "render the prompts of the starter checkpoint"),
        ("recordings", "results/listen", "render the beginnings of examples on the pianos and in the rooms of prompts"),
    ):
        sound = commands.add_parser(name, help=words)
        sound.add_argument("--piano", type=Path, nargs="+", required=True, help="folder or tar of each sampled piano")
        sound.add_argument("--output", type=Path, default=Path(output), help="folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        check_output_folder(arguments.output, "--output")
        if arguments.command == "midi":
            names = [str(path) for path in write_examples(arguments.output)]
        else:
            pianos = {path.name.removesuffix(".tar"): path for path in arguments.piano}
            if len(pianos) < len(arguments.piano):
                raise SourceError("--piano: two have the same name; give each piano once, as a folder or as a tar")
            write = write_prompts if arguments.command == "prompts" else write_recordings
            names = write(pianos, arguments.output)
    except (SourceError, WriteError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full
        print(f"--output {arguments.output}: cannot be written to ({error.strerror}); give another", file=sys.stderr)
        return 2
    print("\n".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
