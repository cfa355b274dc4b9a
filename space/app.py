# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A page that renders an uploaded MIDI performance on a bundled or own piano: a Hugging Face Space, or at home.

    MIDIVALLE_MODEL=checkpoints/starter python space/app.py

`MIDIVALLE_MODEL` is a folder or a Hub id, `MIDIVALLE_REVISION` the commit of the latter. The page imports nothing of
the repository: model and processor come with their code from the model's folder.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModel, AutoProcessor

DEFAULT_MODEL = "checkpoints/starter"
MODEL = os.environ.get("MIDIVALLE_MODEL", DEFAULT_MODEL)
REVISION = os.environ.get("MIDIVALLE_REVISION")
EXAMPLES = Path(__file__).parent / "examples"
MIDI_ENDINGS = [".mid", ".midi", ".kar", ".smf"]  # those that the tokenizer knows
MAX_BYTES, MAX_NOTES, MAX_MINUTES = 2_000_000, 5_000, 10  # of a MIDI file
MAX_PROMPT_BYTES, MAX_PROMPT_SECONDS = 25_000_000, 120.0  # of an uploaded recording: two minutes of a CD's format
MAX_SECONDS = 60.0  # rendered at once
RING_OUT_S = 2.0
DEADLINE_S = 180.0  # wall time, checked between windows: no request may hold its place for ever
MAX_SEED = 2**31 - 1


class SpaceError(ValueError):
    """A request that is refused; one sentence for the user."""


@lru_cache(maxsize=1)
def load() -> tuple:
    """Folder, processor and model, loaded once."""
    if MODEL == DEFAULT_MODEL and not Path(MODEL).is_dir():  # as a Hub id it is a stranger's, whose code would be run
        raise SystemExit(f"{MODEL}: no such folder here; set MIDIVALLE_MODEL to a model's folder or Hub id")
    folder = Path(MODEL) if Path(MODEL).is_dir() else Path(snapshot_download(MODEL, revision=REVISION))
    if "CPU_CORES" in os.environ:  # a Space's share of a machine of which torch counts all cores
        torch.set_num_threads(int(os.environ["CPU_CORES"]))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    return folder, processor, model.to("cuda" if torch.cuda.is_available() else "cpu")


def bundled_prompts() -> dict[str, str]:
    """Names of the model's bundled prompts and what they are, the default first; a model may have none."""
    path = load()[0] / "prompts" / "prompts.json"
    return {entry["name"]: entry["description"] for entry in json.loads(path.read_text())} if path.is_file() else {}


def licence() -> str:
    """The licence of the model's weights by its card, as a sentence; "" if it says nothing."""
    path = load()[0] / "README.md"
    name = ModelCard.load(path).data.get("license") if path.is_file() else None
    return f"Licence of the model's weights: {name}." if name else ""


def prompt_files(name: str) -> dict[str, str]:
    """The files of a bundled prompt, as the processor takes them."""
    if name not in bundled_prompts():
        raise SpaceError("unknown prompt; choose one of the list, or give a recording of your own")
    path = load()[0] / "prompts" / name
    return {"prompt_midi": f"{path}.mid", "prompt_audio": f"{path}.flac"}


def check_size(file: str, limit: int) -> None:
    """Refuse a file that is not there any more (gradio clears its cache), or of more than `limit` bytes."""
    try:
        size = os.path.getsize(file)
    except OSError as error:
        raise SpaceError(f"{Path(file).name}: the file is not here any more; upload it again") from error
    if size > limit:
        raise SpaceError(f"{Path(file).name}: the file is larger than {limit // 1_000_000} MB")


def check_number(label: str, value) -> None:
    """Refuse what is not a number: None of an emptied field, or a text of a program that calls the page."""
    if value is None:
        raise SpaceError(f"the {label} is missing; give a number")
    if not isinstance(value, int | float):
        raise SpaceError(f"the {label} is {str(value)[:20]!r}; give a number")


def read_whole(midi: str):
    """An uploaded MIDI file (a `Performance`); a ValueError of one sentence if it is unusable or too much."""
    check_size(midi, MAX_BYTES)
    whole = load()[1].load(midi)
    if len(whole.notes) > MAX_NOTES or whole.end > 60 * MAX_MINUTES:
        raise SpaceError(f"{whole.name} has more than {MAX_NOTES} notes or {MAX_MINUTES} minutes; give a part of it")
    return whole


def choose_prompt(name: str, audio: str | None, midi: str | None) -> tuple[dict, list[str]]:
    """The uploaded prompt, or a bundled one if none is.

    Args:
        name: one of `bundled_prompts`.
        audio: path of an uploaded recording, of which the processor chooses the best part.
        midi: path of its MIDI, in time with it; the processor corrects small offsets.
    Returns:
        The prompt as the processor takes it, and what the user should know of it, in sentences; "" says nothing.
    Raises:
        ValueError: one of the two files is missing, or cannot be used; one sentence.
    """
    if audio is None and midi is None:
        return prompt_files(name), []
    if audio is None or midi is None:
        given, missing = ("MIDI", "recording") if audio is None else ("recording", "MIDI")
        raise SpaceError(f"your piano's {missing} is missing; add it, or remove the {given} to use a piano of the list")
    check_size(audio, MAX_PROMPT_BYTES)
    try:
        about = soundfile.info(audio)
        seconds = about.duration if about.frames < 1 << 62 else 0.0  # else its header tells nothing
    except soundfile.LibsndfileError:
        seconds = 0.0  # the processor says what is wrong with it
    if seconds > MAX_PROMPT_SECONDS:  # before it is unpacked
        raise SpaceError(f"{Path(audio).name}: lasts more than {MAX_PROMPT_SECONDS:.0f} s; give a part of it")
    processor = load()[1]
    rate = processor.feature_extractor.sampling_rate
    wave, performance = processor.read_prompt(audio), read_whole(midi)
    prompt = {"prompt_midi": performance, "prompt_audio": wave, "sampling_rate": rate}
    return prompt, [performance.warning, processor.prepare_prompt(**prompt).remark]


def read(midi: str | None, start: float, seconds: float):
    """The span of an uploaded file that is to be rendered (a `Performance`).

    Raises:
        ValueError: nothing usable, or too much of it; one sentence.
    """
    if midi is None:
        raise SpaceError("give a MIDI file first")
    if not (0 <= start < 60 * MAX_MINUTES and 0 < seconds <= MAX_SECONDS):  # also what is not a number
        raise SpaceError(f"choose a start within {MAX_MINUTES} minutes and at most {MAX_SECONDS:.0f} s")
    return load()[1].load(read_whole(midi), start=start, end=start + seconds)


@torch.no_grad()
def render(
    midi: str | None,
    prompt_name: str,
    start: float,
    seconds: float,
    temperature: float = 0.0,
    seed: float = 0,
    prompt_audio: str | None = None,
    prompt_midi: str | None = None,
    warn: Callable[[str], object] = print,
) -> Iterator[tuple[int, np.ndarray] | None]:
    """Render a span of a MIDI file, window by window; between two of them it can be given up.

    Args:
        midi: path of the uploaded file.
        prompt_name: one of `bundled_prompts`, unless a prompt is uploaded.
        start, seconds: the span, s.
        temperature: 0 takes the likeliest codes; above, they are drawn, the more freely the higher.
        seed: of the draws; equal seeds give equal sound.
        prompt_audio, prompt_midi: paths of an uploaded prompt (`choose_prompt`); both or neither.
        warn: takes each sentence that the user should know of, before the rendering begins.
    Yields:
        None after each window; in the end the sampling rate in Hz and the whole int16 wave (samples,).
    Raises:
        ValueError: a request that is refused; one sentence.
    """
    began, (_, processor, model) = time.monotonic(), load()
    for label, value in (("start", start), ("length", seconds), ("temperature", temperature), ("seed", seed)):
        check_number(label, value)
    if not 0 <= seed <= MAX_SEED:
        raise SpaceError(f"choose a seed from 0 to {MAX_SEED}")
    if not 0 <= temperature <= 2:
        raise SpaceError("choose a temperature from 0 to 2")
    sampling = {"temperature": temperature, "top_k": 50, "top_p": 0.95} if temperature else {"do_sample": False}
    performance = read(midi, start, seconds)
    prompt, remarks = choose_prompt(prompt_name, prompt_audio, prompt_midi)
    for remark in filter(None, [performance.warning, *remarks]):
        warn(remark)
    length = performance.end + RING_OUT_S
    inputs = processor(performance, end=length, **prompt).to(model.device)
    waves = []
    for audio in model.generate_stream(**inputs, seed=int(seed), **sampling):
        waves.append(audio[0, 0].cpu().numpy())
        if time.monotonic() - began > DEADLINE_S:
            raise SpaceError("this takes too long; choose a shorter span")
        yield None
    rate = model.config.sampling_rate
    wave = np.concatenate(waves)[: round(length * rate)]
    if (peak := float(np.abs(wave).max())) > 1.0:
        warn(f"turned down by {20 * np.log10(peak):.1f} dB to avoid clipping")
    yield rate, np.round(wave / max(1.0, peak) * 32767).astype(np.int16)


def build():
    """The page (`gradio.Blocks`)."""
    import gradio as gr

    def warn(sentence: str) -> None:
        gr.Warning(sentence, duration=None)  # stays until it is closed: a render may take longer than any time

    def synthesize(midi, prompt, start, seconds, temperature, seed, prompt_audio=None, prompt_midi=None):
        """Render an expressive piano MIDI file on the piano and in the room of a prompt."""
        try:
            for sound in render(midi, prompt, start, seconds, temperature, seed, prompt_audio, prompt_midi, warn):
                yield gr.skip() if sound is None else sound  # gradio goes on from here only while the page is open
        except ValueError as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from error

    def checked(label: str, field):
        """A field that says what is wrong with a value before it compares it with its limits."""
        preprocess = field.preprocess

        def check(value):
            try:
                check_number(label, value)
            except SpaceError as error:
                raise gr.Error(str(error), print_exception=False) from error
            return preprocess(value)

        field.preprocess = check
        return field

    pianos = [(description, name) for name, description in bundled_prompts().items()]
    with gr.Blocks(title="MIDI-VALLE", delete_cache=(600, 3600)) as page:
        gr.Markdown(
            "# MIDI-VALLE\nA piano performance as MIDI in, a recording out. The model adds no expression. Up to "
            f"{MAX_SECONDS:.0f} s at a time, of a MIDI file of up to {MAX_NOTES:,} notes and {MAX_MINUTES} minutes. "
            + licence()
        )
        midi = gr.File(label="MIDI", file_types=MIDI_ENDINGS, type="filepath", elem_id="midi")
        prompt = gr.Dropdown(pianos, value=pianos[0][1] if pianos else None, label="Piano and room")
        with gr.Accordion("Your own piano instead", open=False):
            gr.Markdown(
                f"A recording (WAV or FLAC, 1 to {MAX_PROMPT_SECONDS:.0f} s; its best part is used) and the MIDI of "
                "what is played in it."
            )
            with gr.Row():
                prompt_audio = gr.File(label="Recording", file_types=[".wav", ".flac"], elem_id="prompt_audio")
                prompt_midi = gr.File(label="Its MIDI", file_types=MIDI_ENDINGS, elem_id="prompt_midi")
        start = checked("start", gr.Number(0, label="Start (s)", minimum=0))
        seconds = checked("length", gr.Slider(1, MAX_SECONDS, 15, step=1, label="Length (s)"))
        likeliest = "Temperature (0: always the likeliest sound)"
        temperature = checked("temperature", gr.Slider(0, 1.5, 0, step=0.1, label=likeliest))
        seed = checked("seed", gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED))
        go = gr.Button("Render", variant="primary", elem_id="go")
        out = gr.Audio(label="Performance", elem_id="out")
        inputs = [midi, prompt, start, seconds, temperature, seed, prompt_audio, prompt_midi]
        go.click(synthesize, inputs, out, api_name="synthesize", concurrency_limit=1)
        gr.Examples([[str(path)] for path in sorted(EXAMPLES.glob("*.mid"))], [midi])
        midi.keep_in_cache.update(midi.temp_files)  # gradio gives the examples' copies out for as long as it runs
    return page.queue(max_size=16, default_concurrency_limit=1)


if __name__ == "__main__":
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")
    build().launch(
        max_file_size=MAX_PROMPT_BYTES,
        max_threads=8,
        show_error=False,
        share=False,
        ssr_mode=False,
        strict_cors=True,
        enable_monitoring=False,
    )
