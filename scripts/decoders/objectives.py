# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What the decoders are trained for, and how they start.

Codes are not names: two of them may be nearly the same sound. So a decoder starts with the codec's codebooks as its
tables, where near codes have near logits. And what it will have at hand when it plays is its own output, not the truth:
the AR learns on its own predictions (given the truth, it learns to repeat the frame before, and then never starts a
note), the NAR on codebooks that are slightly wrong, to find the code that repairs most of the error.

What a struck key sounds like is most of what there is to learn, and takes millions of frames. It needs no attention:
the frames learn it first, each alone with its notes, ten times as many a second.

Published weights go on as they began (`config.objective` is `"published_sum"`): `published_loss`, on the truth.
"""

import numpy as np
import torch
from torch.nn import functional as F

from modeling_midivalle.decoding_midivalle_ar import FrameDecoder
from modeling_midivalle.sampling_midivalle import Sampler
from scripts.codec.quantizer import nearest

INPUT_DEVIATION = 0.1  # of a code vector's entries in the residual stream: well above what the other inputs start with
OWN_PROMPT_FRAMES = 150  # 3 s, of an excerpt's beginning
SHARPNESS = 20.0  # mean logit difference of two random codes at the start


@torch.no_grad()
def start_from_codebooks(core, codebooks: torch.Tensor) -> None:
    """Write `codebooks` `(K, codebook_size, D)` into the tables and heads of an AR or NAR.

    Entry d of a hidden state begins as axis d of the latent in units of its deviation; entry D is held at one by the
    last norm and weighs each code's bias. Tied heads are left to the tables' scale, without biases.
    """
    K, size, D = codebooks.shape
    width = core.config.hidden_size
    if width <= D:
        raise ValueError(
            f"codebooks of {D} axes do not fit into hidden_size {width}; set codebook_start: false, or widen the model"
        )
    tables = getattr(core, "audio_embeddings", None)  # of a NAR
    pairs = [(core.model.audio_embedding, core.lm_head)] if tables is None else zip(tables, [None, *core.heads])
    stack = core.model if tables is None else core
    norm, axes = stack.norm, codebooks[0].std(0) + 1e-6
    for layer in stack.layers:  # silent, so that what the frames have learned alone still holds
        layer.self_attn.out_proj.weight.zero_()
    for (table, head), book in zip(pairs, codebooks):
        table.weight[:size, :D] = book / axes * INPUT_DEVIATION
        if head is None or core.config.tie_word_embeddings:
            continue
        deviation, scale = book.std(0), SHARPNESS / book.var(0).sum()
        head.weight[:size, :D] = book * deviation * scale
        head.weight[:size, D] = -book.square().sum(1) / 2 * scale
        head.weight[size:, D] = -2 * SHARPNESS  # specials are never predicted
    if core.config.tie_word_embeddings:
        return
    if isinstance(norm, torch.nn.LayerNorm):
        norm.weight[D], norm.bias[D] = 0.0, 1.0
    elif not norm.projected:
        norm.table[:, D], norm.table[:, width + D] = 0.0, 1.0


@torch.no_grad()
def start_as_published(core) -> None:
    """Give an AR or NAR the initial values of the published program: torch's own, and all layers begin as the first."""
    for kind in (torch.nn.Linear, torch.nn.Embedding):  # tables last: tied heads are tables
        for module in core.modules():
            if isinstance(module, kind):
                module.reset_parameters()
    first, *others = getattr(core, "model", core).layers
    torch.nn.init.xavier_uniform_(first.self_attn.in_proj.weight)
    for linear in (first.self_attn.in_proj, first.self_attn.out_proj):
        linear.bias.zero_()
    for layer in others:
        layer.load_state_dict(first.state_dict())


class DecoderLosses(torch.nn.Module):
    """A decoder with what it is trained for, in one forward pass: that is what DDP and FSDP have to see.

    Whatever is drawn for a batch is a function of (seed, index) alone, and what is shared out over rows goes by the
    row's number in the run: neither processes, nor accumulation, nor a resume change it.

    Args:
        core: AR or NAR.
        codebooks: `(K, codebook_size, D)`.
        recipe: `own_share`, `code_noise`, `frame_steps`, `seed` of a `TrainRecipe`.
    """

    def __init__(self, core, codebooks: torch.Tensor, recipe):
        super().__init__()
        self.core, self.recipe = core, recipe
        self.register_buffer("codebooks", codebooks, persistent=False)
        self.is_ar = hasattr(core, "lm_head")
        self.published = core.config.objective == "published_sum"

    def forward(self, batch: dict[str, torch.Tensor], step: int, index: int) -> dict[str, torch.Tensor]:
        """Losses by name of the batch with number `index`, counted over the whole run and all processes."""
        core, recipe = self.core, self.recipe
        device, size = batch["midi_ids"].device, len(batch["midi_ids"])
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([recipe.seed, index]).generate_state(1)[0])
        )
        rows = range(index * size, (index + 1) * size)
        if self.published:
            # one stage for the whole batch
            stages = None if self.is_ar else core.draw_stages(1, generator).to(device).repeat(size)
            return published_loss(core, core, batch, stages, generator)
        if self.is_ar and step < recipe.frame_steps:
            return frame_loss(core, batch, self.codebooks)
        if self.is_ar:
            share = recipe.own_share
            own = [i for i, row in enumerate(rows) if int((row + 1) * share) > int(row * share)]
            return ar_loss(core, core, batch, self.codebooks, own)
        stages = torch.tensor([row % (core.config.num_codebooks - 1) + 1 for row in rows], device=device)
        if step < recipe.frame_steps:
            return nar_frame_loss(core, batch, stages, self.codebooks, recipe.code_noise, generator)
        return nar_loss(core, batch, stages, self.codebooks, recipe.code_noise, generator)

    @torch.no_grad()
    def measure(self, batch: dict[str, torch.Tensor], stage: int) -> dict[str, torch.Tensor]:
        """Losses and `top10` of one codebook, as it plays: the AR on its own past, the NAR on true lower codebooks."""
        core = self.core
        stages = torch.full((len(batch["midi_ids"]),), stage, device=batch["midi_ids"].device) if stage else None
        if self.published:
            prefix = torch.Generator().manual_seed(self.recipe.seed)  # the same one every time
            return published_loss(core, core, batch, stages, prefix, accuracy=True)
        if self.is_ar:
            return ar_loss(core, core, batch, self.codebooks, slice(None), accuracy=True)
        return nar_loss(core, batch, stages, self.codebooks, 0.0, None, accuracy=True)

    @torch.no_grad()
    def play(self, batch: dict[str, torch.Tensor], frames: int) -> torch.LongTensor:
        """Codes `(B, K, T)` of the prompt and of `frames` target frames, or of all if they are fewer, as they are
        generated: codebook 0 alone (K = 1) by an AR, all behind the true codebook 0 by a NAR. Published weights of an
        AR are sampled, with the same numbers every time; its frames end where `frames` says. They begin after at least
        a frame: where there is no prompt, the first of the target are given."""
        core, codes, prompt = self.core, batch["audio_codes"], int(batch["prompt_lengths"][0])
        if self.is_ar and not core.config.use_target_bos:
            prompt = prompt or min(OWN_PROMPT_FRAMES, codes.shape[2] // 2)
        frames = min(frames, codes.shape[2] - prompt)
        shared = {k: batch[k] for k in ("midi_ids", "midi_attention_mask", "prompt_lengths")}
        if not self.is_ar:
            codes = codes.clone()
            for stage in range(1, core.config.num_codebooks):
                codes[:, stage, prompt:] = core(codes, stage=stage, **shared).logits[:, prompt:].argmax(-1)
            return codes[..., : prompt + frames]
        known, midi = codes[:, 0, :prompt], (batch["midi_ids"], batch["midi_attention_mask"])
        ids = F.pad(known, (0, 1), value=core.config.bos_token_id) if core.config.use_target_bos else known
        lengths = torch.full_like(batch["prompt_lengths"], prompt)
        decoder = FrameDecoder(core, ids, torch.ones_like(ids), midi, lengths, frames)
        uniform = torch.rand(len(codes), frames, generator=torch.Generator().manual_seed(self.recipe.seed))
        new = decoder.decode(Sampler(self.published), uniform.to(codes.device), core.config.codebook_size)
        return torch.cat([known, new], 1)[:, None]


def frame_loss(core, batch: dict[str, torch.Tensor], codebooks: torch.Tensor) -> dict:
    """Squared error `frame` of the latent as a started head reads it from an AR's last hidden state; no attention, of
    the prompt at most its summary. Relative to the first codebook's variance, as `latent_error`."""
    lengths = batch["prompt_lengths"]
    prompt, codes = batch["audio_codes"].tensor_split([int(lengths.max())], 2)
    frames = lengths[:, None] + torch.arange(codes.shape[2], device=codes.device)
    states = core.model.audio_embedding(torch.full_like(frames, core.config.pad_token_id))
    shared = (batch["midi_ids"], batch["midi_attention_mask"], lengths)
    states = core.model.embeddings.place_audio(states, frames, frames, *shared)
    index = torch.arange(prompt.shape[2], device=codes.device).expand(len(codes), -1)
    if (summary := core.model.embeddings.prompt_summary) is not None:
        seen = core.model.audio_embedding(prompt[:, 0])
        if prompt.numel():
            seen = core.model.embeddings.place_audio(seen, index, index + 1, *shared)
        states = states + summary(seen, index < lengths[:, None])
    for layer in core.model.layers:
        states = states + layer.linear2(layer.activation(layer.linear1(layer.norm2(states))))
    book = codebooks[0]
    read = core.model.norm(states)[..., : book.shape[1]].float() * book.std(0)
    return {"frame": (read - sum_of(codes, codebooks)).square().sum(-1).mean() / book.var(0).sum()}


def nar_frame_loss(core, batch: dict[str, torch.Tensor], stages, codebooks: torch.Tensor, noise, generator) -> dict:
    """The same of a NAR: what its lower codebooks, off by up to `noise`, leave of the latent; of each row's stage,
    `stages` `(B,)`."""
    lengths = batch["prompt_lengths"]
    prompt, codes = batch["audio_codes"].tensor_split([int(lengths.max())], 2)
    given = disturb(codes, codebooks, noise, generator)[0] if noise else codes
    frames = lengths[:, None] + torch.arange(codes.shape[2], device=codes.device)
    attended, column = torch.ones_like(frames, dtype=torch.bool), stages[:, None]
    states = core._sum_codebooks(given, attended, ~attended, column)
    shared = (batch["midi_ids"], batch["midi_attention_mask"], lengths)
    states = core.embeddings.place_audio(states, frames, frames, *shared)
    index = torch.arange(prompt.shape[2], device=codes.device).expand(len(codes), -1)
    if (summary := core.embeddings.prompt_summary) is not None:
        is_prompt = index < lengths[:, None]
        seen = core._sum_codebooks(prompt, torch.ones_like(is_prompt), is_prompt, column)
        if prompt.numel():
            seen = core.embeddings.place_audio(seen, index, index, *shared)
        states = states + summary(seen, is_prompt)
    condition = core.condition(column)
    for layer in core.layers:
        states = states + layer.linear2(layer.activation(layer.linear1(layer.norm2(states, condition))))
    read = core.norm(states, condition)[..., : codebooks.shape[2]].float()
    wanted, errors = sum_of(codes, codebooks), []
    for row, stage in enumerate(stages.tolist()):
        book = codebooks[stage]
        left = wanted[row] - sum_of(given[row : row + 1, :stage], codebooks)[0]
        errors.append((read[row] * book.std(0) - left).square().sum(-1).mean() / book.var(0).sum())
    return {"frame": torch.stack(errors).mean()}


def ar_loss(model, core, batch, codebooks: torch.Tensor, own: slice | list[int], accuracy: bool = False) -> dict:
    """Losses by name: of the target's first codebook `code`, mean cross-entropy, and `latent`, see `latent_error`.

    Args:
        model: what is called for gradients; `core` may be the same without its wrapper.
        batch: as `TrainingStream` gives it.
        codebooks: `(K, codebook_size, D)`.
        own: rows whose past target codes are the model's own; those of the other rows are hidden (the pad id).
        accuracy: give `top10` too.
    """
    codes, lengths = batch["audio_codes"][:, 0], batch["prompt_lengths"]
    shared = {k: batch[k] for k in ("midi_ids", "midi_attention_mask", "prompt_lengths")}
    inputs = core.build_inputs(codes, torch.ones_like(codes), lengths)
    first = lengths + core.config.use_target_bos
    places = torch.arange(inputs["input_ids"].shape[1], device=codes.device)
    past = places >= first[:, None]
    inputs["input_ids"] = inputs["input_ids"].masked_fill(past, core.config.pad_token_id)
    keep = min(len(places) - int(first.min()) + 1, len(places))
    labels = inputs.pop("labels")
    if len(codes[own]):
        rows = {k: v[own] for k, v in (inputs | shared).items()}
        with torch.no_grad():
            guess = core(**rows, logits_to_keep=keep).logits[..., : core.config.codebook_size].argmax(-1)
        guess = F.pad(guess[:, :-1], (len(places) - keep + 1, 0))
        inputs["input_ids"][own] = torch.where(past[own], guess, inputs["input_ids"][own])
    logits = model(**inputs, **shared, logits_to_keep=keep).logits
    wanted = sum_of(batch["audio_codes"], codebooks)[:, 1 - keep :]
    counted = labels[:, 1 - keep :] != -100
    latent = latent_error(logits[:, :-1][counted], codebooks[0], wanted[counted])
    found = {"code": core.loss(logits, labels[:, -keep:]), "latent": latent}
    return found | ({"top10": top10(logits[:, :-1][counted], labels[:, 1 - keep :][counted])} if accuracy else {})


def nar_loss(model, batch, stages, codebooks: torch.Tensor, noise: float, generator, accuracy: bool = False) -> dict:
    """The same losses of each row's stage, `stages` `(B,)`, on lower codebooks that are off by up to `noise`."""
    shared = {k: batch[k] for k in ("midi_ids", "midi_attention_mask", "prompt_lengths")}
    codes, labels = batch["audio_codes"], batch["audio_codes"]
    prompt = torch.arange(codes.shape[2], device=codes.device) < batch["prompt_lengths"][:, None]
    if noise:
        given, repair = disturb(codes, codebooks, noise, generator)
        codes, labels = torch.where(prompt[:, None], codes, given), repair
    output = model(audio_codes=codes, stage=stages, labels=labels, **shared)
    wanted, errors = sum_of(batch["audio_codes"], codebooks), []
    for row, stage in enumerate(stages.tolist()):
        left = wanted[row] - sum_of(codes[row : row + 1, :stage], codebooks)[0]
        target = ~prompt[row]
        errors.append(latent_error(output.logits[row, target], codebooks[stage], left[target]))
    found = {"code": output.loss, "latent": torch.stack(errors).mean()}
    return found | (_stage_top10(output.logits, labels, stages, ~prompt) if accuracy else {})


def published_loss(model, core, batch, stages: torch.LongTensor | None, generator, accuracy: bool = False) -> dict:
    """The published loss of an AR (`stages` None) or of a NAR's `stages` `(B,)`, summed over the batch's frames.

    The past is the truth. A NAR's prompt is the excerpt's own beginning, its length drawn (`draw_prefix`).
    """
    shared = {k: batch[k] for k in ("midi_ids", "midi_attention_mask")}
    codes = batch["audio_codes"]
    if stages is None:
        inputs = core.build_inputs(codes[:, 0], torch.ones_like(codes[:, 0]), batch["prompt_lengths"])
        output = model(**inputs, **shared)
        found = {"code": output.loss}
        return found | ({"top10": top10(output.logits[:, :-1], inputs["labels"][:, 1:])} if accuracy else {})
    prefix = torch.full_like(stages, core.draw_prefix(torch.tensor([codes.shape[2]]), generator))
    output = model(audio_codes=codes, prompt_lengths=prefix, stage=stages, labels=codes, **shared)
    target = torch.arange(codes.shape[2], device=codes.device) >= prefix[:, None]
    return {"code": output.loss} | (_stage_top10(output.logits, codes, stages, target) if accuracy else {})


def top10(logits: torch.Tensor, codes: torch.LongTensor) -> torch.Tensor:
    """Share of `codes` `(...)` that are among the ten likeliest of `logits` `(..., V)`."""
    return (logits.topk(10).indices == codes[..., None]).any(-1).float().mean()


def _stage_top10(logits, codes, stages, target) -> dict:
    wanted = codes[torch.arange(len(codes), device=codes.device), stages]
    return {"top10": top10(logits[target], wanted[target])}


def latent_error(logits: torch.Tensor, book: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error of the expected code vector, relative to the codebook's variance: `logits` `(N, V)`, `wanted`
    `(N, D)`. A code's name says nothing of how near a miss was; this does, and its gradient is far less noisy."""
    expected = logits[:, : len(book)].float().softmax(-1) @ book
    return (expected - wanted).square().sum(-1).mean() / book.var(0).sum()


def sum_of(codes: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Latent `(B, T, D)` of codes `(B, K, T)`, of the first K codebooks."""
    return sum(F.embedding(codes[:, k], codebooks[k]) for k in range(codes.shape[1]))


@torch.no_grad()
def disturb(codes: torch.Tensor, codebooks: torch.Tensor, noise: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose codes anew under noise, each row's deviation drawn up to `noise` times that of the codebook.

    Args:
        codes (`torch.LongTensor` of shape `(B, K, T)`), codebooks (`torch.Tensor` of shape `(K, codebook_size, D)`).
    Returns:
        the disturbed codes, and for every codebook the best code behind the disturbed lower ones, both `(B, K, T)`.
    """
    B, K, T = codes.shape
    residual = sum_of(codes, codebooks).flatten(0, 1)
    share = (torch.rand(B, 1, generator=generator) * noise).repeat_interleave(T, 0).to(residual)
    given, best = [], []
    for book in codebooks:
        off = torch.randn(residual.shape, generator=generator).to(residual) * share * book.std(0)
        best.append(nearest(residual, book))
        given.append(nearest(residual + off, book))
        residual = residual - F.embedding(given[-1], book)
    return tuple(torch.stack(c).view(K, B, T).transpose(0, 1) for c in (given, best))
