# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Figures of a training run: `log.jsonl`, learning curves as a picture, tensorboard and trackio where installed.

python -m scripts.training.run_log RUN      # draws RUN/learning_curves.png of RUN/log.jsonl
"""

import argparse
import importlib.util
import json
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import matplotlib
import torch

from scripts.audio.pianos import SAMPLING_RATE

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  after the choice of a backend without a screen

from scripts.unfinished import WriteError, unfinished_file, write_text

LOG, CURVES = "log.jsonl", "learning_curves.png"
AXES = ("step", "hours", "wall_s")  # what a row counts, and does not measure
DRAWN_EVERY = 60.0  # s, at least; a picture takes one second


class RunLog:
    """Rows of figures by step, written by the first process only. A figure of validation is named `validation_NAME`.

    Args:
        folder (`Path`): of the run.
        accelerator: writes to the trackers that it was made with.
        steps (`int`): of the whole run.
    """

    def __init__(self, folder: Path, accelerator, steps: int):
        self.folder, self.accelerator, self.steps = folder, accelerator, steps

    def begin(self, step: int, recipe: dict, **about) -> None:
        """The run starts, or goes on, at `step`; trackers are told of `about` and of the recipe."""
        self._first, self._began = step, time.time()
        self._drawn = self._began
        scalars = {name: value for name, value in recipe.items() if isinstance(value, int | float | str)}
        self.accelerator.init_trackers("midivalle", scalars | about)

    def write(self, step: int, hours: float, seconds: float, figures: dict[str, float]) -> None:
        """Append a row to the log, send it to the trackers, and print it with the run's speed and the time left.

        Args:
            step (`int`), hours (`float`), seconds (`float`): of the run so far; hours of audio, seconds of wall time.
            figures (`dict`): what was measured, by name.
        Raises:
            WriteError: the log cannot be written.
        """
        row = {"hours": hours, "wall_s": round(seconds, 1)} | figures
        row = {"step": step} | {name: float(f"{value:.6g}") for name, value in row.items()}
        if self.accelerator.is_main_process:
            path = self.folder / LOG
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:  # of a full disk's, no word of the file
                raise WriteError(f"{path}: cannot be written ({error.strerror}); make room and start again") from error
            left = (time.time() - self._began) / max(step - self._first, 1) * (self.steps - step)
            speed = f"{hours * 3600 / max(seconds, 1e-3):.1f}x real time, {timedelta(seconds=round(left))} left"
            print(f"{step}/{self.steps} {row} {speed}", flush=True)
        self.accelerator.log({name.replace("validation_", "validation/"): value for name, value in row.items()}, step)

    def draw(self, last: bool = False) -> None:
        """The curves so far, if there are any, once a minute or where they are the `last`; by the first process."""
        due = last or time.time() - self._drawn >= DRAWN_EVERY
        if due and self.accelerator.is_main_process and _figures(self.folder)[1]:
            draw_curves(self.folder)
            self._drawn = time.time()

    def show(self, step: int, sounds: dict[str, torch.Tensor]) -> None:
        """Send `sounds`, `(L,)` in [-1, 1] at 32 kHz, and the curves so far to the trackers; by the first process."""
        if not self.accelerator.trackers:
            return
        curves = (pyplot.imread(draw_curves(self.folder))[..., :3] * 255).astype("uint8")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                for name, wave in sounds.items():
                    tracker.tracker.add_audio(f"samples/{name}", wave[None], step, SAMPLING_RATE)
                tracker.tracker.add_image("curves", curves, step, dataformats="HWC")
            elif tracker.name == "trackio":
                import trackio

                found = {f"samples/{k}": trackio.Audio(v.numpy(), sample_rate=SAMPLING_RATE) for k, v in sounds.items()}
                tracker.log(found | {"curves": trackio.Image(curves)}, step)

    def cut(self, step: int) -> None:
        """Drop the rows of steps after `step`: a resumed run makes them again."""
        path = self.folder / LOG
        if not self.accelerator.is_main_process or not path.is_file():
            return
        write_text(path, "".join(json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= step))

    def validated(self, step: int) -> tuple[int, dict[str, float]] | None:
        """The newest figures of validation at `step` or before, and their step; None without any."""
        for row in reversed(_figures(self.folder)[0]):
            found = {name: value for name, value in row.items() if name.startswith("validation_")}
            if found and row["step"] <= step:
                return row["step"], found
        return None

    def close(self) -> None:
        """End the trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def installed_trackers(names: list[str]) -> list[str]:
    """Those of `names` that are installed; a sentence for each other one."""
    found = [name for name in names if importlib.util.find_spec(name)]
    for name in sorted(set(names) - set(found)):
        print(f"{name} is not installed (pip install {name}): figures go to {LOG} only", flush=True)
    return found


def read_log(path: Path) -> list[dict]:
    """Rows of a log; a last line that a kill has cut short is left out.

    Raises:
        ValueError: another line is no row.
    """
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and {"step", "hours"} <= set(row):
            rows.append(row)
        elif row is not None or number < len(lines):
            raise ValueError(f"{path}, line {number}: not a row of a training log")
    return rows


def _figures(folder: Path) -> tuple[list[dict], list[str]]:
    """Rows of a folder's log, and the names of what they measure."""
    rows = read_log(folder / LOG) if (folder / LOG).is_file() else []
    return rows, sorted({name for row in rows for name in row} - set(AXES))


def draw_curves(folder: Path) -> Path:
    """Every figure of `folder`'s log over hours of audio; returns the picture's path. Figures whose names differ by
    their codebook (`code_0`, `code_1`) or by being of the validation share a panel.

    Raises:
        ValueError: no log, or nothing in it.
    """
    rows, names = _figures(folder)
    if not names:
        raise ValueError(f"{folder}: holds no {LOG} with figures")
    panels = {}
    for name in names:
        panels.setdefault(re.sub(r"_\d+$", "", name.removeprefix("validation_")), []).append(name)
    columns = min(len(panels), 3)
    shape = -(-len(panels) // columns), columns
    figure, axes = pyplot.subplots(*shape, figsize=(5 * columns, 3 * shape[0]), squeeze=False)
    # shares of a panel of 5 x 3 inches; to have them found would take as long as all the rest
    figure.subplots_adjust(0.16 / columns, 0.16 / shape[0], 1 - 0.04 / columns, 1 - 0.1 / shape[0], 0.25, 0.38)
    for axis, (panel, lines) in zip(axes.flat, panels.items()):
        for name in lines:
            points = [(row["hours"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), label=name, marker="." if len(points) < 30 else "")
        axis.set(title=panel, xlabel="hours of audio")
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    with unfinished_file(folder / CURVES) as partial:
        figure.savefig(partial, dpi=80, format="png")
    pyplot.close(figure)
    return folder / CURVES


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on a folder without a log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of scripts.train or scripts.train_codec")
    try:
        print(draw_curves(parser.parse_args(argv).run))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
