# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Presets, round trips, sizes and refused contradictions."""

import pytest
import torch

from modeling_midivalle import (
    MidiValleARConfig,
    MidiValleARModel,
    MidiValleConfig,
    MidiValleForConditionalGeneration,
    MidiValleNARConfig,
    MidiValleNARModel,
)

PRESETS = ("tiny", "starter", "base", "published")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("config_class", [MidiValleARConfig, MidiValleNARConfig, MidiValleConfig])
def test_round_trip(config_class, preset, tmp_path):
    config = config_class.from_preset(preset)
    config.save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_parts_become_configs_and_types_are_kept():
    config = MidiValleConfig.from_preset("published")
    again = MidiValleConfig(**config.to_dict())
    assert isinstance(again.ar_config, MidiValleARConfig) and again.nar_config.tie_heads_one_step_off
    assert again.ar_config.bos_token_id is None and again.ar_config.vocab_size == 2049
    assert (again.sampling_rate, again.frame_rate, again.hop_length) == (32000, 50, 640)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (MidiValleARConfig, {"num_attention_heads": 7}, "num_attention_heads"),
        (MidiValleARConfig, {"vocab_size": 2049}, "special ids"),
        (MidiValleARConfig, {"bos_token_id": None}, "use_target_bos"),
        (MidiValleARConfig, {"position_embedding_type": "learned"}, "position_embedding_type"),
        (MidiValleNARConfig, {"midi_vocab_sizes": [92, 68]}, "midi_vocab_sizes"),
        (MidiValleNARConfig, {"frame_note_offsets": [1]}, "frame_note_offsets"),
        (MidiValleARConfig, {"frame_note_decays": [0.5, 0.0]}, "frame_note_decays"),
        (MidiValleNARConfig, {"num_hidden_layers": -1}, "num_hidden_layers"),
        (MidiValleNARConfig, {"num_codebooks": 1}, "num_codebooks"),
        (MidiValleNARConfig, {"hidden_size": "wide"}, "hidden_size"),
        (MidiValleConfig, {"nar_config": {"codebook_size": 1024}}, "codebook_size"),
        (
            MidiValleConfig,
            {"ar_config": {"code_choice": "expected"}, "has_codec": False},
            "needs the codec's codebooks",
        ),
        (MidiValleConfig, {"nar_config": {"midi_vocab_sizes": [92, 68, 1156, 772, 388, 21]}}, "vocabularies"),
    ],
)
def test_contradictions_are_refused(config_class, fields, message):
    with pytest.raises(Exception, match=message):
        config_class(**fields)


def test_unknown_preset_names_the_choices():
    with pytest.raises(ValueError, match="tiny, starter, base, published"):
        MidiValleARConfig.from_preset("huge")


def test_published_size():
    with torch.device("meta"):
        config = MidiValleConfig.from_preset("published")
        model = MidiValleForConditionalGeneration(config)
    decoders = {id(p): p for part in (model.ar, model.nar) for p in part.parameters()}
    tied = 2 * 2048 * 1024  # two heads; on meta they are not yet one tensor with their tables
    tables = sum(v * w for v, w in zip(config.ar_config.midi_vocab_sizes, config.ar_config.midi_embedding_sizes))
    count = sum(p.numel() for p in decoders.values())
    assert 371_021_188 in (count, count - tied - tables)


def test_starter_fits_the_checkpoint():
    count = {}
    for name, config, model in (
        ("ar", MidiValleARConfig, MidiValleARModel),
        ("nar", MidiValleNARConfig, MidiValleNARModel),
    ):
        count[name] = sum(p.numel() for p in model(config.from_preset("starter")).parameters())
    assert count == {"ar": 4_659_264, "nar": 6_497_344}
