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
# If one step fails, none goes on alone: each job is a group of processes, by setsid, and ends with what it has started.
trap 'for job in "${jobs[@]}"; do kill -- "-$job" 2>/dev/null || true; done' EXIT

scripts/runs/codec.sh "$pack" "$out" codes
# The codes are fixed from here on: data and decoders need not wait for the codec's decoder.
setsid scripts/runs/codec.sh "$pack" "$out" decoder &
jobs+=($!)
for split in "train:$(size 3072 32)" "validation:$(size 16 8)"; do
  $python -m scripts.prepare_dataset --codec "$out/codes" "${sound[@]}" --split "${split%:*}" --items "${split#*:}" \
    --shard-items 32 --output-dir "$out/data"
done
for part in ar nar; do
  setsid $python -m scripts.train --config "$(recipe "starter_$part")" --part $part --data "$out/data" \
    --codec "$out/codes" --output-dir "$out/$part" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait -n; done  # whichever ends first
jobs=()

assemble() {  # assemble CODEC OUTPUT OPTION...; the onset delay is measured: minus the onset bias
  $python -m scripts.assemble_model --codec "$1" --ar "$out/ar/model" --nar "$out/nar/model" \
    --listener "$out/listener" --quantize-listener --as-recorded --correct-level --onset-delay 0.01 --output "${@:2}"
}

# Now the codec's decoder learns from codes that AR and NAR have generated, and from their notes.
pool="$out/generated.npy"
[ -f "$out/model/config.json" ] || assemble "$out/final/codec" "$out/model"
if [ "$gpu" ]; then  # as the shipped decoder was made
  last=codec_starter_gpu many=(--items "$(size 2400 8)" --batch-size 128 --workers "$(($(nproc) - 1))")
else
  last=codec_starter_told many=(--items "$(size 800 8)")
fi
[ -f "$pool" ] || $python -m scripts.generate_pool --model "$out/model" --codec "$out/final/codec" "${sound[@]}" \
  "${many[@]}" --seed 1 --mean-vectors --output "$pool"
told=(--config "$(recipe $last)" --audio "$pool" --codec "$out/final/codec")
$python -m scripts.train_codec encode "${told[@]}"
$python -m scripts.train_codec decoder --go-on "${told[@]}" --listener "$out/listener" --output-dir "$out/told"

starter=$(size checkpoints/starter "$out/starter")
assemble "$out/told/codec" "$starter" --keys-from-midi --mean-vectors --velocity-gain 24 --treble-gain 25 --octave-gain 6 \
  --attack-gain 3 --sustain-gain 5 --colour 0 0 0.5 2 2 1 0 -1 -2.5 -2.5
[ -f "$out/evaluation/table.md" ] || {  # the last that it writes
  rm -rf "$out/evaluation"
  $python -m scripts.evaluate --model "$starter" "${sound[@]}" --excerpts "$(size 12 2)" --output-dir "$out/evaluation"
}
