#!/usr/bin/env bash
# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
# The starter checkpoint from MIDI and sampled pianos: scripts/runs/starter.sh PACK OUTPUT
#
# common.sh tells what PACK is. Needs `make install`, and `make install-eval` for the last step. On two CPU cores the
# codec's decoder, AR and NAR run side by side with one thread each: two threads of torch wait for one another as soon
# as anything else runs.
set -euo pipefail
source "$(dirname "$0")/common.sh"
jobs=()
trap 'kill "${jobs[@]}" 2>/dev/null || true' EXIT  # if one step fails, none goes on alone

scripts/runs/codec.sh "$pack" "$out" codes
# The codes are fixed from here on: data and decoders need not wait for the codec's decoder.
scripts/runs/codec.sh "$pack" "$out" decoder &
jobs+=($!)
for split in train:3072 validation:16; do
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

$python -m scripts.assemble_model --codec "$out/final/codec" --ar "$out/ar/model" --nar "$out/nar/model" \
  --as-recorded --onset-delay 0.01 --output checkpoints/starter  # the delay is measured: minus its onset bias
$python -m scripts.evaluate --model checkpoints/starter "${sound[@]}" --output-dir "$out/evaluation"
