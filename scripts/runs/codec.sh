#!/usr/bin/env bash
# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
# The Piano-Encodec from MIDI and sampled pianos: scripts/runs/codec.sh PACK OUTPUT [codes|decoder]
#
# The codec is OUTPUT/final/codec in the end. `codes` ends where the codes are fixed (OUTPUT/codes), `decoder` does what
# is left; without either both are done. common.sh tells what PACK is. On a CPU, five hours of audio are rendered once
# and cropped at random, and for the listener fifteen more, in any rooms. On a GPU, batches fill its memory, and the
# other cores render while it trains, so that it never hears a sample twice; PROCESSES=8 uses eight of them.
set -euo pipefail
source "$(dirname "$0")/common.sh"
part=${3:-all}
processes=${PROCESSES:-1}

train() {  # train PART RECIPE OPTION...: what learns step by step
  $python ${many:+-m torch.distributed.run --standalone --nproc-per-node "$processes"} -m scripts.train_codec "$1" \
    --config "$(recipe "$2")" "${audio[@]}" "${validation[@]}" "${@:3}"
}

fit() {  # fit PART OPTION...: what does not, in one process
  $python -m scripts.train_codec "$1" --config "$(recipe codec_starter)" "${audio[@]}" "${@:2}"
}

pool() {  # pool SPLIT HOURS FILE ROOM...
  [ -f "$3" ] || $python -m scripts.render_pool --midi-root "$pack/midi" "${pianos[@]}" "${@:4}" --split "$1" \
    --hours "$2" --output "$3"
}

if [ "$gpu" ]; then
  workers=$(($(nproc) / processes - 1))
  audio=(--midi-root "$pack/midi" "${pianos[@]}" --workers "$((workers > 0 ? workers : 1))")
  batch=(--batch-size auto) heard=() validation=()
else
  pool train "$(size 5 0.02)" "$out/pool.npy" "${rooms[@]}"
  pool validation "$(size 0.02 0.004)" "$out/pool_validation.npy" "${rooms[@]}"
  audio=(--audio "$out/pool.npy" --workers 0) validation=(--validation "$out/pool_validation.npy")
  batch=() heard=(--audio "$out/pool.npy" "$out/pool_any.npy")
fi
[ "$processes" = 1 ] || trained=1

if [ "$part" != decoder ]; then
  [ -f "$out/features/model.safetensors" ] || fit features --output-dir "$out/features"
  many=${trained:-} train encoder codec_starter "${batch[@]}" --features "$out/features" --output-dir "$out/encoder"
  many=${trained:-} train hearing codec_starter_hearing "${batch[@]}" --codec "$out/encoder/codec" \
    --output-dir "$out/hearing"
  [ -f "$out/codes/model.safetensors" ] ||
    fit codebooks --codec "$out/hearing/codec" --output-dir "$out/codes"
  [ "$gpu" ] || fit encode --codec "$out/codes"
fi
if [ "$part" != codes ]; then
  many=${trained:-}
  [ "$gpu" ] || pool train "$(size 15 0.02)" "$out/pool_any.npy" --room any
  train listener codec_listener "${batch[@]}" "${heard[@]}" --output-dir "$out/listener"
  train decoder codec_starter_decoder "${batch[@]}" --features "$out/features" --codec "$out/codes" \
    --listener "$out/listener" --output-dir "$out/decoder"
  train kicks codec_starter_kicks "${batch[@]}" --codec "$out/decoder/codec" --output-dir "$out/kicks"
  train decoder codec_starter_finish "${batch[@]}" --go-on --codec "$out/kicks/codec" --listener "$out/listener" \
    --output-dir "$out/final"
fi
