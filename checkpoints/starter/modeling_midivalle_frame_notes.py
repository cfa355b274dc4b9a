# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""
Frame-synchronous notes: the state of the 88 keys at each codec frame, computed from the MIDI ids inside the model.

Attention over MIDI rows has to find the notes of a frame; here they are laid beside it. A key has one state, that of
its latest strike, as on a piano.
"""

from typing import NamedTuple

import torch
from torch import nn

from .configuration_midivalle import TICKS_PER_BAR, UNITS_PER_FRAME, UNITS_PER_SECOND, UNITS_PER_TICK

NUM_KEYS = 88  # of a piano
LONGEST = 3 + 1152  # duration id of a row of 6 s
OLDEST = 4  # IOI id of a held row whose note was struck 2 s before or earlier
MOST_ROWS = 6  # of one note: a sequence holds 32 s
RELEASE_S = 0.1  # s, fall of the "how long ago was it released" feature
LONG_AGO = -1e9  # 1/4800 s; for keys never struck


class Notes(NamedTuple):
    """The MIDI rows as numbers, each `(B, N)`; times in 1/4800 s as float32 (exact to 2^24, about an hour)."""

    key: torch.LongTensor  # 0 .. 87
    onset: torch.Tensor  # where the row stands
    strike: torch.Tensor  # when the hammer fell: earlier than the onset for held rows
    end: torch.Tensor  # of the last of the rows that continue it
    velocity: torch.Tensor  # 0 .. 1
    valid: torch.BoolTensor  # False for padding, BOS and EOS rows, and for those that continue another


class PlayedKeys(NamedTuple):
    """What keys do in frames, each `(B, T, 88)`: velocity over 127 where one is struck, else 0; whether it is held."""

    struck: torch.Tensor
    held: torch.BoolTensor

    def cut(self, row: int, begin: int, end: int) -> "PlayedKeys":
        """Frames `begin` to `end` of one row, `(1, T, 88)`."""
        return PlayedKeys(*(keys[row : row + 1, begin:end] for keys in self))


def read_notes(midi_ids: torch.LongTensor, midi_attention_mask: torch.Tensor) -> Notes:
    """`midi_ids` `(B, N, 6)` as numbers again; an IOI id below 388 marks a held note, struck 388 - id ticks before. A
    held row of the oldest age at the end of a row of 6 s of its key *continues* that one: there it counts."""
    pitch, velocity, duration, ioi, position, bar = midi_ids.unbind(-1)
    valid = midi_attention_mask.bool() & (midi_ids >= 4).all(-1)
    onset = ((bar - 4) * TICKS_PER_BAR + position - 4) * UNITS_PER_TICK
    age = (388 - ioi).clamp(min=0) * UNITS_PER_TICK
    end = onset + (duration - 3) * UNITS_PER_TICK
    key = (pitch - 4).clamp(min=0)
    is_full, is_old = valid & (duration == LONGEST), valid & (ioi == OLDEST)
    follows = is_full[:, :, None] & is_old[:, None] & (end[:, :, None] == onset[:, None])  # (B, N, of which row)
    follows &= key[:, :, None] == key[:, None]
    is_continued, after = nn.functional.pad(follows, (0, 1)).max(2)  # a place more: there may be no rows at all
    after = torch.where(is_continued, after, torch.arange(after.shape[1], device=after.device))
    for _ in range(MOST_ROWS - 1):
        end = end.gather(1, after)
    valid &= ~follows.any(1)
    return Notes(key, onset.float(), (onset - age).float(), end.float(), (2 * (velocity - 4) + 1).float() / 127, valid)


def struck_keys(
    midi_ids: torch.LongTensor, midi_attention_mask: torch.Tensor, first: torch.LongTensor, frames: int
) -> torch.Tensor:
    """
    Velocity over 127 where a key is struck in a frame, else 0, `(B, frames, 88)`, of the MIDI rows `(B, N, 6)`; the
    result begins at frame `first` `(B,)` of their time axis. Held rows were struck before, and are not again.
    """
    notes = read_notes(midi_ids, midi_attention_mask)
    place = notes.onset.long() // UNITS_PER_FRAME - first[:, None]
    inside = notes.valid & (notes.strike >= notes.onset) & (place >= 0) & (place < frames)
    flat = place.clamp(0, max(frames - 1, 0)) * NUM_KEYS + notes.key
    struck = notes.velocity.new_zeros(len(midi_ids), frames * NUM_KEYS)
    if frames:
        struck.scatter_reduce_(1, flat, notes.velocity * inside, "amax")
    return struck.view(len(midi_ids), frames, NUM_KEYS)


def held_keys(
    midi_ids: torch.LongTensor, midi_attention_mask: torch.Tensor, first: torch.LongTensor, frames: int
) -> torch.BoolTensor:
    """Whether a key is held in a frame, or the pedal holds its tone, `(B, frames, 88)`; arguments as `struck_keys`."""
    notes = read_notes(midi_ids, midi_attention_mask)
    changes = notes.velocity.new_zeros(len(midi_ids), (frames + 1) * NUM_KEYS)
    for time, change in ((notes.onset, 1.0), (notes.end, -1.0)):
        place = (time.long() // UNITS_PER_FRAME - first[:, None]).clamp(0, frames)
        changes.scatter_add_(1, place * NUM_KEYS + notes.key, change * notes.valid)
    return changes.view(len(midi_ids), frames + 1, NUM_KEYS).cumsum(1)[:, :frames] > 0


def sounds_before(
    midi_ids: torch.LongTensor, midi_attention_mask: torch.Tensor, first: torch.LongTensor
) -> torch.BoolTensor:
    """Whether a note sounds on from before frame `first` `(B,)`, `(B,)`: whether a held row stands there or later."""
    notes = read_notes(midi_ids, midi_attention_mask)
    is_held = notes.valid & (notes.strike < notes.onset)
    return (is_held & (notes.onset.long() // UNITS_PER_FRAME >= first[:, None])).any(1)


class FrameNotes(nn.Module):
    """
    Maps the keys' states around each frame to a vector: per key the strike (weight shared between its frame and the
    next), its place inside the frame, how much of the frame sounds, the tone's age (one feature per entry of `decays`,
    the seconds in which it falls to 1/e) and the time since its release; for the other offsets only the two strike
    features.
    """

    def __init__(self, num_keys: int, hidden_size: int, offsets: list[int], decays: list[float]):
        super().__init__()
        self.num_keys, self.offsets, self.decays = num_keys, offsets, decays
        self.projection = nn.Linear(num_keys * (2 * len(offsets) + 2 + len(decays)), hidden_size, bias=False)

    def forward(self, notes: Notes, frames: torch.LongTensor) -> torch.Tensor:
        """
        Args:
            notes (`Notes`): of all rows, prompt and target, in order of onset.
            frames (`torch.LongTensor` of shape `(B, T)`): wanted frames; they rise by 0 or 1 from place to place
                (of padded places, which may do otherwise, the result does not matter).
        Returns:
            `torch.Tensor` of shape `(B, T, hidden_size)`.
        """
        with torch.no_grad():
            T = frames.shape[1]
            first = frames.amin(1, keepdim=True)
            place = (frames - first).clamp(0, T - 1)
            low, high = min(self.offsets), max(self.offsets)
            strikes, tones = self.key_states(notes, first + low, T + high - low)
            parts = [_take(strikes, place + o - low) for o in self.offsets] + [_take(tones, place - low)]
        return self.projection(torch.cat(parts, -1).to(self.projection.weight.dtype))

    def key_states(self, notes: Notes, first: torch.LongTensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Features of the frames `first` `(B, 1)` .. `first + width - 1`: strikes `(B, width, 2 * num_keys)` and tones
        `(B, width, (2 + len(decays)) * num_keys)`, float32.
        """
        B = len(first)
        latest = self._latest_row(notes, first, width).flatten(1)  # (B, width * num_keys), 0 = none, else row + 1
        shape = (B, width, self.num_keys)

        def of_row(values: torch.Tensor, missing: float) -> torch.Tensor:
            return nn.functional.pad(values, (1, 0), value=missing).gather(1, latest).view(shape)

        strike, end = of_row(notes.strike, LONG_AGO), of_row(notes.end, LONG_AGO)
        velocity = of_row(notes.velocity, 0.0)
        start = ((first + torch.arange(width, device=first.device)) * UNITS_PER_FRAME).float()[
            ..., None
        ]  # (B, width, 1)
        late = (strike - start) / UNITS_PER_FRAME  # in frames: [0, 1) in the frame of the strike, [-1, 0) one later
        struck = velocity * (1 - late.abs()).clamp(min=0)
        inside = late * (late >= 0)
        sounding = ((end - start) / UNITS_PER_FRAME).clamp(0, 1)
        age = (strike - start).clamp(max=0) / UNITS_PER_SECOND
        ages = [torch.exp(age / decay) * (sounding > 0) for decay in self.decays]
        since = start + UNITS_PER_FRAME - end
        release = torch.exp(-since.clamp(min=0) / (RELEASE_S * UNITS_PER_SECOND)) * (since > 0)
        return torch.cat([struck, inside], -1), torch.cat([velocity * sounding, *ages, release], -1)

    def _latest_row(self, notes: Notes, first: torch.LongTensor, width: int) -> torch.LongTensor:
        """Per frame and key the latest row that has begun, plus one, `(B, width, num_keys)`; rows rise with onset."""
        B, N = notes.key.shape
        place = (notes.onset.long() // UNITS_PER_FRAME - first).clamp(min=0)  # older rows count from the first frame on
        row = torch.arange(1, N + 1, device=first.device).expand(B, N)
        row = torch.where(notes.valid & (place < width), row, 0)
        flat = place.clamp(max=width - 1) * self.num_keys + notes.key
        begun = torch.zeros(B, width * self.num_keys, dtype=torch.long, device=first.device)
        begun = begun.scatter_reduce(1, flat, row, "amax").view(B, width, self.num_keys)
        return begun.cummax(1).values


def _take(features: torch.Tensor, place: torch.LongTensor) -> torch.Tensor:
    """Rows `place` `(B, T)` of `features` `(B, W, C)`."""
    return features.gather(1, place[..., None].expand(-1, -1, features.shape[-1]))
