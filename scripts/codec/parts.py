# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The parts of the codec: how each begins, what is fitted at once, and what is written of it."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedConfig

from modeling_midivalle import PianoEncodecConfig, PianoEncodecModel, PianoListenerConfig, PianoListenerModel
from modeling_midivalle.modeling_piano_encodec import write_keys
from scripts.audio.pianos import SAMPLING_RATE
from scripts.audio.rendered_audio import HOP, codes_path
from scripts.codec.data import CropBatches, first_waves, open_pool
from scripts.codec.features import SpectralFeatures
from scripts.codec.objectives import (
    EDGE_FRAMES,
    WARMING_UP,
    DecoderObjective,
    EncoderObjective,
    HearingObjective,
    KickObjective,
    ListenerObjective,
    WholeObjective,
    half_played,
    start_balanced,
)
from scripts.codec.oscillators import start_oscillators, start_synthesis
from scripts.codec.quantizer import kmeans_start
from scripts.codec.recipe import CodecRecipe
from scripts.models.model_folder import LISTENER, load_listener
from scripts.models.trained_parts import codec_hash, load_part
from scripts.training.model_card import CARD, RunCard, is_edited
from scripts.training.processes import RunError
from scripts.training.recipe_file import model_of
from scripts.unfinished import set_usual_mode, unfinished_file, write_text

SHIPPED_DTYPE, WEIGHTS = torch.float16, "model.safetensors"


def objective_of(
    part: str,
    recipe: CodecRecipe,
    batches: CropBatches,
    codec: str | None = None,
    features: str | None = None,
    listener: str | None = None,
    go_on: bool = False,
):
    """The objective of a part that is trained, with its start where it begins from nothing.

    Args:
        batches: what the starts are fitted to.
        codec, features, listener: folders of earlier parts, see `scripts.train_codec`.
        go_on: keep what the codec, or the listener, already knows of the part.
    """
    torch.manual_seed(recipe.seed)  # of the weights that are drawn
    if part == "listener":
        return ListenerObjective(trained_listener(listener, recipe.bf16) if go_on else new_listener(recipe))
    model = _load_codec(codec) if codec else _load_codec(features, "--features")
    _check_crops(part, recipe, batches, bool(listener))
    heard = trained_listener(listener, recipe.bf16) if listener else None
    if part == "whole":
        return WholeObjective(model, recipe.bf16, heard)
    if part == "kicks":
        return KickObjective(model)
    if part == "hearing":
        return HearingObjective(model, recipe.bf16)
    axes = load_features(features, recipe.memory) if features else None
    if axes is not None and axes.basis.shape[1] != model.config.hidden_size - model.config.num_key_axes:
        raise ValueError(f"--features {features}: were not fitted for this codec; give those that it began with")
    if part == "encoder":
        if not go_on:
            wave = first_waves(batches, 4)[:4]
            start_balanced(model.encoder.layers, wave[:, None], 1.0, float(axes(wave).std()))
        return EncoderObjective(model, recipe.bf16, axes)
    if not go_on:
        with torch.no_grad():
            start_oscillators(model, axes, model.encoder(first_waves(batches, 16)[:16, None]))
            start_synthesis(model)
    return DecoderObjective(model, recipe.bf16, 0 if go_on else recipe.sing_steps, heard)


def _load_codec(folder: str, given_as: str = "--codec") -> PianoEncodecModel:
    """The codec of a folder; ValueError if it is of another form than the sound is here."""
    codec = load_part("codec", folder, given_as)
    config = codec.config
    if (config.sampling_rate, config.hop_length, config.audio_channels) != (SAMPLING_RATE, HOP, 1):
        form = f"{config.audio_channels} channels of {config.sampling_rate} Hz, {config.hop_length} samples a frame"
        raise ValueError(f"{folder}: is a codec of {form}; here it is 1 of {SAMPLING_RATE} Hz, {HOP}")
    return codec


def _check_crops(part: str, recipe: CodecRecipe, batches: CropBatches, listened: bool) -> None:
    """ValueError where nothing that counts would be left of a crop."""
    frames, lead = (round(seconds * SAMPLING_RATE) // HOP for seconds in (recipe.crop_seconds, recipe.lead_seconds))
    lead = 0 if batches.stored and not batches.source.codes else lead
    spoken = 2 * EDGE_FRAMES if listened else 6  # half of the longest window of spectra is 6.4
    least = {"kicks": WARMING_UP - lead, "decoder": spoken, "whole": spoken}.get(part, 0) + 1
    if frames < least:
        needed = f"{part} needs {least * HOP / SAMPLING_RATE:.2f} or more here"
        raise ValueError(f"crop_seconds: {recipe.crop_seconds} s are too short; {needed}")


@torch.no_grad()
def fit_features(recipe: CodecRecipe, batches: CropBatches, output: Path, card: RunCard | None = None) -> None:
    """Fit the axes to audio; writes `features.safetensors` and a codec folder, with its card, for the encoder to begin
    with."""
    torch.manual_seed(recipe.seed)
    with model_of("model"):
        codec = PianoEncodecModel(PianoEncodecConfig(**recipe.model))
    _make_folder(output)
    features = SpectralFeatures(codec.config.hidden_size - codec.config.num_key_axes, recipe.memory)
    bands, _ = collect(batches, lambda b: features.bands(b["input_values"]).flatten(0, 1), recipe.kmeans_vectors)
    print(f"{len(features.basis.T)} axes keep {features.fit(bands):.4f} of the variance of {len(bands)} frames")
    save_whole(features.state_dict(), output / "features.safetensors")
    export_rounded(codec.state_dict(), codec.config, output, card and card.text(output.resolve().name))


@torch.no_grad()
def fit_codebooks(
    recipe: CodecRecipe, encoder: str, batches: CropBatches, output: Path, card: RunCard | None = None
) -> None:
    """Fit the codebooks to a trained encoder at shipped precision, by k-means; writes a codec folder with its card.
    From here on the codes stay."""
    codec = _load_codec(encoder)
    if recipe.kmeans_vectors < codec.config.codebook_size:
        raise ValueError(f"kmeans_vectors: {recipe.kmeans_vectors} are fewer than {codec.config.codebook_size} codes")
    _make_folder(output)

    def latents(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        latent = codec.encoder(batch["input_values"][:, None])
        if codec.config.num_key_axes:
            latent = half_played(latent, batch["onsets"], batch.get("has_notes"))
        return latent.transpose(1, 2).flatten(0, 1)

    vectors, step = collect(batches, latents, recipe.kmeans_vectors)
    left = kmeans_start(codec.quantizer, vectors, step, torch.Generator().manual_seed(recipe.seed))
    print(f"codebooks leave {[round(v, 4) for v in left]} of the variance")
    export_rounded(codec.state_dict(), codec.config, output, card and card.text(output.resolve().name))


@torch.no_grad()
def encode_pools(folder: str, pools: list[str]) -> None:
    """Codes of whole pools, beside them, as heard and, if the codec has key axes, as played: training the decoder then
    needs no encoder."""
    codec, sha256 = _load_codec(folder), codec_hash(folder)
    kinds = ("heard", "played") if codec.config.num_key_axes else ("heard",)
    for pool in pools:
        targets = [codes_path(pool, sha256, kind) for kind in kinds]
        if all(target.is_file() for target in targets):
            continue
        waves, onsets = open_pool(pool)
        codes = [[] for _ in kinds]
        for start in tqdm(range(0, len(waves), 8), desc=targets[0].name):
            latent = codec.encoder(torch.from_numpy(waves[start : start + 8].astype(np.float32) / 32767)[:, None])
            for kind, found in zip(kinds, codes, strict=True):
                if kind == "played":
                    latent = write_keys(latent, torch.from_numpy(onsets[start : start + 8].astype(np.float32) / 127))
                found.append(codec.quantizer.encode(latent).transpose(0, 1).numpy().astype(np.int16))
        for target, found in zip(targets, codes, strict=True):
            with unfinished_file(target) as partial, open(partial, "wb") as file:  # np.save would add an ending
                np.save(file, np.concatenate(found))


def collect(batches: CropBatches, latent_of, count: int) -> tuple[torch.Tensor, int]:
    """At least `count` latent vectors (N, D) of audio, and how many one batch gives."""
    found = []
    for batch in batches():
        found.append(latent_of(batch))
        if sum(map(len, found)) >= count:
            return torch.cat(found), len(found[0])


def export_rounded(
    state: dict[str, torch.Tensor], config: PreTrainedConfig, folder: Path, card: str | None = None
) -> None:
    """Save a codec or listener as a folder `from_pretrained` takes, in the shipped precision and codebooks in fp32,
    with its card, unless somebody has edited the one that is there."""
    rounded = {
        name: value.detach().cpu().to(torch.float32 if "codebook" in name else SHIPPED_DTYPE)
        for name, value in state.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = "float32"
    config.save_pretrained(folder)
    if card is not None and not is_edited(folder / CARD):
        write_text(folder / CARD, card)
    save_whole(rounded, folder / WEIGHTS)  # last: where they are, all is there


def _make_folder(output: Path) -> None:
    """The folder of what is fitted. What cannot be written, or would be replaced, is found before the fit.

    Raises:
        RunError: a codec lies there.
    """
    output.mkdir(parents=True, exist_ok=True)
    if (output / WEIGHTS).exists():
        raise RunError(f"{output}: holds a codec, from which others may have learned; give another --output-dir")


def save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A file of safetensors, complete or not at all; `RunError` if it cannot be written."""
    try:
        with unfinished_file(path) as partial:
            save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt"})
            set_usual_mode(partial)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be written ({error})") from error


def load_features(folder: str, memory: float) -> SpectralFeatures:
    """The fitted features of `train_codec features`."""
    path = Path(folder) / "features.safetensors"
    try:
        with safe_open(path, "pt") as tensors:
            axes = tensors.get_slice("basis").get_shape()[1]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as features of `train_codec features` ({error})") from error
    return _loaded(SpectralFeatures(axes, memory), path)


def new_listener(recipe: CodecRecipe) -> PianoListenerModel:
    """One that has heard nothing yet."""
    with model_of("listener"):
        listener = PianoListenerModel(PianoListenerConfig(**recipe.listener))
    listener.bf16 = recipe.bf16
    return listener


def trained_listener(folder: str, bf16: bool = False) -> PianoListenerModel:
    """The trained listener of `train_codec listener`, or of a model folder, in floating point."""
    if (listener := load_listener(folder)) is None:
        raise ValueError(f"--listener {folder}: holds no {LISTENER} folder; give the output of `listener`, or a model")
    listener.dequantize_()
    listener.bf16 = bf16
    return listener


def _loaded(module: torch.nn.Module, path: Path) -> torch.nn.Module:
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be read as the weights of a {type(module).__name__} ({error})") from error
    return module
