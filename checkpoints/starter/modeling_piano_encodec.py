# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Piano-Encodec: transformers' EnCodec with codes as (B, K, T), the axes of this project."""

import functools
import math

import torch
from torch.nn import functional as F
from transformers import EncodecModel
from transformers.modeling_utils import local_torch_dtype
from transformers.models.encodec.modeling_encodec import EncodecConvTranspose1d

from .configuration_piano_encodec import PianoEncodecConfig

STRUCK = (1.8, 1.8)  # a key struck at velocity v is STRUCK[0] + STRUCK[1] * v / 127 in its axis of the latent, else 0
SAID_THRESHOLD = 1.0  # of what codes make of it
SOFTEST = 0.05  # velocity over 127 of what is heard, or said, to be softer
STEADY_FRAMES = 5  # on each side, of `steady_vectors`


def in_full_precision(method):
    """`method`, of a codec or of what has one as `codec`, computes as its weights are, whatever autocast says."""

    @functools.wraps(method)
    def compute(self, *args, **kwargs):
        codebook = getattr(self, "codec", self).quantizer.layers[0].codebook.embed  # weights may be offloaded to "meta"
        with torch.autocast(codebook.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return compute


class PianoEncodecUpsampling(EncodecConvTranspose1d):
    """
    EnCodec's transposed convolution; without gradients on a CPU it is a matrix product whose columns are added up where
    they overlap. oneDNN, to which torch gives it, is no faster then, and prepares itself for up to 3 s whenever the
    length is a new one.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        is_offloaded = self.conv.bias.device.type == "meta"  # accelerate brings it back for the layer's own forward
        if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or is_offloaded:
            return super().forward(hidden_states)
        (kernel_size,), (stride,) = self.conv.kernel_size, self.conv.stride
        columns = self.conv.weight.flatten(1).T @ hidden_states
        length = (hidden_states.shape[-1] - 1) * stride + kernel_size
        output = F.fold(columns, (1, length), (1, kernel_size), stride=(1, stride))[:, :, 0] + self.conv.bias[:, None]
        padding = kernel_size - stride
        right = math.ceil(padding * self.trim_right_ratio) if self.causal else padding // 2
        return output[..., padding - right : length - right]


class PianoEncodecModel(EncodecModel):
    """
    EnCodec for piano, 32 kHz mono. Same parameters and arithmetic as [`EncodecModel`], so folders load both ways;
    methods with plain axes are added.

    It is in float32 even when it, or a model that it is part of, is made in less or cast to it, and under autocast: in
    bfloat16 most codes are others (on CPUs with AMX its first strided convolutions are plainly wrong), and the last
    layer hisses.
    """

    config: PianoEncodecConfig
    _auto_class = "AutoModel"
    _supports_sdpa = True  # it has no attention: whichever a whole model is to have
    _keep_in_fp32_modules_strict = ["encoder", "decoder", "quantizer"]

    def __init__(self, config: PianoEncodecConfig):
        with local_torch_dtype(torch.float32):  # `from_config(dtype=...)` makes all that comes in that
            super().__init__(config)
        for layer in self.decoder.layers:
            if isinstance(layer, EncodecConvTranspose1d):
                layer.__class__ = PianoEncodecUpsampling  # the same parameters by the same names

    def _apply(self, fn, recurse=True):
        def unless_narrower(tensor):
            result = fn(tensor)
            is_narrow = result.is_floating_point() and result.dtype.itemsize < 4
            return tensor.to(result.device) if is_narrow else result

        return super()._apply(unless_narrower, recurse)

    @torch.no_grad()
    @in_full_precision
    def encode_codes(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        struck: torch.Tensor | None = None,
    ) -> torch.LongTensor:
        """
        Audio to codes. Rows are encoded each at its own length, so a row's codes do not depend on its batch.

        Where the notes are known, as of training data, they need not be heard: with `struck` the codes say what was
        played, with the sound of the audio. Only a codec with `config.num_key_axes` takes it.

        Args:
            input_values (`torch.Tensor` of shape `(B, 1, L)`): audio at `config.sampling_rate`, full scale 1.0.
            padding_mask (`torch.Tensor` of shape `(B, L)` or `(B, 1, L)`, *optional*): 1 for samples, 0 for padding
                on the right.
            struck (`torch.Tensor` of shape `(B, T, 88)`, *optional*): velocity over 127 where a key is struck in a
                frame, else 0.
        Returns:
            `torch.LongTensor` of shape `(B, K, T)`, T = ceil(L / hop_length); 0 after a shorter row's end.
        Raises:
            ValueError: `input_values` is not `(B, 1, L)` of finite floats, a row has no sample, or `padding_mask` or
                `struck` does not fit.
        """
        check_audio(input_values, padding_mask)
        B, _, L = input_values.shape
        hop = self.config.hop_length
        lengths = row_lengths(input_values, padding_mask)
        if min(lengths) < 1:
            raise ValueError("input_values has a row without a sample")
        dtype = next(self.encoder.parameters()).dtype
        codes = input_values.new_zeros((B, self.config.num_quantizers, -(-L // hop)), dtype=torch.long)
        self._check_struck(struck, B, codes.shape[2])
        for length in sorted(set(lengths)):
            rows = [b for b in range(B) if lengths[b] == length]
            latent = self.encoder(input_values[rows, :, :length].to(dtype))
            if struck is not None:
                latent = write_keys(latent, struck[rows, : latent.shape[-1]])
            found = self.quantizer.encode(latent.to(self.quantizer.layers[0].codebook.embed.dtype)).transpose(0, 1)
            codes[rows, :, : found.shape[-1]] = found
        return codes

    @torch.no_grad()
    @in_full_precision
    def decode_codes(
        self,
        audio_codes: torch.LongTensor,
        struck: torch.Tensor | None = None,
        vectors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Codes to audio.

        Args:
            audio_codes (`torch.LongTensor` of shape `(B, K, T)`): in `[0, codebook_size)`, K at most `num_quantizers`.
            struck (`torch.Tensor` of shape `(B, T, 88)`, *optional*): as in `encode_codes`: these keys are struck,
                whatever the codes say.
            vectors (`torch.Tensor` of shape `(B, A, T)`, *optional*): sums of code vectors to be decoded instead of
                those of `audio_codes`; A = D, or with `struck` at least those axes that are not of keys.
        Returns:
            `torch.Tensor` of shape `(B, 1, hop_length * T)`, float32.
        Raises:
            ValueError: wrong axes, a code out of range, or `struck` or `vectors` do not fit.
        """
        self._check_codes(audio_codes)
        if not audio_codes.shape[-1]:
            return torch.zeros(len(audio_codes), 1, 0, device=audio_codes.device)
        latent = self.latent_of(audio_codes, struck, vectors)
        return self.decoder(latent.to(next(self.decoder.parameters()).dtype)).float()

    def latent_of(
        self,
        audio_codes: torch.LongTensor,
        struck: torch.Tensor | None = None,
        vectors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the decoder is given `(B, D, T)` of `audio_codes`, `struck` and `vectors` as in `decode_codes`."""
        B, _, T = audio_codes.shape
        self._check_struck(struck, B, T)
        book = self.quantizer.layers[0].codebook.embed
        if vectors is None:
            latent = self.quantizer.decode(audio_codes.transpose(0, 1))
        else:
            latent = vectors.to(book.dtype)
        kept = book.shape[1] - (0 if struck is None else self.config.num_key_axes)
        if latent.shape[::2] != (B, T) or latent.shape[1] < kept:
            raise ValueError(f"vectors must be ({B}, {kept} or more, {T}), got {tuple(latent.shape)}")
        return latent if struck is None else torch.cat([latent[:, :kept], key_axes(struck).to(latent)], 1)

    @torch.no_grad()
    def struck_of(self, audio_codes: torch.LongTensor) -> torch.Tensor:
        """The keys that `audio_codes` `(B, K, T)` say are struck, `(B, T, 88)`: velocity over 127 in the frame in which
        a key is, else 0; ValueError without `config.num_key_axes`, or as in `decode_codes`."""
        said = self._axes_of(audio_codes)[:, -self.config.num_key_axes :]
        around = F.pad(said, (1, 1))  # less than a key that is struck
        peaks = (said > around[..., :-2]) & (said >= around[..., 2:])  # of equal ones the first
        velocity = ((said - STRUCK[0]) / STRUCK[1]).clamp(SOFTEST, 1.0)
        return (velocity * (peaks & (said > SAID_THRESHOLD))).transpose(1, 2)

    @torch.no_grad()
    def steady_vectors(self, audio_codes: torch.LongTensor, struck: torch.Tensor) -> torch.Tensor:
        """
        The spectra of codes without their jitter, for `decode_codes`, whose audio a transcriber then takes for fewer
        notes that nobody played: each frame the mean of up to eleven around it that no strike divides.

        Args:
            audio_codes (`torch.LongTensor` of shape `(B, K, T)`): of a codec with `config.num_key_axes`; rows of one
                length, for there is no telling where others end.
            struck (`torch.Tensor` of shape `(B, T, 88)`): as in `encode_codes`.
        Returns:
            `torch.Tensor` of shape `(B, A, T)`: sums of code vectors, of all axes but those of keys.
        Raises:
            ValueError: as in `decode_codes`, or the codec has no `config.num_key_axes`.
        """
        frames = audio_codes.shape[-1]
        spectra = self._axes_of(audio_codes)[:, : -self.config.num_key_axes]
        self._check_struck(struck, len(audio_codes), frames)
        since = (struck > 0).any(-1).long().cumsum(1)[:, None]  # frames of the same number follow the same strike
        total, count = torch.zeros_like(spectra), torch.zeros_like(spectra[:, :1])
        reach = max(min(STEADY_FRAMES, frames - 1), 0)
        for shift in range(-reach, reach + 1):
            near = F.pad(since, (-shift, shift), value=-1) == since
            total, count = total + F.pad(spectra, (-shift, shift)) * near, count + near
        return total / count

    @torch.no_grad()
    def decode_steady(self, audio_codes: torch.LongTensor) -> torch.Tensor:
        """
        Codes to audio, with the keys that they say are struck and nothing that jitters: for those of a listener.

        Args:
            audio_codes (`torch.LongTensor` of shape `(B, K, T)`): as in `steady_vectors`.
        Returns:
            `torch.Tensor` of shape `(B, 1, hop_length * T)`, float32.
        Raises:
            ValueError: as in `steady_vectors`.
        """
        struck = self.struck_of(audio_codes)
        later = F.pad(struck, (0, 0, 1, 0))[:, :-1]  # an oscillator fades in over the frame before
        return self.decode_codes(audio_codes, later, self.steady_vectors(audio_codes, struck))

    def _axes_of(self, audio_codes: torch.LongTensor) -> torch.Tensor:
        """Sums of code vectors `(B, D, T)`, of which the last axes are of keys; ValueError if they are not."""
        if not self.config.num_key_axes:
            raise ValueError("this codec's codes do not say which keys are struck (config.num_key_axes is 0)")
        self._check_codes(audio_codes)
        return self.quantizer.decode(audio_codes.transpose(0, 1))

    def _check_codes(self, audio_codes: torch.LongTensor) -> None:
        if not isinstance(audio_codes, torch.Tensor) or audio_codes.dtype not in (torch.long, torch.int):
            kind = getattr(audio_codes, "dtype", type(audio_codes).__name__)
            raise ValueError(f"audio_codes must be a tensor of integers (torch.long), got {kind}")
        if audio_codes.ndim != 3 or audio_codes.shape[1] > self.config.num_quantizers:
            raise ValueError(
                f"audio_codes must be (B, K, T) with K <= {self.config.num_quantizers}, got {tuple(audio_codes.shape)}"
            )
        size = self.config.codebook_size
        if audio_codes.numel() and not 0 <= int(audio_codes.min()) <= int(audio_codes.max()) < size:
            raise ValueError(f"audio_codes must lie in [0, {size})")

    def _check_struck(self, struck: torch.Tensor | None, rows: int, frames: int) -> None:
        wanted = (rows, frames, self.config.num_key_axes)
        if struck is not None and struck.shape != wanted:
            raise ValueError(f"struck must be {wanted}, keys last, got {tuple(struck.shape)}")


def check_audio(input_values: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
    """ValueError if these are no tensors, or `input_values` is not `(B, 1, L)` of finite floats."""
    for name, given in (("input_values", input_values), ("padding_mask", padding_mask)):
        if not isinstance(given, torch.Tensor | None):
            raise ValueError(f"{name} must be a tensor, got {type(given).__name__}")
    if input_values.ndim != 3 or input_values.shape[1] != 1:
        raise ValueError(f"input_values must be (B, 1, L), got {tuple(input_values.shape)}")
    if not (input_values.is_floating_point() and input_values.isfinite().all()):
        raise ValueError("input_values must be finite floats of full scale 1.0")


def row_lengths(input_values: torch.Tensor, padding_mask: torch.Tensor | None) -> list[int]:
    """Samples of each row of audio `(B, 1, L)`; ValueError if `padding_mask`, `(B, L)` or `(B, 1, L)`, does not fit."""
    B, _, L = input_values.shape
    mask = input_values.new_ones(B, L) if padding_mask is None else padding_mask.reshape(B, -1)
    if mask.shape[1] != L or (mask.bool().diff(dim=1) & mask.bool()[:, 1:]).any():
        raise ValueError(f"padding_mask must be ({B}, {L}), with padding on the right alone")
    return mask.long().sum(-1).tolist()


def write_keys(latent: torch.Tensor, struck: torch.Tensor) -> torch.Tensor:
    """`latent` `(B, D, T)` with its last axes as the encoder should have them: `struck` `(B, T, 88)`, velocity over 127
    where a key is struck in a frame, else 0."""
    keys = key_axes(struck).to(latent)
    return torch.cat([latent[:, : -keys.shape[1]], keys], 1)


def key_axes(struck: torch.Tensor) -> torch.Tensor:
    """The axes of keys `(B, 88, T)` of a latent in which `struck` `(B, T, 88)` is played."""
    played = struck.transpose(1, 2)
    return (STRUCK[0] + STRUCK[1] * played) * (played > 0)


__all__ = ["PianoEncodecModel"]
