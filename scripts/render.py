# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Render MIDI performances of any length on the piano and in the room of a prompt.

    python -m scripts.render piece.mid piece.wav
    python -m scripts.render piece.mid piece.flac --prompt upright_living_room --start 60 --end 90
    python -m scripts.render piece.mid piece.wav --prompt-audio mine.wav --prompt-midi mine.mid
    python -m scripts.render piece.mid piece.wav --adapter my_piano --prompt-audio mine.wav --prompt-midi mine.mid
    python -m scripts.render piece.mid --stream - | aplay
    python -m scripts.render recital/ encore.mid --output-dir sound --batch-size 4
    python -m scripts.render --from-manifest piece.json again.wav
    python -m scripts.render --list-prompts

The output lasts exactly until the end of the last sounding note plus the ring-out; with --compat published, until the
model ends it. Beside piece.wav stands piece.json: what it was made of, and all that is needed to make it again bit by
bit. A render that was interrupted goes on where it stopped when it is started again. Same seed, same output; without
--temperature the starter does not draw at all. Input that cannot be used gives one sentence, exit code 2 and no file;
of several files the others are rendered.
"""

import argparse
import sys
import time
from contextlib import AbstractContextManager, nullcontext

from scripts.models.model_folder import model_folder, read_prompts
from scripts.rendering.arguments import build_parser, check_arguments, say
from scripts.rendering.startup import quick_imports

BEGIN = time.perf_counter()  # before anything heavy is imported


def main(argv: list[str] | None = None, imports: AbstractContextManager | None = None) -> int:
    """The command. Returns the exit code: 0, 2 for input that cannot be used, 130 if interrupted. The heavy `imports`
    run inside that context."""
    args = build_parser(__doc__).parse_intermixed_args(argv)  # options may stand between the paths
    if hasattr(sys.stdout, "reconfigure"):  # names that it cannot encode are no reason to fail, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_arguments(args)
        if args.list_prompts:
            return list_prompts(args)
        with imports or nullcontext():
            from scripts.rendering.files import render_files

        return render_files(args, BEGIN)
    except ValueError as error:  # RenderError, FolderError, or MidiError, AudioError, ProcessorError: not yet imported
        say(error)
        return 2
    except OSError as error:  # a folder that is closed, a name that is too long, a disk that is full
        say(f"{error.filename or 'the output'}: cannot be used ({error.strerror})")
        return 2
    except KeyboardInterrupt:
        say("interrupted; start it again to go on: windows that were finished are kept")
        return 130


def list_prompts(args: argparse.Namespace) -> int:
    """Print the bundled prompts of a model."""
    for i, prompt in enumerate(read_prompts(model_folder(args.model))):
        print(f"{prompt.name}{' (default)' if i == 0 else ''}: {prompt.description} [{prompt.licence}]")
    return 0


if __name__ == "__main__":
    sys.exit(main(imports=quick_imports()))
