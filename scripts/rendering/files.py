# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The work of `scripts.render`: files in, files out; batches, manifests, a stream, resuming."""

import _thread
import argparse
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from modeling_midivalle.recording_midivalle import RecordingChain
from processing import AudioWriter
from processing.audio_midivalle import LONGEST_NAME, check_output
from scripts.audio.visible_files import visible_files
from scripts.measuring.transcription import Transcriber, TranscriptionError
from scripts.models.model_folder import (
    ADAPTER_FILES,
    adapter_folder,
    choose_prompt,
    load_adapter,
    load_model,
    load_processor,
    model_folder,
)
from scripts.rendering.arguments import (
    RenderError,
    outputs_of,
    sampling_options,
    say,
    with_manifest,
)
from scripts.rendering.journal import Journal, journal_path, journal_threads
from scripts.rendering.manifest import (
    FORMAT,
    SETTINGS,
    differences,
    file_sha256,
    journal_key,
    manifest_path,
    read_manifest,
    software,
    was_verified,
    weights_sha256,
)
from scripts.rendering.pcm_stream import PcmStream
from scripts.rendering.pieces import Job, encode_prompt, frames_of, keys_of, recording_of, render_jobs, window_sizes
from scripts.rendering.resources import batch_rows, choose_threads
from scripts.rendering.scheduling import layouts, schedule, steps_again
from scripts.unfinished import write_json
from scripts.wording import counted
from tokenization import Performance, load_performance
from tokenization.tokenization_midivalle import MIDI_ENDINGS

TRANSCRIBED_S = 120.0  # of a long prompt without MIDI
RUN_IN_S = 1.0  # with --parallel a window begins so much earlier; that part is dropped where it overlaps the one before


@dataclass
class Task:
    """One input: where it goes (None: to the stream), and whether it is there."""

    source: Path
    output: Path | None
    performance: Performance | None = None
    windows: list = field(default_factory=list)
    sha256: str = ""
    recipe: dict = field(default_factory=dict)  # of its manifest
    is_done: bool = False


@dataclass
class Setting:
    """What all files of a command share."""

    args: argparse.Namespace
    processor: object
    model: object
    prompt: object
    label: str
    files: dict[str, str]  # path of a prompt file -> sha256
    recipe: dict
    verifier: object
    recorded: dict | None
    begin: float = 0.0  # `time.perf_counter()` when the command began
    differs: bool = False  # from what the manifest says


def render_files(args: argparse.Namespace, begin: float) -> int:
    """Render what the command line names; exit code 0, 1 if a manifest's render came out otherwise, 2 for failures.
    `begin`: `time.perf_counter()` when the command began."""
    recorded = read_manifest(args.from_manifest) if args.from_manifest else None
    if recorded:
        args = with_manifest(args, recorded["recipe"]["settings"])
    every = find_tasks(args, recorded)
    several = bool(args.output_dir)
    inputs = [Path(path).resolve() for path in (args.prompt_audio, args.prompt_midi) if path]
    tasks = keep_going(every, several, lambda task: check_names(args, task, inputs))
    tasks = keep_going(tasks, several, lambda task: load_performance(task.source))  # before a model is fetched
    if not tasks:
        return 2
    folder = model_folder(args.model)
    adapter = adapter_folder(args.adapter) if args.adapter else None
    processor = load_processor(folder)
    if args.parallel:
        processor.context_seconds = RUN_IN_S
    tasks = keep_going(tasks, several, lambda task: load_task(args, processor, task, recorded))
    journals = [journal_path(task.output) for task in tasks if task.output]
    setting = make_setting(args, folder, adapter, processor, recorded, journals)
    setting.begin = begin
    tasks = keep_going(tasks, several, lambda task: check_done(setting, task))
    render_tasks(setting, tasks)
    if recorded and setting.differs:
        say(f"{args.paths[0]}: is not bit for bit what {Path(args.from_manifest).name} describes")
        return 1
    return 0 if all(task.is_done for task in every if task.output) else 2


def find_tasks(args: argparse.Namespace, recorded: dict | None) -> list[Task]:
    """Inputs and outputs of a command line."""
    if recorded:
        output = check_output(args.paths[0])
        return [Task(Path(recorded["midi_file"]), output)]
    if not args.output_dir:
        return [Task(Path(args.paths[0]), check_output(args.paths[1]) if len(args.paths) == 2 else None)]
    tasks = []
    for path in map(Path, args.paths):
        found = visible_files(path, MIDI_ENDINGS) if path.is_dir() else []
        tasks += [Task(file, Path(args.output_dir) / f"{file.stem}.{args.format or 'wav'}") for file in found or [path]]
    writers = {}
    for task in (task for task in tasks if not task.source.is_dir()):
        for path in outputs_of(args, task.output):  # a.mid has a.report.json, and so would a.report.mid
            if (other := writers.setdefault(path, task)) is not task:
                raise RenderError(f"{other.source} and {task.source} would both become {path.name}: rename one of them")
    return tasks


def check_names(args: argparse.Namespace, task: Task, inputs: list[Path]) -> None:
    """RenderError, before anything is rendered, for what must or can not be written even with --force: the prompt's own
    files (`inputs`, resolved), folders, names that libsndfile does not take. And for a folder without MIDI."""
    if args.output_dir and task.source.is_dir():
        raise RenderError(f"{task.source}: holds no {', '.join(MIDI_ENDINGS)} file")
    for path in outputs_of(args, task.output) if task.output else ():
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise RenderError(f"{path}: is too long a name; rename {task.source}, or give the output another name")
        if path.resolve() in inputs:
            raise RenderError(f"{path}: is the prompt; give the output another name or folder")
        if path.is_dir():
            raise RenderError(f"{path}: is a folder; give the output another name or folder")
        if str(path).encode(errors="replace").decode() != str(path):
            raise RenderError(f"{path}: its name is not UTF-8; rename {task.source}, or give the output another name")


def keep_going(items: list, several: bool, work) -> list:
    """Do `work(item)`; if the command is about several files, drop what it refuses, with a sentence. What is left."""
    kept = []
    for item in items:
        try:
            work(item)
            kept.append(item)
        except ValueError as error:
            if not several:
                raise
            say(error)
    return kept


def load_task(args: argparse.Namespace, processor, task: Task, recorded: dict | None) -> None:
    """Read a performance, plan its windows, as many as a manifest has, and tell what is left out of it."""
    whole = processor.tokenizer.load_performance(task.source, args.sustain)
    task.performance = processor.load(whole, start=args.start, end=args.end)
    task.windows = processor.windows(task.performance, args.ring_out)
    if args.compat:
        if task.windows[-1][1] > processor.max_window_seconds:
            raise RenderError(
                f"--compat {args.compat} renders one segment of at most {processor.max_window_seconds} s, and "
                f"{task.performance.name} lasts {task.windows[-1][1]:.1f} s: give --start and --end"
            )
        task.windows = [(0.0, task.windows[-1][1])]
    if recorded and (count := len(recorded["attempts"])) != len(task.windows):
        raise RenderError(
            f"{Path(args.from_manifest).name}: tells of {counted(count, 'window')} where {task.performance.name} has "
            f"{len(task.windows)} now: it is damaged or of another version; render the MIDI file anew"
        )
    task.sha256 = file_sha256(task.source)
    if changes := describe_changes(processor, task.performance, task.windows):
        say(changes)


def describe_changes(processor, performance, windows) -> str:
    """One sentence on notes that are left out and durations that are clipped; empty if there are none."""
    reports = [processor.encode_window(performance, *window)[1] for window in windows]
    clipped, held = (sum(report[key] for report in reports) for key in ("clipped_durations", "held_left_out"))
    parts = [performance.warning.removeprefix(f"{performance.name}: ")] if performance.warning else []
    if clipped:
        parts.append(f"notes that sound for more than 6 s in one window are clipped there ({counted(clipped, 'time')})")
    if held:
        parts.append(f"notes that sound on from before a window's context are left out there ({counted(held, 'time')})")
    return f"{performance.name}: {'; '.join(parts)}" if parts else ""


def make_setting(
    args: argparse.Namespace,
    folder: Path,
    adapter: Path | None,
    processor,
    recorded: dict | None,
    journals: list[Path],
) -> Setting:
    """Prompt and model, and what of them decides the sound."""
    label, prompt, files = load_prompt(args, folder, processor)
    most = torch.get_num_threads()
    torch.set_num_threads(1)  # loading gains nothing by more
    with ThreadPoolExecutor(1) as pool:  # meanwhile
        sha256 = pool.submit(weights_sha256, folder, *(adapter / name for name in ADAPTER_FILES if adapter))
        model = load_model(folder, args.device, args.quantize, args.dtype)
    if adapter:
        load_adapter(model, adapter)
    if recorded:
        if other := differences(recorded["recipe"]):
            say(other)
        if recorded["recipe"]["weights_sha256"] != sha256.result():
            either = f"{folder} or {adapter}" if adapter else folder
            raise RenderError(f"{either}: is not the model any more that {args.from_manifest} was made with")
        if recorded["recipe"]["prompt"]["files"] != list(files.values()):
            raise RenderError(f"{label}: is not the recording any more that {args.from_manifest} was made with")
    part = {} if prompt is None else {"start_s": prompt.start, "seconds": prompt.seconds, "offset_s": prompt.offset}
    recipe = {
        "settings": {name: getattr(args, name) for name in SETTINGS} | {"device": model.device.type},
        "prompt": {"files": list(files.values())} | part,
        "weights_sha256": sha256.result(),
        "threads": set_threads(args, model, recorded, journals, most),
        "software": software(),
        "verify": None if args.verify is None else [args.verify, args.verify_threshold],
    }
    verifier = None
    if args.verify is not None:
        from scripts.rendering.verification import Verifier

        verifier = Verifier(model.codec, Transcriber(model.device.type), args.verify, args.verify_threshold)
    return Setting(args, processor, model, prompt, label, files, recipe, verifier, recorded)


def set_threads(args: argparse.Namespace, model, recorded: dict | None, journals: list[Path], most: int) -> int:
    """Threads of the CPU: what the user or the manifest says, else those of an interrupted render, else the best up to
    `most`, measured."""
    threads = args.threads or (recorded["recipe"]["threads"] if recorded else None)
    threads = threads or next(filter(None, map(journal_threads, journals)), None)
    if threads is None:
        return choose_threads(model, most)
    torch.set_num_threads(threads)
    return threads


def load_prompt(args: argparse.Namespace, folder: Path, processor) -> tuple[str, object, dict[str, str]]:
    """A label for the user, the prompt (None if the model has none), and its files with their sha256."""
    if args.prompt_audio is None:
        label, files = choose_prompt(folder, args.prompt)
    else:
        label, files = "own prompt", (args.prompt_midi, args.prompt_audio)
    if files is None:
        return label, None, {}
    midi, audio = files
    if midi is None:
        midi, label = transcribe_prompt(processor, audio), "own prompt, transcribed"
    prompt = processor.prepare_prompt(midi, audio, sustain=args.sustain)
    if prompt.remark:
        say(prompt.remark)
    return label, prompt, {str(file): file_sha256(file) for file in files if file is not None}


def transcribe_prompt(processor, audio: str) -> Performance:
    """The notes of a prompt that comes without MIDI."""
    wave, name = processor.read_prompt(audio), Path(audio).name
    try:
        transcriber = Transcriber()
    except TranscriptionError as error:
        raise RenderError(
            f"{name} comes without its MIDI: add --prompt-midi, or run `make install-eval`, and it is transcribed"
        ) from error
    rate = processor.feature_extractor.sampling_rate
    notes = transcriber(wave[: round(TRANSCRIBED_S * rate)], rate)
    if not len(notes):
        raise RenderError(f"{name}: no note is heard in it; give a prompt in which the piano plays")
    return Performance(notes, name, dict.fromkeys(("drum_notes", "outside_notes", "unended_notes"), 0))


def check_done(setting: Setting, task: Task) -> None:
    """Of several files: see whether this one has been rendered the same way before; else its output must be free."""
    if setting.args.force or not setting.args.output_dir:
        return
    if task.output.exists():
        try:
            manifest = read_manifest(manifest_path(task.output))
            recipe, of_output = manifest["recipe"], Path(manifest["output"]["path"]).name  # a.wav and a.flac share it
            decisive = setting.recipe.keys() - {"threads"}  # these were measured then
            same = all(recipe[key] == setting.recipe[key] for key in decisive)
            task.is_done = same and recipe["midi"] == task.sha256 and of_output == task.output.name
        except (ValueError, LookupError):
            pass
        if task.is_done:
            say(f"{task.output.name}: is there already, made the same way")
    for path in outputs_of(setting.args, task.output):
        if path.exists() and not task.is_done:
            raise RenderError(f"{path.name}: exists already; add --force to replace it")


def make_job(
    setting: Setting,
    task: Task,
    prompt_codes: torch.Tensor,
    recording: RecordingChain | None,
    layout: list[dict] | None,
) -> Job:
    """The job of a task; when its turn comes it finds what an interrupted render has left."""
    args, model = setting.args, setting.model
    recipe = setting.recipe | {"midi": task.sha256, "windows": task.windows, "layout": layout}
    keys = keys_of(model, setting.processor, task.performance, task.windows, setting.prompt)
    job = Job(task.performance, task.windows, setting.prompt, prompt_codes, args.seed, recording, keys, layout=layout)
    job.is_exact, job.carries = args.compat is None, not args.parallel
    if setting.recorded:
        job.planned = setting.recorded["attempts"]
    key = journal_key(recipe | {"planned": job.planned})  # a plain render and one by a manifest keep other attempts

    def opened(job: Job) -> None:
        task.recipe = recipe
        if task.output:
            job.sinks.insert(0, AudioWriter(task.output, model.config.sampling_rate))
            if job.is_exact:
                books, axes = model.config.ar_config.num_codebooks, model.num_vector_axes
                job.journal = Journal(journal_path(task.output), key, books, frames_of(task.windows), axes)
                if job.journal.remark:
                    say(job.journal.remark)

    job.opened = opened
    return job


def plan(setting: Setting, tasks: list[Task]) -> tuple[list[list[tuple[int, int]]], list[list[dict] | None]]:
    """Which windows are generated together, and the layout of each task's batches (None: each window alone)."""
    args, counts = setting.args, [len(task.windows) for task in tasks]
    if setting.recorded:
        layout = setting.recorded["recipe"]["layout"]
        return steps_again(layout, counts[0], args.parallel), [layout]
    is_alone = args.compat or (len(tasks) == 1 and not args.parallel)
    size = args.batch_size or (1 if is_alone else batch_rows(setting.model, args.parallel))
    steps = schedule(counts, size, args.parallel)
    if size == 1:
        return steps, [None] * len(tasks)
    sizes = [window_sizes(setting.processor, task.performance, task.windows, setting.prompt) for task in tasks]
    return steps, layouts(steps, sizes)


def render_tasks(setting: Setting, tasks: list[Task]) -> None:
    """Render files, of which those that are there only have their places in the batches."""
    if not tasks:
        return
    args, begin, ready = setting.args, time.perf_counter(), []
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    codes = encode_prompt(setting.model, setting.prompt)
    first = tasks[0]  # before all of them the prompt is the same
    keys = keys_of(setting.model, setting.processor, first.performance, first.windows, setting.prompt)
    recording = recording_of(setting.model, setting.prompt, codes, keys, args.as_recorded)
    steps, found = plan(setting, tasks)
    jobs = {i: make_job(setting, task, codes, recording, found[i]) for i, task in enumerate(tasks) if not task.is_done}
    owners = {id(job): tasks[i] for i, job in jobs.items()}
    only = jobs.get(0) if args.stream else None  # there is no other then
    stream = open_stream(setting, tasks[0], only) if args.stream else None
    bar = tqdm(total=sum(len(job.windows) for job in jobs.values()), unit="window", desc="render", disable=None)
    try:
        sampling = sampling_options(args) | {"compat": args.compat}
        for job, window in render_jobs(setting.model, setting.processor, jobs, steps, sampling, setting.verifier):
            task = owners[id(job)]
            if job.error:
                give_up(setting, task, job.error)
                continue
            if stream and stream.gone and task.output is None:
                raise KeyboardInterrupt  # the thread's own may have come where Python ignores exceptions
            ready.append(time.perf_counter())
            bar.update(window + 1 - bar.n if len(tasks) == 1 else 1)
            if window + 1 == len(job.windows) and task.output:
                keep_going([task], bool(args.output_dir), lambda task, job=job: finish(setting, task, job))
                if job.journal:
                    job.journal.close()
        if stream:
            stream.close()
            refuse_broken(stream)
            say(
                "the reader of the stream has gone"
                if stream.gone
                else describe_stream(setting, stream, begin, ready, only)
            )
    except KeyboardInterrupt:
        if stream is None or not stream.gone:
            raise
        refuse_broken(stream)
        say("the reader of the stream has gone")
    finally:
        bar.close()
        for job in jobs.values():  # unfinished ones; what is finished is not kept
            if job.journal:
                job.journal.close()


def give_up(setting: Setting, task: Task, error: ValueError) -> None:
    """A file that cannot be rendered stops the command if it is the only one."""
    if not setting.args.output_dir:
        raise error
    say(f"{task.source.name}: {error}")


def open_stream(setting: Setting, task: Task, job: Job) -> PcmStream:
    """Give a job the standard output. When its reader goes, the work ends, unless there is a file to be finished."""
    rate, args = setting.model.config.sampling_rate, setting.args
    samples = round(task.windows[-1][1] * rate) if job.is_exact else None

    def on_gone():
        if task.output is None:
            _thread.interrupt_main()

    stream = PcmStream(1, rate, samples, args.raw, on_gone)
    job.sinks.append(stream)
    return stream


def refuse_broken(stream: PcmStream) -> None:
    """`RenderError` if the stream could not be written for another reason than that its reader has gone."""
    if stream.error:
        raise RenderError(f"--stream: cannot be written ({stream.error.strerror})")


def describe_stream(setting: Setting, stream: PcmStream, begin: float, ready: list[float], job: Job) -> str:
    """When the first audio was there, how fast the longer chunks followed, and whether they were clipped."""
    lengths = [end - start for start, end in job.windows[-len(ready) :]]
    took = [later - earlier for earlier, later in zip([begin, *ready], ready, strict=False)]
    steady = [(time, length) for time, length in zip(took, lengths, strict=True) if length >= max(lengths) / 2]
    slowest, median = max(time for time, _ in steady), statistics.median(length / time for time, length in steady)
    over = f"; clipped by up to {20 * math.log10(stream.peak):.1f} dB: a file is turned down" if stream.peak > 1 else ""
    return (
        f"first audio after {stream.first_at - begin:.2f} s, {stream.first_at - setting.begin:.2f} s with loading; "
        f"chunks of up to {max(lengths):.1f} s in up to {slowest:.2f} s, {median:.1f}x real time{over}"
    )


def finish(setting: Setting, task: Task, job: Job) -> None:
    """Write the files of a finished job, and say so."""
    args, model, took = setting.args, setting.model, time.perf_counter() - job.began
    rate, digest = model.config.sampling_rate, job.digest.hexdigest()
    gain = job.sinks[0].close()
    files = {str(task.source): task.sha256} | (setting.files if args.prompt_audio else {})  # a model's move with it
    about = {"path": str(task.output), "seconds": job.samples / rate, "gain": gain, "samples_sha256": digest}
    content = {"format": FORMAT, "recipe": task.recipe, "midi_file": str(task.source), "files": files}
    content |= {"attempts": job.attempts, "output": about}
    if setting.verifier:
        report = setting.verifier.report(job)
        write_json(task.output.with_suffix(".report.json"), report)
        total = report["summary"]
        say(f"{task.output.name}: {total['right']} of {counted(total['notes'], 'note')} heard, onset F1 {total['f1']}")
    elif was_verified(manifest_path(task.output)):  # what is replaced has a report, which does not hold any more
        task.output.with_suffix(".report.json").unlink(missing_ok=True)
    write_json(manifest_path(task.output), content)
    if job.journal:
        job.journal.remove()
    seconds = job.samples / rate
    turned_down = f", turned down by {-20 * math.log10(gain):.1f} dB to avoid clipping" if gain < 1 else ""
    resumed = f", {counted(job.resumed, 'window')} there already" if job.resumed else ""
    made = seconds - (job.windows[job.resumed - 1][1] if job.resumed else 0.0)  # what was there costs next to nothing
    print(
        f"{task.output}: {seconds:.3f} s, {counted(len(task.performance.notes), 'note')}, "
        f"{counted(len(job.windows), 'window')}, "
        f"{setting.label}, {took:.1f} s on {model.device} ({made / took:.2f}x real time){resumed}{turned_down}",
        file=sys.stderr if args.stream else sys.stdout,
    )
    task.is_done = True
    if setting.recorded:
        setting.differs = digest != setting.recorded["output"]["samples_sha256"]
