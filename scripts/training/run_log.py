# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Figures of a training run: `log.jsonl`, learning curves as a picture, tensorboard and trackio where installed.

python -m scripts.training.run_log RUN      # draws RUN/learning_curves.png of RUN/log.jsonl
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch

from scripts.audio.pianos import SAMPLING_RATE

LOG, CURVES = "log.jsonl", "learning_curves.png"


class RunLog:
    """Rows of figures by step, written by the first process only.

    Args:
        folder (`Path`): of the run.
        accelerator: writes to the trackers that it was made with.
    """

    def __init__(self, folder: Path, accelerator):
        self.folder, self.accelerator = folder, accelerator

    def write(self, step: int, row: dict[str, float], shown: str = "") -> None:
        """Append `row` to the log, send it to the trackers, print it with `shown` behind."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / LOG, "a") as file:
                file.write(json.dumps({"step": step} | row) + "\n")
            print({"step": step} | row, shown, flush=True)
        self.accelerator.log({name.replace("validation_", "validation/"): value for name, value in row.items()}, step)

    def show(self, step: int, sounds: dict[str, torch.Tensor]) -> None:
        """Send `sounds`, `(L,)` in [-1, 1] at 32 kHz, and the curves so far to the trackers; by the first process."""
        from matplotlib.image import imread

        curves = (imread(draw_curves(self.folder))[..., :3] * 255).astype("uint8")
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
        temporary = path.with_name(f".{LOG}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= step))
        os.replace(temporary, path)

    def close(self, draw: bool = True) -> None:
        """End the trackers and draw what curves there are, which takes seconds that a stopped run may not have."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if draw and self.accelerator.is_main_process and _figures(self.folder)[1]:
            draw_curves(self.folder)


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
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None or number < len(lines):
            raise ValueError(f"{path}, line {number}: not a row of a training log")
    return rows


def _figures(folder: Path) -> tuple[list[dict], list[str]]:
    """Rows of a folder's log, and the names of what they measure."""
    rows = read_log(folder / LOG) if (folder / LOG).is_file() else []
    return rows, sorted({name for row in rows for name in row} - {"step", "hours", "wall_s"})


def draw_curves(folder: Path) -> Path:
    """Every figure of `folder`'s log over the step, one panel a kind; returns the picture's path.

    Raises:
        ValueError: no log, or nothing in it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, names = _figures(folder)
    if not names:
        raise ValueError(f"{folder}: holds no {LOG} with figures")
    kinds = sorted({name.removeprefix("validation_").rstrip("0123456789").rstrip("_") for name in names})
    figure, axes = pyplot.subplots(len(kinds), figsize=(9, 2.4 * len(kinds)), sharex=True, squeeze=False)
    for axis, kind in zip(axes[:, 0], kinds):
        for name in names:
            if name.removeprefix("validation_").rstrip("0123456789").rstrip("_") == kind:
                points = [(row["step"], row[name]) for row in rows if name in row]
                axis.plot(*zip(*points), label=name, marker="." if name.startswith("validation") else "")
        axis.set_ylabel(kind)
        axis.legend(fontsize="small")
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    temporary = folder / f".{CURVES}"
    figure.savefig(temporary, dpi=100, format="png")
    pyplot.close(figure)
    os.replace(temporary, folder / CURVES)
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
