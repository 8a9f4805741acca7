#!/usr/bin/env bash
# From a fresh clone to a trained HyperLoRA: photos -> shards -> three training stages -> identity gap -> LoRA -> pictures.
# Small enough for two CPU cores, with the same code as for the real SDXL. After an interruption the same command resumes.
# docs/tutorial.md explains each step.
#
#   ./launch/quickstart.sh [cpu|cuda:N]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh

device=${1:-cpu}
features=()
case "$device" in
  cpu) ;;
  cuda:*) features=(--features burn-hyperlora/cuda) ;;
  *) fail "unknown device '$device'" "./launch/quickstart.sh cpu, or cuda:0" ;;
esac

data=runs/quickstart-data
run=runs/quickstart
lora=$run/s36.safetensors
grid=$run/grid.png
target=${CARGO_TARGET_DIR:-target}

check_tools
say "1/6 assets: photos and face models (once)"
launch/assets.sh

say "2/6 build (the first one takes about ten minutes)"
cargo build --release -p data-prep -p burn-hyperlora --bins "${features[@]}"
hyperlora=$target/release/hyperlora

say "3/6 photos to shards"
if [ -e "$data/manifest.json" ]; then
  echo "$data is there already; delete it to prepare again"
else
  "$target/release/data-prep" build experiments/quickstart/data.yaml --out "$data"
fi

say "4/6 training: Base-LoRA, ID-LoRA with CLIP, ID-LoRA with the ID embedding"
"$hyperlora" train experiments/quickstart/train.yaml --out "$run" --device "$device"

say "5/6 does it learn? the identity gap"
"$hyperlora" eval identity-gap "$run" --device "$device" | tee "$run/identity-gap.txt"

say "6/6 a LoRA from photos, and pictures drawn with it"
photos=${HYPERLORA_CACHE:-$HOME/.cache/hyperlora}/photos/orl
checkpoint=$(find "$run/checkpoints" -maxdepth 1 -name 'step-*' | sort | tail -n 1)
"$hyperlora" generate --checkpoint "$checkpoint" --device "$device" \
  --image "$photos/s36/1.pgm" --image "$photos/s36/2.pgm" -o "$lora"
"$hyperlora" sample --checkpoint "$checkpoint" --device "$device" \
  --image "$photos/s01/9.pgm" --image "$photos/s09/9.pgm" --image "$photos/s20/9.pgm" --image "$photos/s36/1.pgm" -o "$grid"

say "done"
cat "$run/identity-gap.txt"
cat <<EOF
picture grid:  $grid   (reference | no LoRA | ID-LoRA | ID + Base at 0.4)
LoRA file:     $lora
curves:        tensorboard --logdir $run/tensorboard   (pip install tensorboard)
EOF
