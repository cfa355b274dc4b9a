# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The vocabulary of MIDI-VALLE as a miditok tokenizer: six fields a note, one vocabulary a field.

It defines the ids, translates them to tokens and MIDI, and encodes a score at 120 BPM as the published tokenizer
("ExpressionTok", a miditok 3.0 subclass) does. Stock `miditok.Octuple` has other fields in another order.
"""

from miditok import Event, MusicTokenizer, TokenizerConfig
from symusic import Note, Score, Tempo, TimeSignature, Track

FIELDS = ("Pitch", "Velocity", "Duration", "IOI", "Position", "Bar")
VOCAB_SIZES = (92, 68, 1156, 772, 388, 20)  # each with the four special tokens first
SPECIAL_TOKENS = ("PAD", "BOS", "EOS", "MASK")  # ids 0 to 3 in every field
TICKS_PER_BAR = 384  # 4/4 at 96 ticks per beat: 2 s at 120 BPM
NUM_BARS = VOCAB_SIZES[5] - len(SPECIAL_TOKENS)  # 32 s in one sequence


def default_config() -> TokenizerConfig:
    """The published settings, with as many bars as the model's table has rows (16, not 3000)."""
    return TokenizerConfig(
        pitch_range=(21, 109),
        beat_res={(0, 12): 96},
        num_velocities=64,
        special_tokens=list(SPECIAL_TOKENS),
        use_time_signatures=False,
        max_bar_embedding=NUM_BARS,
    )


class MidiValleMidiTok(MusicTokenizer):
    """miditok tokenizer with the vocabularies of `VOCAB_SIZES`. Tempo, meter and pedal are not read: give 120 BPM."""

    def _tweak_config_before_creating_voc(self):
        config = self.config
        for option in vars(config):
            if option.startswith("use_") and isinstance(getattr(config, option), bool):
                setattr(config, option, option == "use_velocities")
        config.program_changes = config.one_token_stream_for_programs = False
        self._disable_attribute_controls()
        self.vocab_types_idx = {field: i for i, field in enumerate(FIELDS)}

    def preprocess_score(self, score: Score) -> Score:
        """As miditok's, after the notes are sorted by (onset, pitch, duration), the order of the published ids.

        symusic 0.4 read files in that order; 0.5 and later sort by (onset, duration, pitch), and miditok does not sort.
        Key 109 is left out here because miditok's own filter lets it through to a KeyError.
        """
        score, keys = score.copy(), range(*self.config.pitch_range)
        for track in score.tracks:
            notes = [note for note in track.notes if note.pitch in keys]
            track.notes = type(track.notes)(sorted(notes, key=lambda note: (note.time, note.pitch, note.duration)))
        return super().preprocess_score(score)

    def _create_base_vocabulary(self) -> list[list[str]]:
        values = (
            range(*self.config.pitch_range),
            self.velocities,
            (".".join(map(str, duration)) for duration in self.durations),
            range(-TICKS_PER_BAR, TICKS_PER_BAR),  # below 0: the age of a held note
            range(TICKS_PER_BAR),
            range(self.config.additional_params["max_bar_embedding"]),
        )
        return [[f"{field}_{value}" for value in column] for field, column in zip(FIELDS, values, strict=True)]

    def _create_token_types_graph(self) -> dict:
        return {}

    def _add_time_events(self, events: list[Event], time_division: int) -> list[list[Event]]:
        rows, previous = [], None
        for pitch, velocity, duration in zip(events, events[1:], events[2:], strict=False):
            if pitch.type_ != "Pitch":
                continue
            time = pitch.time  # ticks: the score was resampled to 96 a beat
            ioi = 0 if previous is None else min(time - previous, TICKS_PER_BAR - 1)
            previous = time
            values = (pitch.value, velocity.value, duration.value, ioi, time % TICKS_PER_BAR, time // TICKS_PER_BAR)
            rows.append([Event(field, value, time) for field, value in zip(FIELDS, values, strict=True)])
        return rows

    def _tokens_to_score(self, tokens, programs=None) -> Score:
        score = Score(self.time_division)
        score.tempos.append(Tempo(0, self.default_tempo))
        score.time_signatures.append(TimeSignature(0, 4, 4))
        length = self._tpb_tokens_to_ticks[self.time_division]
        for sequence in tokens:
            track = Track(program=0, is_drum=False, name="Piano")
            for row in sequence.tokens:
                pitch, velocity, duration, _, position, bar = (token.split("_")[1] for token in row)
                onset = int(bar) * TICKS_PER_BAR + int(position)
                track.notes.append(Note(onset, length[duration], int(pitch), int(velocity)))
            score.tracks.append(track)
        return score
