# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Model cards: what the folders of `scripts.adapt`, `scripts.train`, `scripts.train_codec` and `scripts.assemble_model`
need to go to the Hub as they are. They tell names, not paths, which are this machine's."""

import argparse
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from huggingface_hub import ModelCard, ModelCardData

from scripts.models.model_folder import LISTENER

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
HUB_ID, HUB_LICENCE = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?"), re.compile(r"[a-z0-9][a-z0-9.+-]*")
KIND = {"pipeline_tag": "audio-to-audio"}
TAGS = ["midi", "piano", "music"]
NOTE = "<!-- Written anew with the weights. Remove this line when you edit the card: then it stays as it is. -->"
LISTED = 5  # names of data, at most
BODY = """
{note}

# {title}

{what}

## Use

{use}

{made}

## Licence

{licence}
"""
ADAPTER_BODY = """
# {name}

An adapter (LoRA) of `{base}`, a MIDI-VALLE model, for one piano. It was made by `scripts.adapt` from {minutes:.1f} min
of a recording with {notes} notes in its MIDI, which are not among these files.

## Use

```python
from transformers import AutoModel, AutoProcessor

base = "{base}"  # its folder or Hub id
processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
model = AutoModel.from_pretrained(base, trust_remote_code=True)
model.load_adapter("{name}")  # this folder, or its Hub id; needs peft
audio = model.generate(**processor(midi="piece.mid", prompt_midi="mine.mid", prompt_audio="mine.wav"))
```

## Training

Steps done: {steps}, by this recipe; `held_share` of the recording, its end, was not learned from.

{recipe}

What the model made of the held part (`codec`: the codec's own reconstruction of it):

{table}

## Licence

{licence}
"""
DECODER_WORDS = {
    "ar": "The AR decoder of a MIDI-VALLE model: after MIDI and a prompt, it predicts the first codebook of a piano "
    "codec, frame by frame.",
    "nar": "The NAR decoder of a MIDI-VALLE model: it predicts the codebooks of a piano codec after the first, one "
    "after the other, for all frames of a window at once.",
}
DECODER_USE = """```python
from transformers import AutoModel

decoder = AutoModel.from_pretrained("{path}", trust_remote_code=True)  # its folder, or its Hub id
```

It predicts codes. A model that makes audio of MIDI is put together of a codec and both decoders, in a clone of
MIDI-VALLE for Hugging Face:

    python -m scripts.assemble_model --codec CODEC --ar AR --nar NAR --output MODEL"""
CODEC_WORDS = (
    "A Piano-Encodec, the codec of MIDI-VALLE: 32 kHz mono, 50 frames a second. It is trained part by part; this "
    "is what `scripts.train_codec {part}` has made."
)
CODEC_USE = """In a clone of MIDI-VALLE for Hugging Face:

```python
import torch
from modeling_midivalle import PianoEncodecModel

codec = PianoEncodecModel.from_pretrained("{path}")  # its folder, or its Hub id
codes = codec.encode_codes(torch.zeros(1, 1, 32000))  # audio (1, 1, samples) -> (1, codebooks, frames)
audio = codec.decode_codes(codes)
```"""
LISTENER_WORDS = "The listener of MIDI-VALLE: it hears which keys are struck in a recording of a piano, 32 kHz mono. "
LISTENER_WORDS += "Made by `scripts.train_codec listener`."
LISTENER_USE = """In a clone of MIDI-VALLE for Hugging Face:

```python
import torch
from modeling_midivalle import PianoListenerModel

listener = PianoListenerModel.from_pretrained("{path}")  # its folder, or its Hub id
struck = listener.hear(torch.zeros(1, 1, 32000))  # audio (1, 1, samples) -> (1, frames, 88)
```"""
WHOLE_WORDS = (
    "A MIDI-VALLE model: expressive piano MIDI and a *prompt*, a few seconds of a recording (audio with its MIDI), go "
    "in; a recording of that performance on that piano comes out, 32 kHz mono. Put together by "
    "`scripts.assemble_model`."
)
WHOLE_USE = """```python
import soundfile
from transformers import AutoModel, AutoProcessor

folder = "{path}"  # or its Hub id
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
audio = model.generate(**processor(midi="piece.mid", prompt_midi="mine.mid", prompt_audio="mine.wav"))
soundfile.write("piece.wav", audio[0, 0].numpy(), 32000)
```"""


@dataclass(frozen=True)
class Base:
    """What a card says of weights that others were made of.

    Args:
        name (`str`): A Hub id; of a folder the last part of its path.
        licence (`dict`): What the header of its card says of its licence; nothing if there is none.
        is_hub_id (`bool`): What the name is.
    """

    name: str
    licence: dict[str, str]
    is_hub_id: bool


def base_of(model: str, folder: Path | None = None) -> Base:
    """The `Base` that was given as `model`, a folder or a Hub id, and lies in `folder`."""
    folder = Path(model) if folder is None else folder
    try:
        said = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # no card, or none that can be read
        said = {}
    is_hub_id = not Path(model).is_dir()
    name = model if is_hub_id else folder.resolve().name
    return Base(name, {key: said[key] for key in LICENCE_KEYS if said.get(key)}, is_hub_id)


def base_of_listener(folder: str | Path) -> Base:
    """The `Base` in a folder that holds a listener: a run's output has its card beside it, a model's folder above."""
    own = Path(folder, LISTENER)
    return base_of(str(folder), own if (own / CARD).is_file() else None)


def public_name(given: str | Path) -> str:
    """How a card calls what a command was given: a Hub id or URL by itself, a file or folder by the end of its path."""
    parts = urlsplit(str(given))
    if parts.scheme and parts.netloc:
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return str(given) if _is_hub_id(given) else Path(given).resolve().name


def _is_hub_id(given: str | Path) -> bool:
    return not Path(given).exists() and HUB_ID.fullmatch(str(given)) is not None


def add_licence(parser: argparse.ArgumentParser) -> None:
    """The option `--licence` of commands that write a card."""

    def hub_licence(text: str) -> str:
        if not HUB_LICENCE.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{text!r} is no licence as the Hub writes it, such as cc-by-nc-sa-4.0")
        return text

    of_base = "that of the weights that it is made of, where their card tells one"
    words = f"of the weights, for their card, as the Hub writes it: cc-by-nc-sa-4.0 (default: {of_base})"
    parser.add_argument("--licence", type=hub_licence, metavar="NAME", help=words)


def licence_of(bases: list[Base], chosen: str | None = None) -> tuple[dict[str, str], str]:
    """What the header of a card says of the licence, and a sentence: the `chosen` one, or that of all `bases`."""
    names = dict.fromkeys(f"`{base.name}`" for base in bases)
    derived = f"The weights are derived from those of {', '.join(names)}"
    told = [base.licence for base in bases]
    if chosen:
        return {"license": chosen}, f"{chosen}. {f'{derived}.' if bases else ''}".strip()
    if not bases:
        return (
            {},
            "None has been chosen yet: before you pass the weights on, choose one that their data allow (`--licence`).",
        )
    if any(one != told[0] for one in told):
        return {}, f"{derived}, whose licences differ, or are not all told: choose one that all allow (`--licence`)."
    said = told[0].get("license_name") or told[0].get("license")
    if not said:
        return {}, f"{derived}, whose licence is not told: ask their authors before you pass them on."
    return told[0], f"{derived}, whose licence holds for them too: {said}."


def is_edited(path: Path) -> bool:
    """Whether a card is there that somebody has made their own."""
    return path.is_file() and NOTE not in path.read_text(encoding="utf-8", errors="replace")


@dataclass
class RunCard:
    """The card of what a training run exports.

    Args:
        what, use (`str`): Markdown; `use` with a `{path}`.
        recipe (`dict`): The settings of the run.
        data (`list[str]`): What it was told to learn from, as `public_name` calls it.
        bases (`list[Base]`): The weights that it began with.
        licence (`str`, *optional*): Of the weights, if one was chosen.
        hub_id (`str`, *optional*): Where the last weights will be.
        datasets (`list[str]`): Those of the data that are datasets of the Hub.
    """

    what: str
    use: str
    recipe: dict
    data: list[str]
    bases: list[Base]
    licence: str | None = None
    hub_id: str | None = None
    datasets: list[str] = field(default_factory=list)

    def text(self, path: str, step: int | None = None, validation: tuple[int, dict[str, float]] | None = None) -> str:
        """The card of the folder `path`, a part of the run's own, by its steps so far, if it has any, and what was
        measured last, at which step."""
        begun = " and ".join(f"`{base.name}`" for base in self.bases)
        listed = [f"`{name}`" for name in self.data[:LISTED]]
        more = f" and {len(self.data) - LISTED} more" if len(self.data) > LISTED else ""
        made = ["## Training", f"Begun with {f'the weights of {begun}' if begun else 'new weights'}."]
        made[-1] += f" Data: {', '.join(listed)}{more}."
        made[-1] += " By this recipe:" if step is None else f" Steps done: {step}, by this recipe:"
        made.append(recipe_block(self.recipe))
        if validation is not None:
            rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in validation[1].items())
            made.append(f"Validation at step {validation[0]}, by the names of `log.jsonl`:")
            made.append(f"| figure | |\n| --- | --- |\n{rows}")
        words = {"title": path, "what": self.what, "use": self.use.format(path=path), "made": "\n\n".join(made)}
        return card_text(words, self.bases, self.licence, self.datasets)


def recipe_block(recipe: dict) -> str:
    """Settings as Markdown."""
    return f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None).strip()}\n```"


def card_text(words: dict[str, str], bases: list[Base], licence: str | None, datasets: list[str] = ()) -> str:
    """A card of `BODY` and its `words`; `bases` and `licence` as of `RunCard`."""
    header, said = licence_of(bases, licence)
    on_hub = [base.name for base in bases if base.is_hub_id]
    data = ModelCardData(
        base_model=on_hub or None,
        base_model_relation="finetune" if on_hub else None,
        datasets=list(datasets) or None,
        library_name="transformers",
        tags=TAGS,
        **KIND,
        **header,
    )
    return f"---\n{data.to_yaml()}\n---\n{BODY.format(note=NOTE, licence=said, **words)}"


def decoder_card(part: str, recipe, data: str, codec: str, licence: str | None, hub_id: str | None) -> RunCard:
    """The card of a run of `scripts.train`: `data`, `codec` and `hub_id` as they were given."""
    bases = [base_of(recipe.init_from)] if recipe.init_from else []
    settings = asdict(recipe) | {"init_from": bases[0].name if bases else None}
    what = f"{DECODER_WORDS[part]} Made by `scripts.train`, with codes of the codec `{public_name(codec)}`."
    datasets = [data.partition("@")[0]] if _is_hub_id(data) else []
    return RunCard(what, DECODER_USE, settings, [public_name(data)], bases, licence, hub_id, datasets)


def codec_card(part: str, recipe, data: list[str], bases: list[Base], licence: str | None) -> RunCard:
    """The card of a part of `scripts.train_codec`, `data` as it was given."""
    is_listener = part == "listener"
    what, use = (LISTENER_WORDS, LISTENER_USE) if is_listener else (CODEC_WORDS.format(part=part), CODEC_USE)
    return RunCard(what, use, asdict(recipe), list(map(public_name, data)), bases, licence)


def whole_card(name: str, sizes: dict[str, int], bases: list[Base], licence: str | None) -> str:
    """The card of a model of `scripts.assemble_model`, by the parameters of its parts."""
    rows = "\n".join(f"| {part} | {size:,} |" for part, size in sizes.items())
    made = f"## Parts\n\n| part | parameters |\n| --- | --- |\n{rows}"
    words = {"title": name, "what": WHOLE_WORDS, "use": WHOLE_USE.format(path=name), "made": made}
    return card_text(words, bases, licence)


def adapter_card(
    name: str, model: str, folder: Path, recipe, seconds: float, notes: int, steps: int, table: str
) -> str:
    """The text of an adapter's card; its licence is that of the base, from which its weights are derived.

    Args:
        name (`str`): The adapter's.
        model, folder: As of `base_of`.
        recipe (`AdaptRecipe`): What was asked for.
        seconds (`float`), notes (`int`): Of the recording.
        steps (`int`): That were done.
        table (`str`): Markdown, figures before and after.
    """
    base = base_of(model, folder)
    licence, said = licence_of([base])
    header = ModelCardData(
        base_model=base.name if base.is_hub_id else None,
        base_model_relation="adapter" if base.is_hub_id else None,
        library_name="peft",
        tags=["lora", *TAGS],
        **KIND,
        **licence or {"license": "other"},
    )
    body = ADAPTER_BODY.format(
        name=name,
        base=base.name,
        minutes=seconds / 60,
        notes=notes,
        steps=steps,
        recipe=recipe_block(asdict(recipe)),
        table=table,
        licence=said,
    )
    return f"---\n{header.to_yaml()}\n---\n{body}"
