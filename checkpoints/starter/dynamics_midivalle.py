# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What single keys lack in loudness, where the codec's decoder is given the mean of what is likely.

Such a mean knows how loud the music is, but of the keys of a chord it makes the loud ones too soft, and the decoder
heeds the velocities that it is told too little. Behind its LSTM each pitch is a pair of
channels, though. So the pitches of a struck key's partials are made louder there by as much as its velocity is above
that of the keys before it. A key that is softer is made softer only where nothing else sounds: a pitch that became
softer at a strike would hide it.

Keys an octave apart share the lower one's even partials, and so all of the upper one's: struck together they sound
like one. So the upper one's odd partials are made louder then, whatever its velocity; and only for as long as it takes
to hear that it is there, for tones that stay louder colour the whole piece.

The keys of a chord hide each other where they begin, in such a mean. So all keys are made louder for as long as
they are being struck, some 1 dB beyond what recordings do, and each of them is heard. But of a key that is struck alone
the even partials are made softer: they are the pitches of the key an octave above, which would be heard too, where a
piano's second partial is as strong as its first.

Tones die too soon, in such a mean, and with codes from recordings too. So where nothing has been struck for a moment,
the pitches of the keys that are held become louder, until something is struck: as loud as they should be beside a
strike, they would hide it. One or two keys alone lack more than the keys of a chord. After three seconds it is the
other way: the mean hardly falls any more, as a tone does that is held on, so it is made to; recordings' own codes fall.

A key that is struck harder is brighter, too. Above 4 kHz the decoder's audio tells half as much of it as recordings do;
there the audio itself is made louder and softer. And softer while nothing is struck: what a mean leaves there hardly
falls, where strings fall first.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .modeling_midivalle_frame_notes import PlayedKeys

OSCILLATOR_PITCH = 28  # MIDI pitch of the first pair of channels, E1; the others follow by semitones
KEY_PITCH = 21  # of key 0, A0
PARTIALS = ((0, 1.0), (12, 0.8), (19, 0.6), (24, 0.5), (28, 0.4), (31, 0.35), (34, 0.3), (36, 0.3))  # semitones, share
OCTAVE_PARTIALS = PARTIALS[::2]  # the odd ones
SOFTEST_DB = -3.0  # softer keys are not made to vanish
LEVEL_DB = -0.8  # of all pitches: the music as a whole is to stay as loud as it is
FADING_S, OCTAVE_FADING_S, ATTACK_FADING_S, TREBLE_FADING_S = 0.5, 0.3, 0.12, 1.0  # to 1/e of what a strike does
SUSTAIN_AFTER_S, SUSTAIN_LIMIT_DB = 0.4, 8.0  # tones are as loud as they should be for so long; later lack up to that
FEW_KEYS, FEW_LIMIT_DB = 2, 14.0  # or, so few of them, up to that
LATE_S, LATE_DB_PER_S = 3.0, 1.8  # after so long generated tones hardly fall any more; pianos' fall so fast
SUSTAIN_FADING_S = 0.3  # to 1/e, once a key is struck, and of those that are not held any more
MEMORY_S = 30.0  # of the mean velocity
KNOWN = 10.0  # strikes that the mean of the whole piece stands for
TREBLE_HZ, TREBLE_TAPS = 3500.0, 31  # so few taps rise from 1.5 to 5.5 kHz, as what is missing does
TREBLE_LIMITS_DB = (-9.0, 12.0)
DULL_AFTER_S, DULL_DB_PER_S, DULL_LIMIT_DB = 0.6, 6.0, 12.0  # of generated tones while none is struck


class Dynamics(NamedTuple):
    """Factors of what the first channels behind the LSTM hold beyond what they hold in silence,
    `(1, T, 2 * num_pitches)`, and of the audio's treble, `(1, T)`, at the beginning of each frame."""

    pitches: torch.Tensor
    treble: torch.Tensor


class KeyDynamics:
    """
    Gains of a decoder's pitches, and of its audio's treble, over one piece.

    Args:
        gain_db (`float`): dB that a key of velocity 127 is made louder by than one of velocity 0.
        mean_velocity (`float`): of the piece, over 127.
        num_pitches (`int`): pairs of channels behind the LSTM.
        frame_rate (`int`): frames a second.
        treble_db (`float`, *optional*): as `gain_db`, of the treble: by the hardest of the keys that are struck in a
            frame.
        octave_db (`float`, *optional*): dB that a key is made louder by if the one an octave below is struck with it.
        attack_db (`float`, *optional*): dB that a key is made louder by while it is struck.
        sustain_db (`float`, *optional*): dB a second that held keys are made louder by while none is struck, up to 8,
            one or two of them up to 14.
        late_db (`float`, *optional*): dB a second that they are made softer by after three seconds of it; beside
            `sustain_db`. With it, for it is for generated tones, the treble falls while none is struck, and the even
            partials of a key that is struck alone are made softer by `attack_db`, not louder.
    """

    def __init__(
        self,
        gain_db: float,
        mean_velocity: float,
        num_pitches: int,
        frame_rate: int,
        treble_db: float = 0.0,
        octave_db: float = 0.0,
        attack_db: float = 0.0,
        sustain_db: float = 0.0,
        late_db: float = 0.0,
    ):
        self.gain_db, self.treble_db, self.octave_db, self.attack_db = gain_db, treble_db, octave_db, attack_db
        self.num_pitches, self.frame_rate, self.rise = num_pitches, frame_rate, sustain_db / frame_rate
        self.fading, self.octave_fading = (_decay(s * frame_rate) for s in (FADING_S, OCTAVE_FADING_S))
        self.attack_fading, self.treble_fading = (_decay(s * frame_rate) for s in (ATTACK_FADING_S, TREBLE_FADING_S))
        self.sustain_fading, self.memory = (_decay(s * frame_rate) for s in (SUSTAIN_FADING_S, MEMORY_S))
        self.rest = 0  # frames since a key was struck
        self.short_rest, self.late = SUSTAIN_AFTER_S * frame_rate, LATE_S * frame_rate
        self.late_fall = late_db / frame_rate
        self.heard, self.strikes = KNOWN * mean_velocity, KNOWN  # sum of the velocities, and how many
        self.partials, self.odd_partials = (_shares(x, num_pitches) for x in (PARTIALS, OCTAVE_PARTIALS))
        self.lone_shares = self.odd_partials - ((self.partials > 0) & (self.odd_partials == 0)).float()
        self.gain, self.octaves, self.attack, self.sustain = torch.zeros(4, num_pitches)  # dB
        self.sounding = torch.zeros(num_pitches)  # a share from 0 to 1
        self.struck = torch.zeros(88, dtype=torch.bool)  # a frame ago
        self.treble = 0.0  # dB

    def __call__(self, keys: PlayedKeys) -> Dynamics:
        """Of the next frames, `keys` `(1, T, 88)`."""
        gains, treble = [self.gain.new_zeros(0, self.num_pitches)], []
        for velocities, held in zip(keys.struck[0].cpu(), keys.held[0].cpu()):
            self.heard, self.strikes = self.heard * self.memory, self.strikes * self.memory
            self.gain, self.sounding = self.gain * self.fading, self.sounding * self.fading
            self.octaves, self.attack = self.octaves * self.octave_fading, self.attack * self.attack_fading
            self.treble = self.treble * self.treble_fading
            self.rest += 1
            if len(new := velocities.nonzero()[:, 0]):
                self._strike(velocities[new], self.partials[new])
                self._attack((velocities > 0) | self.struck)
                self._strike_octaves(velocities > 0)
            self._sustain(held)
            self.struck = velocities > 0
            gains.append((self.gain + self.octaves + self.attack + self.sustain)[None])
            treble.append(self.treble - self._dulled())
        pitches = _factors(torch.cat(gains) + LEVEL_DB).repeat_interleave(2, 1)
        return Dynamics(*(x[None].to(keys.struck.device) for x in (pitches, _factors(torch.tensor(treble)))))

    def _strike(self, velocities: torch.Tensor, partials: torch.Tensor) -> None:
        """Keys of `velocities` `(N,)` are struck in this frame, which have shares in pitches, `partials` `(N, P)`."""
        self.heard, self.strikes = self.heard + float(velocities.sum()), self.strikes + len(velocities)
        above = velocities - self.heard / self.strikes
        wanted = self.gain_db * above[:, None]
        louder = (wanted.clamp(min=0) * partials).amax(0)
        softer = (wanted.clamp(SOFTEST_DB, 0) * partials).amin(0) * (1 - self.sounding)
        is_free = (self.gain <= 0) & (partials > 0).any(0)
        self.gain = torch.where(louder > 0, self.gain.maximum(louder), torch.where(is_free, softer, self.gain))
        self.sustain, self.rest = self.sustain * (1 - partials.amax(0)), 0
        self.sounding = (self.sounding + partials.sum(0)).clamp(max=1)
        low, high = TREBLE_LIMITS_DB
        self.treble = min(max(self.treble_db * float(above.max()), low), high)

    def _attack(self, near: torch.Tensor) -> None:
        """The keys `near` `(88,)` are struck in this frame or were in the one before."""
        shares = self.lone_shares if near.sum() == 1 and self.late_fall else self.partials
        wanted = self.attack_db * shares[near].amax(0)
        self.attack = torch.where((wanted < 0) & (self.attack <= 0), wanted, self.attack.maximum(wanted))

    def _strike_octaves(self, struck: torch.Tensor) -> None:
        """Of the keys `struck` `(88,)` in this frame and those of the frame before; at least one is of this frame."""
        near = struck | self.struck
        upper = (near[12:] & near[:-12] & (struck[12:] | struck[:-12])).nonzero()[:, 0] + 12
        if len(upper):
            self.octaves = self.octaves.maximum(self.octave_db * self.odd_partials[upper].amax(0))

    def _dulled(self) -> float:
        """dB that the treble of this frame has fallen by since a key was struck."""
        fallen = max(self.rest / self.frame_rate - DULL_AFTER_S, 0) * DULL_DB_PER_S
        return min(fallen, DULL_LIMIT_DB) if self.late_fall else 0.0

    def _sustain(self, held: torch.BoolTensor) -> None:
        """One frame of the keys that are `held` `(88,)`."""
        faded = self.sustain * self.sustain_fading
        if self.rest <= self.short_rest or not held.any() or not self.rise:
            self.sustain = faded
            return
        shares = self.partials[held].amax(0)
        most = FEW_LIMIT_DB if held.sum() <= FEW_KEYS else SUSTAIN_LIMIT_DB
        limit = most * shares - max(self.rest - self.late, 0) * self.late_fall
        self.sustain = torch.where(shares > 0, limit.minimum(self.sustain + self.rise * shares), faded)


class TrebleSplit(nn.Module):
    """Audio `(1, 1, L)` -> the same and its treble alone, `(1, 2, L)`, in time with each other."""

    def __init__(self, sampling_rate: int):
        super().__init__()
        place = torch.arange(TREBLE_TAPS) - TREBLE_TAPS // 2
        low = torch.sinc(place * (2 * TREBLE_HZ / sampling_rate)) * torch.hamming_window(TREBLE_TAPS, periodic=False)
        taps = (place == 0).float() - low / low.sum()
        self.register_buffer("taps", taps[None, None], persistent=False)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return torch.cat([audio, F.conv1d(audio, self.taps.to(audio), padding=TREBLE_TAPS // 2)], 1)


def _decay(frames: float) -> float:
    """What is left after one frame of what falls to 1/e in so many."""
    return math.exp(-1 / frames)


def _shares(partials: tuple[tuple[int, float], ...], num_pitches: int) -> torch.Tensor:
    """Share of each pitch in each key, `(88, num_pitches)`."""
    shares = torch.zeros(88, num_pitches)
    for above, share in partials:
        for key in range(88):
            if 0 <= (pitch := KEY_PITCH + key + above - OSCILLATOR_PITCH) < num_pitches:
                shares[key, pitch] = share
    return shares


def _factors(decibels: torch.Tensor) -> torch.Tensor:
    return 10 ** (decibels / 20)


__all__ = ["KeyDynamics", "TrebleSplit"]
