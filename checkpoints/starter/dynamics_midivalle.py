# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What velocities do to single keys, where the codec's decoder is given the mean of what is likely.

Such a mean knows how loud the music is, but of the keys of a chord it makes the loud ones too soft, and the decoder,
which has learned from codes, hardly heeds the velocities that it is told. Behind its LSTM each pitch is a pair of
channels, though. So the pitches of a struck key's partials are made louder there by as much as its velocity is above
that of the keys before it. A key that is softer is made softer only where nothing else sounds: a pitch that became
softer at a strike would hide it.
"""

import math

import torch

OSCILLATOR_PITCH = 28  # MIDI pitch of the first pair of channels, E1; the others follow by semitones
KEY_PITCH = 21  # of key 0, A0
PARTIALS = ((0, 1.0), (12, 0.8), (19, 0.6), (24, 0.5), (28, 0.4), (31, 0.35), (34, 0.3), (36, 0.3))  # semitones, share
SOFTEST_DB = -3.0  # softer keys are not made to vanish
LEVEL_DB = -0.6  # of all pitches: the music as a whole is to stay as loud as it is
FADING_S = 1.5  # in which what a strike changes falls to 1/e
MEMORY_S = 30.0  # of the mean velocity
KNOWN = 10.0  # strikes that the mean of the whole piece stands for


class KeyDynamics:
    """
    Gains of a decoder's pitches over one piece.

    Args:
        gain_db (`float`): dB that a key of velocity 127 is made louder by than one of velocity 0.
        mean_velocity (`float`): of the piece, over 127.
        num_pitches (`int`): pairs of channels behind the LSTM.
        frame_rate (`int`): frames a second.
    """

    def __init__(self, gain_db: float, mean_velocity: float, num_pitches: int, frame_rate: int):
        self.gain_db, self.num_pitches = gain_db, num_pitches
        self.fading, self.memory = (math.exp(-1 / (s * frame_rate)) for s in (FADING_S, MEMORY_S))
        self.heard, self.strikes = KNOWN * mean_velocity, KNOWN  # sum of the velocities, and how many
        self.partials = torch.zeros(88, num_pitches)
        for above, share in PARTIALS:
            for key in range(88):
                if 0 <= (pitch := KEY_PITCH + key + above - OSCILLATOR_PITCH) < num_pitches:
                    self.partials[key, pitch] = share
        self.gain, self.sounding = torch.zeros(num_pitches), torch.zeros(num_pitches)  # dB, and a share from 0 to 1

    def __call__(self, struck: torch.Tensor) -> torch.Tensor:
        """Factors `(1, T, 2 * num_pitches)` of the first channels behind the LSTM, for the next frames of `struck`
        `(1, T, 88)`, velocity over 127 where a key is struck."""
        gains = []
        for velocities in struck[0].cpu():
            self.heard, self.strikes = self.heard * self.memory, self.strikes * self.memory
            self.gain, self.sounding = self.gain * self.fading, self.sounding * self.fading
            if len(keys := velocities.nonzero()[:, 0]):
                self._strike(velocities[keys], self.partials[keys])
            gains.append(self.gain)
        decibels = torch.stack(gains) if gains else self.gain.new_zeros(0, self.num_pitches)
        return (10 ** ((decibels + LEVEL_DB) / 20)).repeat_interleave(2, 1)[None].to(struck.device)

    def _strike(self, velocities: torch.Tensor, partials: torch.Tensor) -> None:
        """Keys of `velocities` `(N,)` are struck in this frame, which have shares in pitches, `partials` `(N, P)`."""
        self.heard, self.strikes = self.heard + float(velocities.sum()), self.strikes + len(velocities)
        wanted = self.gain_db * (velocities - self.heard / self.strikes)[:, None]
        louder = (wanted.clamp(min=0) * partials).amax(0)
        softer = (wanted.clamp(SOFTEST_DB, 0) * partials).amin(0) * (1 - self.sounding)
        is_free = (self.gain <= 0) & (partials > 0).any(0)
        self.gain = torch.where(louder > 0, self.gain.maximum(louder), torch.where(is_free, softer, self.gain))
        self.sounding = (self.sounding + partials.sum(0)).clamp(max=1)


__all__ = ["KeyDynamics"]
