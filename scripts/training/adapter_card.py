# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The model card of an adapter: what a folder of `scripts.adapt` needs to go to the Hub as it is."""

from dataclasses import asdict
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
BODY = """
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

```yaml
{recipe}
```

What the model made of the held part (`codec`: the codec's own reconstruction of it):

{table}

## Licence

{licence}
"""


def base_facts(model: str, folder: Path) -> tuple[str, dict[str, str], bool]:
    """What an adapter says of its base.

    Args:
        model (`str`): The base as it was given, a folder or a Hub id.
        folder (`Path`): Where it lies.

    Returns:
        `tuple(str, dict, bool)`: its name, of a folder without the path; what the header of its card says of its
        licence (nothing if there is none); whether the name is a Hub id.
    """
    is_hub_id = not Path(model).is_dir()
    try:
        said = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # no card, or none that can be read
        said = {}
    licence = {key: said[key] for key in LICENCE_KEYS if said.get(key)}
    return model if is_hub_id else folder.resolve().name, licence, is_hub_id


def adapter_card(
    name: str, model: str, folder: Path, recipe, seconds: float, notes: int, steps: int, table: str
) -> str:
    """The text of the card; its licence is that of the base, from which the adapter's weights are derived.

    Args:
        name (`str`): The adapter's.
        model, folder: As of `base_facts`.
        recipe (`AdaptRecipe`): What was asked for.
        seconds (`float`), notes (`int`): Of the recording.
        steps (`int`): That were done.
        table (`str`): Markdown, figures before and after.
    """
    base, licence, is_hub_id = base_facts(model, folder)
    header = ModelCardData(
        base_model=base if is_hub_id else None,
        base_model_relation="adapter" if is_hub_id else None,
        library_name="peft",
        pipeline_tag="audio-to-audio",
        tags=["lora", "midi", "piano", "music"],
        **licence or {"license": "other"},
    )
    said = licence.get("license_name") or licence.get("license")
    derived = f"The weights are derived from those of `{base}`"
    body = BODY.format(
        name=name,
        base=base,
        minutes=seconds / 60,
        notes=notes,
        steps=steps,
        recipe=yaml.safe_dump(asdict(recipe), sort_keys=False, default_flow_style=None).strip(),
        table=table,
        licence=f"{derived}, whose licence holds for them too: {said}."
        if said
        else f"{derived}, which tells no licence: ask its authors before you pass them on.",
    )
    return f"---\n{header.to_yaml()}\n---\n{body}"
