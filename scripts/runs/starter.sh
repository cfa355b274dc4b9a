#!/usr/bin/env bash
# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
# The starter checkpoint from MIDI and sampled pianos: scripts/runs/starter.sh PACK OUTPUT
#
# PACK holds midi/ (manifest.csv beside the archives) and pianos/*.tar. Every step leaves its result in OUTPUT and is
# skipped or continued when it is there already. Needs `make install`, and `make install-eval` for the last step.
# On two CPU cores encoder and decoder, then AR and NAR, run side by side with one thread each: two threads of torch
# wait for one another as soon as anything else runs.
set -euo pipefail
pack=${1:?usage: scripts/runs/starter.sh PACK OUTPUT}
out=${2:?usage: scripts/runs/starter.sh PACK OUTPUT}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
jobs=()
trap 'kill "${jobs[@]}" 2>/dev/null || true' EXIT  # if one step fails, none goes on alone

rooms=(--room dry_close --room living_room --room studio --room chamber_hall --room concert_hall --room old_tape)
pianos=()  # their order is part of what a seed draws
for piano in steinway_splendid yamahaC3_close yamahaC3_decca upright_kw; do pianos+=(--piano "$pack/pianos/$piano.tar"); done
sound=(--midi-root "$pack/midi" "${pianos[@]}" "${rooms[@]}")
codec=(--audio "$out/pool.npy" --workers 0)
# glibc gives every large tensor back to the system and faults it in again: half of a CPU step without these
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456

[ -f "$out/pool.npy" ] || $python -m scripts.render_pool "${sound[@]}" --hours 5 --output "$out/pool.npy"
[ -f "$out/features/features.safetensors" ] ||
  $python -m scripts.train_codec features --config recipes/codec_starter.yaml "${codec[@]}" --output-dir "$out/features"

$python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || export OMP_NUM_THREADS=1
$python -m scripts.train_codec encoder --config recipes/codec_starter.yaml "${codec[@]}" --features "$out/features" --output-dir "$out/encoder"
[ -f "$out/codes/model.safetensors" ] ||
  $python -m scripts.train_codec codebooks --config recipes/codec_starter.yaml "${codec[@]}" --codec "$out/encoder/codec" --output-dir "$out/codes"
$python -m scripts.train_codec encode --config recipes/codec_starter.yaml "${codec[@]}" --codec "$out/codes" --output-dir "$out/codes"

# The codes are fixed from here on: data and decoders need not wait for the codec's decoder.
(
  $python -m scripts.train_codec decoder --config recipes/codec_starter_decoder.yaml "${codec[@]}" \
    --features "$out/features" --codec "$out/codes" --output-dir "$out/decoder"
  $python -m scripts.train_codec listener --config recipes/codec_listener.yaml "${codec[@]}" --output-dir "$out/listener"
  $python -m scripts.train_codec decoder --config recipes/codec_starter_notes.yaml "${codec[@]}" --go-on \
    --codec "$out/decoder/codec" --listener "$out/listener" --output-dir "$out/notes"
) &
jobs+=($!)
for split in train:1152 validation:16; do
  $python -m scripts.prepare_dataset --codec "$out/codes" "${sound[@]}" --split "${split%:*}" --items "${split#*:}" \
    --shard-items 32 --output-dir "$out/data"
done
for part in ar nar; do
  $python -m scripts.train --config "recipes/starter_$part.yaml" --part $part --data "$out/data" \
    --codec "$out/codes" --output-dir "$out/$part" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
jobs=()

$python -m scripts.assemble_model --codec "$out/notes/codec" --ar "$out/ar/model" --nar "$out/nar/model" \
  --output checkpoints/starter
$python -m scripts.evaluate --model checkpoints/starter "${sound[@]}" --output-dir "$out/evaluation"
