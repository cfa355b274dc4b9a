# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Codes of any length -> audio piece by piece: the audio of one decode, in memory that does not grow."""

import torch
from torch import nn
from transformers.models.encodec.modeling_encodec import EncodecLSTM

from .dynamics_midivalle import KeyDynamics, TrebleSplit
from .modeling_midivalle_frame_notes import PlayedKeys
from .recording_midivalle import RecordingChain, RecordingStream

CONTEXT_BEHIND_LSTM = 4  # frames on both sides that the layers behind the LSTM can see, rounded up


class SlidingLayers:
    """
    Convolutional layers over a stream: what they give piece by piece is what they give for the whole. A layer pads only
    at the true beginning and at the true end; in between its neighbours on both sides are computed again.

    Args:
        layers (`list[nn.Module]`): from `(1, C, T)` to `(1, C', rate * T)`.
        context (`int`): inputs on each side that an output may depend on.
        rate (`int`): outputs of one input.
    """

    def __init__(self, layers: list[nn.Module], context: int, rate: int):
        self.layers, self.context, self.rate = layers, context, rate
        self.inputs, self.given = None, 0  # the last inputs, and how many of them have had their outputs

    def push(self, inputs: torch.Tensor, is_last: bool) -> torch.Tensor | None:
        """The next outputs `(1, C', rate * t)`: all but those that later inputs can change; None if there are none."""
        self.inputs = inputs if self.inputs is None else torch.cat([self.inputs, inputs], -1)
        ready = self.inputs.shape[-1] - (0 if is_last else self.context)
        if ready <= self.given:
            return None
        outputs = self.inputs
        for layer in self.layers:
            outputs = layer(outputs)
        outputs = outputs[..., self.given * self.rate : ready * self.rate]
        dropped = max(ready - self.context, 0)
        self.inputs, self.given = self.inputs[..., dropped:].clone(), ready - dropped
        return outputs


class CodecStream:
    """
    The decoder of a [`PianoEncodecModel`] over one piece. The LSTM, which remembers all frames before, keeps its state;
    the convolutions before and behind it see a few frames on both sides, so audio comes `delay` frames after its codes.

    Args:
        codec (`PianoEncodecModel`): in eval mode.
        recording (`RecordingChain`, *optional*): whose colour and noise all the audio is given.
        begins_silent (`bool`, *optional*): until the first key is struck, nothing but that noise is heard: oscillators
            that swing up from rest are, softly, and predicted codes are seldom quite silent. Needs `keys`.
        dynamics (`KeyDynamics`, *optional*): makes struck keys as loud and bright as their velocities say. Needs
            `keys`.

    Example:

    ```python
    >>> stream = CodecStream(model.codec)
    >>> audio = torch.cat([stream.push(codes[..., :100]), stream.push(codes[..., 100:], is_last=True)], -1)
    ```"""

    def __init__(
        self,
        codec,
        recording: RecordingChain | None = None,
        begins_silent: bool = False,
        dynamics: KeyDynamics | None = None,
    ):
        layers = list(codec.decoder.layers)
        recurrent = next(i for i, layer in enumerate(layers) if isinstance(layer, EncodecLSTM))
        self.codec, self.lstm, self.state = codec, layers[recurrent].lstm, None
        self.before = SlidingLayers(layers[:recurrent], codec.config.kernel_size - 1, 1)
        behind = layers[recurrent + 1 :]
        if dynamics is not None:
            behind.append(TrebleSplit(codec.config.sampling_rate))
        self.behind = SlidingLayers(behind, CONTEXT_BEHIND_LSTM, codec.config.hop_length)
        self.recording = None if recording is None else RecordingStream(recording)
        self.is_silent, self.silent_frames, self.given = begins_silent, 0, 0  # so far; samples that were given
        self.dynamics = dynamics
        self.gains = self.treble = None  # of frames that the LSTM, and the layers behind it, have not had yet

    @property
    def delay(self) -> int:
        """Frames by which the audio is behind the codes until the last push."""
        return self.before.context + self.behind.context

    @torch.no_grad()
    def push(
        self,
        audio_codes: torch.LongTensor,
        is_last: bool = False,
        keys: PlayedKeys | None = None,
        vectors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            audio_codes (`torch.LongTensor` of shape `(1, K, T)`): the next frames.
            is_last (`bool`): nothing follows: all the audio that is left is given.
            keys (`PlayedKeys` of shape `(1, T, 88)`, *optional*): which keys are struck, whatever the codes say, and
                which are held.
            vectors (`torch.Tensor` of shape `(1, A, T)`, *optional*): as in [`PianoEncodecModel.decode_codes`].
        Returns:
            `torch.Tensor` of shape `(1, 1, samples)`: the next audio, float32; possibly of no sample.
        """
        nothing = torch.zeros(1, 1, 0, device=audio_codes.device)
        if self.is_silent:
            self._listen(audio_codes.shape[-1], keys)
        if self.dynamics is not None:
            gains, treble = self.dynamics(_told(keys))
            self.gains = gains if self.gains is None else torch.cat([self.gains, gains], 1)
            self.treble = treble if self.treble is None else torch.cat([self.treble, treble], 1)
        latent = self.codec.latent_of(audio_codes, None if keys is None else keys.struck, vectors)
        hidden = self.before.push(latent.to(next(self.codec.decoder.parameters()).dtype), is_last)
        if hidden is None:
            return nothing
        frames = hidden.permute(2, 0, 1)
        remembered, self.state = self.lstm(frames, self.state)
        hidden = (remembered + frames).permute(1, 2, 0)
        if self.dynamics is not None:
            gains, self.gains = self.gains[:, : len(frames)], self.gains[:, len(frames) :]
            hidden[:, : gains.shape[-1]] *= gains.transpose(1, 2).to(hidden)
        wave = self.behind.push(hidden, is_last)
        if wave is None:
            return nothing
        wave = self._silenced(self._brightened(wave.float()))
        return wave if self.recording is None else self.recording(wave)

    def _brightened(self, wave: torch.Tensor) -> torch.Tensor:
        """The next samples `(1, 1, L)` of `wave`, or of both parts of a `TrebleSplit` `(1, 2, L)`, whose treble gets
        its factors, with straight lines between frames."""
        if self.dynamics is None:
            return wave
        hop = self.codec.config.hop_length
        frames = wave.shape[-1] // hop
        begin, self.treble = self.treble[0, :frames], self.treble[:, frames:]
        end = torch.cat([begin[1:], self.treble[0, :1] if self.treble.shape[1] else begin[-1:]])
        factors = begin[:, None] + (end - begin)[:, None] * torch.arange(hop, device=wave.device) / hop
        return wave[:, :1] + (factors.flatten() - 1) * wave[:, 1:]

    def _listen(self, frames: int, keys: PlayedKeys | None) -> None:
        """Count frames up to the first of some `frames` in which one of `keys` is struck."""
        when = _told(keys).struck[0].any(-1).nonzero()
        self.is_silent = not len(when)
        self.silent_frames += int(when[0]) if len(when) else frames

    def _silenced(self, wave: torch.Tensor) -> torch.Tensor:
        """The next samples `(1, 1, L)`, without those before the first strike; they rise within the frame before it."""
        hop, begin = self.codec.config.hop_length, self.given
        self.given += wave.shape[-1]
        if begin >= self.silent_frames * hop:
            return wave
        place = torch.arange(begin, self.given, device=wave.device) / hop
        return wave * (place - (self.silent_frames - 1)).clamp(0, 1)


def _told(keys: PlayedKeys | None) -> PlayedKeys:
    if keys is None:
        raise ValueError("a stream with dynamics, or one that begins silent, has to be told which keys are struck")
    return keys


__all__ = ["CodecStream"]
