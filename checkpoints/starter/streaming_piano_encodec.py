# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Codes of any length -> audio piece by piece: the audio of one decode, in memory that does not grow."""

import math

import torch
from torch import nn
from transformers.models.encodec.modeling_encodec import EncodecLSTM

from .configuration_piano_encodec import PianoEncodecConfig
from .dynamics_midivalle import TREBLE_TAPS, KeyDynamics, TrebleSplit
from .modeling_midivalle_frame_notes import PlayedKeys
from .modeling_piano_encodec import in_full_precision
from .recording_midivalle import RecordingChain, RecordingStream

REST_S, REST_DB_PER_S = (
    2.0,
    30.0,
)  # after the last key was let go its room still rings for so long; then it fades so fast
SILENT_FRAMES = 40  # by the middle of so many all layers have settled


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
            that swing up from rest are, softly, and predicted codes are seldom quite silent. Needs `keys`. Long
            rests fade in any stream that is given these.
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
        self.behind = SlidingLayers(behind, _context_behind_lstm(codec.config), codec.config.hop_length)
        self.recording = None if recording is None else RecordingStream(recording)
        self.begins_silent, self.dynamics = begins_silent, dynamics
        self.remembering, self.silent = layers[: recurrent + 1], None
        self.resting = math.inf if begins_silent else 0.0  # frames since the last in which a key sounds
        # factors of frames that the LSTM, and the layers behind it, have not had yet
        self.gains = self.treble = self.rests = None

    @property
    def delay(self) -> int:
        """Frames by which the audio is behind the codes until the last push."""
        return self.before.context + self.behind.context

    @torch.no_grad()
    @in_full_precision
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
        told = keys is not None or self.begins_silent
        rests = self._rest(_told(keys)) if told else torch.ones(1, audio_codes.shape[-1], device=audio_codes.device)
        self.rests = _joined(self.rests, rests)
        if self.dynamics is not None:
            gains, treble = self.dynamics(_told(keys))
            self.gains, self.treble = _joined(self.gains, gains), _joined(self.treble, treble)
        latent = self.codec.latent_of(audio_codes, None if keys is None else keys.struck, vectors)
        hidden = self.before.push(latent.to(next(self.codec.decoder.parameters()).dtype), is_last)
        if hidden is None:
            return nothing
        frames = hidden.permute(2, 0, 1)
        remembered, self.state = self.lstm(frames, self.state)
        hidden = (remembered + frames).permute(1, 2, 0)
        if self.dynamics is not None:
            gains, self.gains = self.gains[:, : len(frames)], self.gains[:, len(frames) :]
            if self.silent is None:
                self.silent = self._in_silence(audio_codes.device)[:, : gains.shape[-1]]
            # what is there in silence is not 0; made louder, it would be heard, at multiples of 50 Hz
            pitches = hidden[:, : gains.shape[-1]]
            pitches += (gains.transpose(1, 2).to(hidden) - 1) * (pitches - self.silent)
        wave = self.behind.push(hidden, is_last)
        if wave is None:
            return nothing
        wave = wave.float()
        if self.dynamics is not None:  # both parts of a `TrebleSplit`
            factors, self.treble = self._factors(self.treble, wave)
            wave = wave[:, :1] + (factors - 1) * wave[:, 1:]
        factors, self.rests = self._factors(self.rests, wave)
        wave = wave * factors
        return wave if self.recording is None else self.recording(wave)

    def _in_silence(self, device: torch.device) -> torch.Tensor:
        """What the layers up to the LSTM give `(1, C, 1)` of silence, once they have settled."""
        codes = self.codec.encode_codes(torch.zeros(1, 1, SILENT_FRAMES * self.codec.config.hop_length, device=device))
        struck = torch.zeros(1, SILENT_FRAMES, self.codec.config.num_key_axes, device=device)
        hidden = self.codec.latent_of(codes, struck).to(next(self.codec.decoder.parameters()).dtype)
        for layer in self.remembering:
            hidden = layer(hidden)
        return hidden[..., SILENT_FRAMES // 2, None]

    def _rest(self, keys: PlayedKeys) -> torch.Tensor:
        """Factors `(1, T)` of the next frames: less than 1 long after the last key was let go, 0 before the first."""
        rested = []
        states = ((keys.struck > 0)[0].any(-1).tolist(), keys.held[0].any(-1).tolist())
        for is_struck, is_held in zip(*states, strict=True):
            if is_struck or (is_held and self.resting < math.inf):  # notes of the prompt may reach over its end
                self.resting = 0.0
            else:
                self.resting += 1
            rested.append(self.resting)
        fall_db = (torch.tensor([rested]) / self.codec.config.frame_rate - REST_S).clamp(min=0) * REST_DB_PER_S
        return (10 ** (-fall_db / 20)).to(keys.struck.device)

    def _factors(self, of_frames: torch.Tensor, wave: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the next samples `wave` `(1, C, L)`, with straight lines between the factors `of_frames` `(1, T)`, and
        those that are left."""
        hop = self.codec.config.hop_length
        begin, left = of_frames[0, : wave.shape[-1] // hop], of_frames[:, wave.shape[-1] // hop :]
        end = torch.cat([begin[1:], left[0, :1] if left.shape[1] else begin[-1:]])
        line = begin[:, None] + (end - begin)[:, None] * torch.arange(hop, device=wave.device) / hop
        return line.flatten(), left


def _context_behind_lstm(config: PianoEncodecConfig) -> int:
    """Frames on either side that the audio of a frame may depend on, through the layers behind the LSTM."""
    reach = config.last_kernel_size - 1 + TREBLE_TAPS // 2  # in samples; a causal layer sees all of it on one side
    dilations = sum(config.dilation_growth_rate**j for j in range(config.num_residual_layers))
    for ratio in reversed(config.upsampling_ratios):
        reach += (config.residual_kernel_size - 1) * dilations + 2 * ratio - 1
        reach = math.ceil(reach / ratio)
    return reach


def _joined(known: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if known is None else torch.cat([known, new], 1)


def _told(keys: PlayedKeys | None) -> PlayedKeys:
    if keys is None:
        raise ValueError("a stream with dynamics, or one that begins silent, has to be told which keys are struck")
    return keys


__all__ = ["CodecStream"]
