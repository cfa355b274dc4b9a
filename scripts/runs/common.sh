# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
# What the runs share; they source it with their arguments: PACK OUTPUT.
#
# PACK holds midi/ (manifest.csv beside the archives) and pianos/*.tar. Every step of a run leaves its result in OUTPUT
# and is skipped or continued when it is there already. With REHEARSAL=1 every step is as short as can be: some minutes
# that show that all of it works here; give it an OUTPUT of its own.
pack=${1:?usage: $0 PACK OUTPUT}
out=${2:?usage: $0 PACK OUTPUT}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"

rooms=(--room dry_close --room living_room --room studio --room chamber_hall --room concert_hall --room old_tape)
pianos=()  # their order is part of what a seed draws
for piano in steinway_splendid yamahaC3_close yamahaC3_decca upright_kw; do pianos+=(--piano "$pack/pianos/$piano.tar"); done
sound=(--midi-root "$pack/midi" "${pianos[@]}" "${rooms[@]}")

size() { if [ "${REHEARSAL:-}" ]; then echo "$2"; else echo "$1"; fi; }  # size OF_A_RUN OF_A_REHEARSAL

recipe() {  # recipe NAME: the file of a recipe
  local file="recipes/$1.yaml"
  if [ "${REHEARSAL:-}" ]; then
    mkdir -p "$out/recipes"
    sed -E 's/^(steps|frame_steps|sing_steps): .*/\1: 2/; s/^steps: 2/steps: 4/' "$file" > "$out/recipes/$1.yaml"
    if [[ $1 == codec_* ]]; then echo "kmeans_vectors: 6000" >> "$out/recipes/$1.yaml"; fi
    file="$out/recipes/$1.yaml"
  fi
  echo "$file"
}

# glibc gives every large tensor back to the system and faults it in again: half of a CPU step without these
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
if $python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then gpu=1; else
  gpu=
  export OMP_NUM_THREADS=1  # two threads of torch wait for one another as soon as anything else runs
fi
