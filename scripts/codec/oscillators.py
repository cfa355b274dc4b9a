# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A start for EnCodec's decoder that already sings: its LSTM as a bank of tuned oscillators.

2.2 kbit/s cannot carry the phases of a piano's partials, and convolutions alone repeat themselves with the frame: from
a steady latent they can only produce multiples of 50 Hz, which a listener (and a transcriber) takes for other notes.
Only the LSTM remembers. So its last layer but one starts as free oscillators on the tempered scale, and its last gates
each by the latent's band at that pitch: h = amplitude * (cos, sin) of the phase at the frame. Layers in front of these,
if there are any, start by handing the spectrum on beside units that are free to learn what notes do. The transposed
convolutions start as the interpolation of those numbers, sub-band by sub-band. Everything but the oscillators' tuning
then learns from audio.

All notes that have a partial at a pitch share its oscillator. A key that is struck while the others sound then only
makes it a little louder, where on a piano two tones meet whose phases have nothing in common; a transcriber misses many
such notes. So struck keys kick the oscillators of their first partials: a push of its state puts the phase somewhere
else, and the radius recovers within a few frames. `train_codec kicks` teaches the layers in front to say when.
"""

import math

import torch
from torch.nn import functional as F

from modeling_midivalle.dynamics_midivalle import OSCILLATOR_PITCH
from scripts.codec.features import KNEE, SpectralFeatures

# E1 to D#8; below, a note is known by its partials
LOWEST_HZ, PITCHES = 440 * 2 ** ((OSCILLATOR_PITCH - 69) / 12), 84
OPEN, SHUT = 6.0, -6.0  # gate biases
RADIUS = 0.1  # of the oscillation, where tanh is nearly linear
CLEARANCE = 0.05  # rad a frame (0.4 Hz): nearer to a quarter turn, tanh would lock an oscillator to standstill
STRUCK_GAIN = 30.0  # of struck keys in the channels that pass no spectrum: as loud as what passes
FREE_GAIN = 4.0  # what units that are free to learn hear of what is passed
PASS_SCALE = 0.15  # latents pass the LSTM within tanh's linear part
HEADROOM = math.log(0.2 / KNEE) + 0.5  # log amplitude at which a gate is a third open
PEAK = 0.3  # gated oscillation of a fully open gate is about tanh(PEAK): small, so that the ELUs are nearly linear
KICK = 0.6  # push of a struck key's fundamental, in the oscillator's cell input; its radius is RADIUS
KICK_WEIGHT = 2.0  # how much more a kick counts than none
KICKED = ((0, 1.0), (12, 1.0), (19, 0.8), (24, 0.6))  # partials 1 to 4, semitones above the key, and share of KICK
BAND_HZ = (80, 200, 400)  # width of the sub-bands that the channels behind the first three upsamplings stand for


def pitch_frequencies() -> torch.Tensor:
    """(PITCHES,) frequencies in Hz, fp64."""
    return LOWEST_HZ * 2 ** (torch.arange(PITCHES, dtype=torch.float64) / 12)


@torch.no_grad()
def start_oscillators(codec, features: SpectralFeatures, latent: torch.Tensor) -> None:
    """Set the decoder's first convolution and LSTM; the layers behind are left alone.

    Args:
        codec: an `EncodecModel` whose LSTM has two layers or more, at least `2 * PITCHES` and `features`' axes wide.
        latent (`torch.Tensor` of shape `(B, hidden_size, T)`): of real audio; gives the scale of each axis.
    """
    conv, lstm = codec.decoder.layers[0].conv, codec.decoder.layers[1].lstm
    width, axes, n = lstm.hidden_size, features.basis.shape[1], 2 * PITCHES
    if lstm.num_layers < 2 or width < n + axes:
        raise ValueError(f"oscillators need two LSTM layers of {n + axes}, this codec has {lstm.num_layers} of {width}")
    passed, front = slice(n, n + axes), lstm.num_layers - 2
    scale = PASS_SCALE / features.integrate(latent[:, :axes]).transpose(0, 1).flatten(1).std(1)
    weight = conv.weight.clone() * 0.1
    weight[:n] *= 1e-2  # these channels reach the sound past the LSTM
    weight[n + axes :, axes:] *= STRUCK_GAIN
    codec.config.num_oscillators = PITCHES
    weight[passed] = 0
    weight[passed, :axes, conv.kernel_size[0] // 2] = torch.diag(scale)
    conv.weight = weight
    conv.bias.zero_()
    for layer in range(lstm.num_layers):
        drawn = {name: lstm.get_parameter(f"{name}_l{layer}").clone() for name in ("weight_ih", "weight_hh")}
        _open_gates(lstm, layer, width)
        _identity(lstm, layer, width, range(n, width))
        if layer < front:
            _free(lstm, layer, width, n, drawn)
    if features.memory:  # what passes the oscillators' layer is added up
        bias = lstm.get_parameter(f"bias_ih_l{front}")
        bias[width + n : 2 * width] = math.log(features.memory / (1 - features.memory))
    theta = _turns(codec.config.frame_rate)
    gate = torch.sigmoid(torch.tensor(OPEN)).item()
    # tanh(tanh(x)) is about x - 2/3 x^3; what it takes from a circle of this radius, as far off the origin, is given
    # back
    gain = 1 / ((1 - 1.5 * RADIUS**2) * gate**2)
    cell, bias = (lstm.get_parameter(f"{name}_l{front}")[2 * width : 3 * width] for name in ("weight_hh", "bias_ih"))
    for k, angle in enumerate(theta.tolist()):
        c, s = gain * math.cos(angle), gain * math.sin(angle)
        cell[2 * k, 2 * k], cell[2 * k, 2 * k + 1] = c, -s
        cell[2 * k + 1, 2 * k], cell[2 * k + 1, 2 * k + 1] = s, c
    bias[: 2 * PITCHES : 2] = resting_bias(codec.config.frame_rate)
    centre, radius = _measure(lstm, front, n, width)
    _gate_by_bands(lstm, features, scale, centre, radius, width, n)


def resting_bias(frame_rate: int) -> torch.Tensor:
    """(PITCHES,) what pushes the first of each pair in each frame where no key is struck: the centre of the circle is
    put off the origin, where the LSTM starts, so it turns at once."""
    return (RADIUS * (2 - 2 * _turns(frame_rate).cos()).sqrt()).float()


def kick_rows(lstm) -> torch.Tensor:
    """(PITCHES,) rows of the weights of the layer of oscillators that push the first of each pair."""
    return 2 * lstm.hidden_size + torch.arange(0, 2 * PITCHES, 2, device=lstm.weight_ih_l0.device)


def kick_loss(lstm, told: torch.Tensor, onsets: torch.Tensor, frame_rate: int) -> torch.Tensor:
    """How far the oscillators' kicks are from those of the struck keys `onsets (B, T, 88)`, squared, kicks themselves
    three times; `told (B, T, width)` is what the layers in front of them give."""
    rows, layer = kick_rows(lstm), lstm.num_layers - 2
    weight, bias = (lstm.get_parameter(f"{name}_l{layer}")[rows] for name in ("weight_ih", "bias_ih"))
    kicks = (told @ weight.T + bias - resting_bias(frame_rate).to(bias)) / KICK
    struck = struck_partials(onsets)
    return ((1 + KICK_WEIGHT * (struck > 0)) * (kicks - struck).square()).mean()


def has_kicks(lstm) -> bool:
    """Whether anything in front kicks the oscillators."""
    return bool(lstm.get_parameter(f"weight_ih_l{lstm.num_layers - 2}")[kick_rows(lstm)].any())


def front_layers(lstm, hidden: torch.Tensor) -> torch.Tensor:
    """Output (B, T, width) of the layers in front of the oscillators for the input (B, T, width) of the first."""
    return _layers(lstm, hidden, range(lstm.num_layers - 2))


def last_layers(lstm, told: torch.Tensor) -> torch.Tensor:
    """Output (B, T, width) of the oscillators and their gates for that of `front_layers`."""
    return _layers(lstm, told, range(lstm.num_layers - 2, lstm.num_layers))


def _layers(lstm, hidden: torch.Tensor, layers: range) -> torch.Tensor:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = [lstm.get_parameter(f"{name}_l{layer}") for layer in layers for name in names]
    start = hidden.new_zeros(len(layers), len(hidden), lstm.hidden_size)
    return torch._VF.lstm(hidden, (start, start), weights, True, len(layers), 0.0, lstm.training, False, True)[0]


def struck_partials(onsets: torch.Tensor) -> torch.Tensor:
    """(B, T, PITCHES): how much of a whole kick each oscillator gets; of `onsets (B, T, 88)`, not 0 where a key is
    struck."""
    lowest = 21 - round(69 + 12 * math.log2(LOWEST_HZ / 440))  # of the oscillators, that of key 0
    found = onsets.new_zeros(*onsets.shape[:-1], PITCHES)
    for above, share in KICKED:
        first = max(0, -(lowest + above))
        last = min(onsets.shape[-1], PITCHES - lowest - above)
        place = found[..., first + lowest + above : last + lowest + above]
        place.copy_(torch.maximum(place, share * (onsets[..., first:last] > 0)))
    return found


def synthesis_basis(hop: int, sampling_rate: int) -> torch.Tensor:
    """(2 * PITCHES, 1, 2 * hop): triangular-windowed sinusoids; `conv_transpose1d` of gated oscillations with it, at
    stride `hop`, is their exact sound, frame t centred on sample `hop * t + hop / 2`."""
    tau = (torch.arange(2 * hop, dtype=torch.float64) - hop + 0.5) / sampling_rate
    window = 1 - (tau * sampling_rate / hop).abs()
    phase = 2 * math.pi * pitch_frequencies()[:, None] * tau
    basis = torch.stack([window * phase.cos(), -window * phase.sin()], 1).flatten(0, 1) / math.tanh(PEAK)
    return basis[:, None].float()


def sing(hidden: torch.Tensor, basis: torch.Tensor, hop: int) -> torch.Tensor:
    """Exact sound (B, hop * T) of the LSTM's output `hidden` (B, channels, T)."""
    wave = F.conv_transpose1d(hidden[:, : len(basis)], basis, stride=hop)
    return wave[:, 0, hop // 2 : hop // 2 + hop * hidden.shape[-1]]


@torch.no_grad()
def start_synthesis(codec) -> None:
    """Set the decoder's upsampling layers to the synthesis of what the LSTM gives: `decoder(latent)` is about `sing`.

    A pair of channels is a sub-band, holding the complex value of a partial at a sample's time. Each transposed
    convolution (kernel twice the stride) carries it to the times in between: a triangle in time, turned by the
    sub-band's centre frequency. Weights that are not needed start small and random, to learn all the rest: noise,
    hammers, what lies above 5 kHz.
    """
    upsamplings = [layer for layer in codec.decoder.layers if _is_transposed(layer)]
    widths = (*BAND_HZ, None)
    if len(upsamplings) != len(widths):
        raise ValueError(f"the synthesis start needs {len(widths)} upsamplings, this codec has {len(upsamplings)}")
    rate, centres = float(codec.config.frame_rate), pitch_frequencies()
    for layer, width in zip(upsamplings, widths, strict=True):
        conv, stride = layer.conv, layer.conv.stride[0]
        left = stride - stride // 2  # samples that EnCodec trims in front
        delta = (torch.arange(2 * stride, dtype=torch.float64) - left + 0.5 - stride / 2) / (rate * stride)
        window = (1 - delta.abs() * rate).clamp_min(0)
        turn = 2 * math.pi * centres[:, None] * delta
        real, imaginary = (window * turn.cos()).float(), (window * turn.sin()).float()
        weight = torch.randn_like(conv.weight) * 0.004 / math.sqrt(2 * conv.in_channels)
        weight[: 2 * len(centres)] *= 0.1
        if width is None:
            weight[0 : 2 * len(centres) : 2, 0], weight[1 : 2 * len(centres) : 2, 0] = real, -imaginary
        else:
            bands = (centres / width).floor().long()
            for k, band in enumerate(bands.tolist()):
                weight[2 * k, 2 * band], weight[2 * k + 1, 2 * band] = real[k], -imaginary[k]
                weight[2 * k, 2 * band + 1], weight[2 * k + 1, 2 * band + 1] = imaginary[k], real[k]
            centres = (torch.arange(int(bands.max()) + 1, dtype=torch.float64) + 0.5) * width
        conv.weight = weight
        conv.bias.zero_()
        rate *= stride
    for layer in codec.decoder.layers:
        if hasattr(layer, "block"):
            for conv in (layer.block[1].conv, layer.block[3].conv):
                conv.weight = torch.randn_like(conv.weight) / math.sqrt(conv.in_channels * conv.kernel_size[0])
                conv.bias.zero_()
            conv.weight = conv.weight * 0.05
    last = codec.decoder.layers[-1].conv
    weight = torch.randn_like(last.weight) * 0.1
    weight[0, 0, last.kernel_size[0] // 2] = 1 / math.tanh(PEAK)
    last.weight = weight
    last.bias.zero_()


def _turns(frame_rate: int) -> torch.Tensor:
    """(PITCHES,) by which angle each oscillator turns from frame to frame, fp64."""
    theta = 2 * math.pi * pitch_frequencies() / frame_rate
    quarter = (theta / (math.pi / 2)).round() * (math.pi / 2)
    return quarter + torch.where(theta < quarter, -1, 1) * (theta - quarter).abs().clamp_min(CLEARANCE)


def _is_transposed(layer) -> bool:
    return isinstance(getattr(layer, "conv", None), torch.nn.ConvTranspose1d)


def _open_gates(lstm, layer: int, width: int) -> None:
    """Memoryless layer: input and output gates open, forget gate shut, no weights."""
    for name in (f"weight_ih_l{layer}", f"weight_hh_l{layer}", f"bias_ih_l{layer}", f"bias_hh_l{layer}"):
        getattr(lstm, name).zero_()
    bias = getattr(lstm, f"bias_ih_l{layer}")
    bias[:width], bias[width : 2 * width], bias[3 * width :] = OPEN, SHUT, OPEN


def _identity(lstm, layer: int, width: int, units: range) -> None:
    """Units hand their input on."""
    index = torch.tensor(list(units))
    getattr(lstm, f"weight_ih_l{layer}")[2 * width + index, index] = 1.0


def _gates(width: int, first: int, end: int) -> list[slice]:
    """Rows of the units `first` to `end` in the weights of an LSTM's four gates."""
    return [slice(gate * width + first, gate * width + end) for gate in range(4)]


def _free(lstm, layer: int, width: int, n: int, drawn: dict[str, torch.Tensor]) -> None:
    """The first `n` units start with weights as `drawn`, and remember; they hear what is passed."""
    for rows in _gates(width, 0, n):
        for name, values in drawn.items():
            lstm.get_parameter(f"{name}_l{layer}")[rows] = values[rows]
        lstm.get_parameter(f"weight_ih_l{layer}")[rows, n:] *= FREE_GAIN
        lstm.get_parameter(f"bias_ih_l{layer}")[rows] = 0.0
    lstm.get_parameter(f"bias_ih_l{layer}")[width : width + n] = 1.0


def _measure(lstm, layer: int, n: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and radius (n,) of the settled oscillations of `layer`, from a run without input."""
    single = torch.nn.LSTM(lstm.input_size, width, 1)
    end = f"_l{layer}"
    single.load_state_dict({k.replace(end, "_l0"): v for k, v in lstm.state_dict().items() if k.endswith(end)})
    states = single(torch.zeros(3000, 1, lstm.input_size))[0][1000:, 0, :n]
    centre = states.mean(0)
    radius = (states - centre).square().mean(0).view(-1, 2).sum(1).sqrt().repeat_interleave(2)
    return centre, radius


def _gate_by_bands(lstm, features, scale, centre, radius, width: int, n: int) -> None:
    """Last layer: centred oscillation through an output gate that opens with the latent's band at its pitch."""
    units, last = torch.arange(n), lstm.num_layers - 1
    weight, bias = (lstm.get_parameter(f"{name}_l{last}") for name in ("weight_ih", "bias_ih"))
    weight[2 * width + units] = 0
    weight[2 * width + units, units] = PEAK / radius
    bias[2 * width + units] = -PEAK * centre / radius
    back = features.basis.T / features.basis.square().sum(0)[:, None]  # latent -> bands, (axes, bands)
    place = features.band_places(pitch_frequencies()).float().repeat_interleave(2)
    low = place.floor().long()
    share = place - low
    mixed = back[:, low] * (1 - share) + back[:, low + 1] * share  # (axes, n)
    level = features.mean[low] * (1 - share) + features.mean[low + 1] * share
    axes = len(scale)
    weight[3 * width : 3 * width + n, n : n + axes] = (mixed / scale[:, None]).T
    bias[3 * width : 3 * width + n] = level - HEADROOM
