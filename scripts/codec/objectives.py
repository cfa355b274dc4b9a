# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What each part of the codec is trained for, and how its weights start."""

import copy
import functools

import torch
from torch.nn import functional as F

from modeling_midivalle import PianoEncodecModel, PianoListenerModel
from modeling_midivalle.modeling_piano_encodec import STRUCK, write_keys
from scripts.codec.features import SpectralFeatures
from scripts.codec.listener import onset_loss
from scripts.codec.losses import SpectralLoss
from scripts.codec.oscillators import (
    PITCHES,
    front_layers,
    has_kicks,
    kick_loss,
    kick_rows,
    last_layers,
    sing,
    synthesis_basis,
)
from scripts.codec.quantizer import quantize_train

STRUCK_THRESHOLD, STRUCK_SLOPE = 1.5, 4.7  # where a key is as likely struck as not, and logits per latent there
STRUCK_WEIGHT = 2.0  # how much more a struck key counts
WARMING_UP = 25  # frames at the start of a crop that do not count: an LSTM has not heard what sounds there
EDGE_FRAMES = 6  # at both ends of a crop the listener hears silence beyond it


class ListenerObjective(torch.nn.Module):
    """The listener learns to hear which keys are struck (`notes`), and how hard (`velocity`); `level_db` and `noise_db`
    of its recipe say over what."""

    def __init__(self, listener: PianoListenerModel):
        super().__init__()
        self.model = listener

    def forward(self, batch):
        heard, onsets = self.model(batch["input_values"]), batch["onsets"]
        notes = noted_loss(heard.logits, onsets, batch.get("has_notes"))
        return {"notes": notes, "velocity": velocity_loss(heard.velocity, onsets, onsets)}, None


class Objective(torch.nn.Module):
    """A part of the codec and what it is trained for; `model` is what is saved.

    `forward(batch)` takes `input_values (B, samples)`, `onsets (B, T, 88)` and perhaps `audio_codes (B, K, T)` or
    `lead (B, samples)`, and `has_notes (B,)`; it returns losses by name and, if there is one, the output (B, samples).
    """

    def __init__(self, codec: PianoEncodecModel, bf16: bool):
        super().__init__()
        self.model = self.codec = codec
        self.bf16 = bf16

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Latent (B, D, T) in fp32 of wave (B, samples)."""
        return self._run(self.codec.encoder.layers, wave[:, None])

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Wave (B, samples) in fp32 of a latent (B, D, T)."""
        *layers, activation, last = self.codec.decoder.layers
        hidden = self._run(layers, latent)
        return last(activation(hidden))[:, 0]  # rounded to bf16, the wave itself would hiss at -50 dB

    @torch.no_grad()
    def quantised(self, batch) -> torch.Tensor:
        """What the decoder gets (B, D, lead + T): of stored codes or their `means`, with their keys from the notes if
        `told`; or of the sound, every other row of it with its keys as they were played."""
        struck = [batch[name] for name in ("lead_onsets", "onsets") if name in batch]
        if (codes := batch.get("audio_codes")) is not None:
            latent = self.codec.quantizer.decode(codes.transpose(0, 1))
            if (means := batch.get("means")) is not None:
                axes = means.shape[1]
                latent[:, :axes] = torch.where(means.isnan(), latent[:, :axes], means)
            return with_keys(latent, torch.cat(struck, 1), batch["told"]) if "told" in batch else latent
        latent = self.encode(torch.cat([batch[name] for name in ("lead", "input_values") if name in batch], 1))
        if self.codec.config.num_key_axes:
            latent = half_played(latent, torch.cat(struck, 1), batch.get("has_notes"))
        return quantize_train(self.codec.quantizer, latent)[0]

    def _run(self, layers, x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            bf16 = self.bf16 and not (x.device.type == "cpu" and needs_fp32(layer))
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                x = layer(x if bf16 else x.float())
        return x.float()


class EncoderObjective(Objective):
    """The encoder learns to produce the spectral features, and in the latent's key axes, if it has them, which keys are
    struck: `STRUCK[0]` to `sum(STRUCK)` by velocity in that frame, 0 in all others.

    What is known of the notes does not compete with the spectrum: the codes spend their bits where notes begin, and the
    decoders that predict codes from MIDI find the notes in them.
    """

    def __init__(self, codec, bf16: bool, features: SpectralFeatures):
        super().__init__(codec, bf16)
        self.features = features
        self.codec.decoder.requires_grad_(False)

    def forward(self, batch):
        wave = batch["input_values"]
        latent, target = self.encode(wave), self.features(wave)
        losses = {"regression": (latent[:, : target.shape[1]] - target).square().mean()}
        if latent.shape[1] > target.shape[1]:
            heard = latent[:, target.shape[1] :].transpose(1, 2)
            losses |= struck_losses(heard, batch["onsets"], batch.get("has_notes"))
        return losses, None


class HearingObjective(Objective):
    """A trained encoder goes on to hear which keys are struck, as in `EncoderObjective`, and its other axes stay as
    they are (`keep`): codebooks and decoder need not change, nor what was learned on codes with keys as played.

    Only the layers behind the second strided convolution learn; in front of them is most of the work, and no gradient.
    """

    def __init__(self, codec, bf16: bool):
        super().__init__(codec, bf16)
        if not codec.config.num_key_axes:
            raise ValueError("hearing needs a codec whose latent has axes of keys (num_key_axes)")
        layers = codec.encoder.layers
        strided = [i for i, layer in enumerate(layers) if hasattr(layer, "conv") and layer.conv.stride[0] > 1]
        self.front, self.rest = layers[: strided[1] + 1], layers[strided[1] + 1 :]
        codec.requires_grad_(False)
        self.taught = copy.deepcopy(self.rest)
        self.rest.requires_grad_(True)

    def forward(self, batch):
        kept = self.codec.config.hidden_size - self.codec.config.num_key_axes
        with torch.no_grad():
            hidden = self._run(self.front, batch["input_values"][:, None])
            wanted = self._run(self.taught, hidden)[:, :kept]
        latent = self._run(self.rest, hidden)
        counted = slice(min(WARMING_UP, latent.shape[2] // 4), None)
        keep = (latent[:, :kept] - wanted)[..., counted].square().mean() / (wanted.var() + 1e-9)
        heard = latent[:, kept:, counted].transpose(1, 2)
        return {"keep": keep} | struck_losses(heard, batch["onsets"][:, counted], batch.get("has_notes")), None

    def logits(self, wave: torch.Tensor) -> torch.Tensor:
        """How likely each key is struck, `(B, T, 88)`, of waves `(B, samples)`."""
        kept = self.codec.config.hidden_size - self.codec.config.num_key_axes
        return STRUCK_SLOPE * (self.encode(wave)[:, kept:].transpose(1, 2) - STRUCK_THRESHOLD)


class DecoderObjective(Objective):
    """The decoder learns to speak the codes: for `sing_steps` only its oscillators' gates, through exact synthesis (an
    eighth of the work), then all of it.

    With a `lead`, or more codes than samples, the LSTM hears the first ones, so that it remembers what sounds, and
    nothing is made of them. Where struck keys kick the oscillators, the layers in front go on to learn when (`kicks`).
    A `listener` adds three losses: how many of the struck keys it hears in the output (`notes`), and how differently it
    hears their velocities (`velocity`), and all the rest (`heard`), in output and target.
    """

    def __init__(self, codec, bf16: bool, sing_steps: int, listener: PianoListenerModel | None = None):
        super().__init__(codec, bf16)
        self.spectral, self.sing_steps, self.listener = SpectralLoss(), sing_steps, listener
        hop, rate = codec.config.hop_length, codec.config.sampling_rate
        self.register_buffer("basis", synthesis_basis(hop, rate), persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.long), persistent=False)
        codec.encoder.requires_grad_(False)
        if listener is not None:
            listener.requires_grad_(False).eval()
        lstm = codec.decoder.layers[1].lstm
        if lstm.num_layers > 1 and lstm.hidden_size < 2 * PITCHES:
            raise ValueError(f"oscillators need LSTM layers of {2 * PITCHES}, this codec's are of {lstm.hidden_size}")
        tuned = torch.arange(2 * PITCHES)
        rows = torch.cat([tuned + gate * lstm.hidden_size for gate in range(4)])
        oscillating = f"l{lstm.num_layers - 2}"
        kept = [(p, rows) for name, p in lstm.named_parameters() if name.endswith(oscillating)]
        if lstm.num_layers == 2:
            kept += [(p, tuned) for p in codec.decoder.layers[0].conv.parameters()]
        self.kicks = lstm.num_layers > 2 and has_kicks(lstm)
        for parameter, index in kept:  # the oscillators stay in tune, and nothing is added to them
            parameter.register_hook(lambda grad, index=index: grad.index_fill(0, index.to(grad.device), 0.0))

    def forward(self, batch):
        wave, latent = batch["input_values"], self.quantised(batch)
        first, recurrent, *rest = self.codec.decoder.layers
        frames = wave.shape[1] // self.codec.config.hop_length
        hidden = first(latent)
        if self.kicks:
            told = front_layers(recurrent.lstm, hidden.transpose(1, 2))
            hidden = hidden + last_layers(recurrent.lstm, told).transpose(1, 2)
        else:
            hidden = recurrent(hidden)
        hidden = hidden[..., -frames:]
        if self.step < self.sing_steps:
            return self.spectral(sing(hidden, self.basis, self.codec.config.hop_length), wave), None
        output = self._speak(rest, hidden)
        losses = self.spectral(output, wave)
        if self.kicks:
            losses["kicks"] = kick_loss(
                recurrent.lstm, told[:, -frames:], batch["onsets"], self.codec.config.frame_rate
            )
        if self.listener is not None:
            losses |= listening_losses(self.listener, output, wave, batch["onsets"], batch.get("has_notes"))
        return losses, output

    def _speak(self, layers, hidden: torch.Tensor) -> torch.Tensor:
        *layers, activation, last = layers
        return last(activation(self._run(layers, hidden)))[:, 0]  # in bf16 the wave itself would hiss at -50 dB


class KickObjective(Objective):
    """The decoder's LSTM layers in front of its oscillators learn to kick those of the keys that are struck (`kicks`),
    and to tell the layers behind what they told them before (`keep`); nothing else of the codec changes. See
    `scripts.codec.oscillators`."""

    def __init__(self, codec):
        super().__init__(codec, False)
        lstm = codec.decoder.layers[1].lstm
        if lstm.num_layers < 3:
            raise ValueError(
                f"kicks need a layer in front of the oscillators, this codec has {lstm.num_layers} LSTM layers"
            )
        self.lstm, front, width = lstm, lstm.num_layers - 2, lstm.hidden_size
        codec.requires_grad_(False)
        for name, parameter in lstm.named_parameters():
            parameter.requires_grad_(int(name[-1]) < front)
        self.weight, self.bias = (lstm.get_parameter(f"{name}_l{front}") for name in ("weight_ih", "bias_ih"))
        passed = torch.cat([torch.arange(2 * PITCHES, width) + gate * width for gate in range(4)])
        self.register_buffer("rows", kick_rows(lstm), persistent=False)
        self.register_buffer("passed", self.weight.detach()[passed], persistent=False)
        self.taught = copy.deepcopy(lstm).requires_grad_(False)
        for parameter in (self.weight, self.bias):
            mask = torch.zeros_like(parameter)
            mask[self.rows] = 1
            parameter.requires_grad_(True).register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient))

    def forward(self, batch):
        frames = batch["onsets"].shape[1]
        with torch.no_grad():
            hidden = self.codec.decoder.layers[0](self.quantised(batch)).transpose(1, 2)
            skipped = max(WARMING_UP - (hidden.shape[1] - frames), 0)
            wanted = front_layers(self.taught, hidden)[:, -frames:][:, skipped:] @ self.passed.T
        told = front_layers(self.lstm, hidden)[:, -frames:][:, skipped:]
        keep = (told @ self.passed.T - wanted).square().mean() / wanted.var()
        kicks = kick_loss(self.lstm, told, batch["onsets"][:, skipped:], self.codec.config.frame_rate)
        return {"keep": keep, "kicks": kicks}, None


class WholeObjective(Objective):
    """Encoder, quantiser and decoder together, for fine-tuning a codec that already speaks; a `listener` adds the same
    losses as in `DecoderObjective`.

    While training, `updates` grows by one `(vectors, indices)` a codebook with each forward pass; who steps, gives them
    to `ema_update` and clears them.
    """

    def __init__(self, codec, bf16: bool, listener: PianoListenerModel | None = None):
        super().__init__(codec, bf16)
        self.spectral, self.listener, self.updates = SpectralLoss(), listener, []
        if listener is not None:
            listener.requires_grad_(False).eval()
        for book in (layer.codebook for layer in codec.quantizer.layers):
            has_uses = bool(book.cluster_size.any())
            if not has_uses:  # saved without what it has learned from: each code begins with one use
                book.cluster_size.fill_(1)
            if not (has_uses and book.embed_avg.any()):
                book.embed_avg.copy_(book.embed * book.cluster_size[:, None])

    def forward(self, batch):
        wave, found = batch["input_values"], [] if torch.is_grad_enabled() else None
        latent, _, commitment = quantize_train(self.codec.quantizer, self.encode(wave), found)
        self.updates += found or []
        output = self.decode(latent)[:, : wave.shape[1]]
        waveform = ((output - wave).abs().mean(1) / (wave.abs().mean(1) + 0.01)).mean()
        losses = self.spectral(output, wave) | {"commitment": commitment, "waveform": waveform}
        if self.listener is not None:
            losses |= listening_losses(self.listener, output, wave, batch["onsets"], batch.get("has_notes"))
        return losses, output


def listening_losses(
    listener: PianoListenerModel,
    output: torch.Tensor,
    target: torch.Tensor,
    onsets: torch.Tensor,
    has_notes: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """`notes`, `velocity` and `heard` of waves (B, 640 T) and struck keys `onsets (B, T, 88)`; see `DecoderObjective`.
    Rows without notes, where `has_notes (B,)` says so, have no part in `notes`."""
    with torch.no_grad():
        wanted = listener(target)
    made, inside = listener(output), slice(EDGE_FRAMES, -EDGE_FRAMES)
    heard = 0.0
    for a, b in zip(made.hidden_states, wanted.hidden_states, strict=True):
        a, b = a[:, :, inside], b[:, :, inside]
        heard = heard + F.l1_loss(a, b).float() / (b.mean().float() + 1e-3)
    velocity = velocity_loss(made.velocity[:, inside], wanted.velocity[:, inside], onsets[:, inside])
    notes = noted_loss(made.logits[:, inside], onsets[:, inside], has_notes)
    return {"notes": notes, "velocity": velocity, "heard": heard / len(made.hidden_states)}


def half_played(latent: torch.Tensor, struck: torch.Tensor, has_notes: torch.Tensor | None = None) -> torch.Tensor:
    """`latent` (B, D, T), every other row, if it `has_notes (B,)`, with its keys as they were played, `struck
    (B, T, 88)`: so the codes of what the encoder hears and those of what is known, which decoders learn to predict, are
    both at home in the codec."""
    known = torch.arange(len(latent), device=latent.device) % 2 == 1
    return with_keys(latent, struck, known if has_notes is None else known & has_notes)


def with_keys(latent: torch.Tensor, struck: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """`latent` (B, D, T), the rows `known (B,)` with the keys `struck (B, T, 88)`."""
    return torch.where(known[:, None, None], write_keys(latent, struck), latent)


def struck_losses(
    heard: torch.Tensor, onsets: torch.Tensor, has_notes: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """`struck`, whether each key is struck, and `strength`, how hard; of the latent's last axes `heard (B, T, 88)` and
    velocities over 127 `onsets (B, T, 88)`. Rows without notes, where `has_notes (B,)` says so, have no part; 0 if all
    are such."""
    if has_notes is not None:
        if not has_notes.any():
            return dict.fromkeys(("struck", "strength"), heard.sum() * 0)
        heard, onsets = heard[has_notes], onsets[has_notes]
    label = (onsets > 0).float()
    logits = STRUCK_SLOPE * (heard - STRUCK_THRESHOLD)
    weight = heard.new_tensor(STRUCK_WEIGHT)
    struck = F.binary_cross_entropy_with_logits(logits, label, pos_weight=weight)
    return {"struck": struck, "strength": (heard - label * (STRUCK[0] + STRUCK[1] * onsets)).square().mean()}


def noted_loss(logits: torch.Tensor, onsets: torch.Tensor, has_notes: torch.Tensor | None) -> torch.Tensor:
    """`onset_loss` of the rows whose notes are known, 0 if there are none."""
    if has_notes is None:
        return onset_loss(logits, onsets)
    return onset_loss(logits[has_notes], onsets[has_notes]) if has_notes.any() else logits.sum() * 0


def velocity_loss(heard: torch.Tensor, wanted: torch.Tensor, onsets: torch.Tensor) -> torch.Tensor:
    """Mean distance of velocities over 127, all `(B, T, 88)`, of the keys that are struck; 0 if there are none."""
    struck = (onsets > 0).float()
    return (struck * (heard - wanted).abs()).sum() / struck.sum().clamp_min(1)


def needs_fp32(layer: torch.nn.Module) -> bool:
    """Whether this CPU computes `layer` wrongly, or not at all, in bf16."""
    has_lstm = any(isinstance(module, torch.nn.LSTM) for module in layer.modules())
    return is_narrow_and_strided(layer) or (has_lstm and not has_bf16_lstm())


@functools.cache
def has_bf16_lstm() -> bool:
    """Whether this CPU has one: those without AVX-512 have none, and torch raises then."""
    weights = [torch.zeros(32, 8), torch.zeros(32, 8), torch.zeros(32), torch.zeros(32)]
    state = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.lstm(torch.zeros(1, 1, 8), state, weights, True, 1, 0.0, False, False, False)
    except RuntimeError:
        return False
    return True


def is_narrow_and_strided(layer: torch.nn.Module) -> bool:
    """Whether a layer must stay fp32 on the CPU: torch 2.13's bf16 kernels (AMX) return wrong values for strided
    convolutions of 16 input channels, forward (cosine 0.12 with fp32) and in the gradient of the transposed ones."""
    conv = getattr(layer, "conv", None)
    return conv is not None and conv.stride[0] > 1 and min(conv.in_channels, conv.out_channels) < 32


@torch.no_grad()
def start_balanced(layers, x: torch.Tensor, deviation: float, last_deviation: float) -> None:
    """Draw every convolution of a SEANet stack anew and scale it on real input, so that its output has a set deviation.

    The usual random starts let the signal fade against the biases on its way through 16 layers: the encoder's latent
    then carries next to nothing, and training stays with the mean spectrum for hours.

    Args:
        layers (`nn.ModuleList`): run one after the other.
        x (`torch.Tensor`): real input of the first.
        deviation: of each convolution's output; well below 1 the ELUs are nearly linear.
        last_deviation: of the last layer's output.
    """
    last = layers[-1].conv

    def rescale(module, _inputs, output):
        scale = (last_deviation if module is last else deviation) / (output.std() + 1e-8)
        module.weight = module.weight * scale  # through weight norm's right inverse
        return output * scale

    handles = []
    for conv in [m for m in layers.modules() if isinstance(m, torch.nn.Conv1d | torch.nn.ConvTranspose1d)]:
        weight = torch.empty_like(conv.weight)
        torch.nn.init.kaiming_normal_(weight, nonlinearity="linear")
        conv.weight = weight
        conv.bias.zero_()
        handles.append(conv.register_forward_hook(rescale))
    for layer in layers:
        x = layer(x)
    for handle in handles:
        handle.remove()
