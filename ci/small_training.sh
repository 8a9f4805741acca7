# Sourced by the scripts that try a launcher for real: the programs, and a training of a minute in the folder $state.
# shellcheck shell=bash disable=SC2034,SC2154 # `program` is for the script, `state` is the script's

# HYPERLORA and DATA_PREP name programs that are built already; further arguments are for cargo. Sets `program`.
build_programs() {
  local target=${CARGO_TARGET_DIR:-target}
  if [ -z "${HYPERLORA:-}" ] || [ -z "${DATA_PREP:-}" ]; then
    say "build"
    cargo build -p data-prep -p burn-hyperlora --bins "$@"
  fi
  program=$(realpath "${HYPERLORA:-$target/debug/hyperlora}")
  prepare=$(realpath "${DATA_PREP:-$target/debug/data-prep}")
}

# $state/train.yaml: 4 people, three stages, 20 steps of 8 samples, a checkpoint every 4.
make_training() {
  local quickstart=$PWD/experiments/quickstart photos=${HYPERLORA_CACHE:-$HOME/.cache/hyperlora}/photos/orl
  launch/assets.sh
  say "data"
  mkdir -p "$state/photos/orl"
  cp -r "$photos"/s0[1-4] "$state/photos/orl/"
  grep -E '^key|^orl/s0[1-4]/' "$quickstart/split.csv" >"$state/split.csv"
  sed "s|root: .*|root: $state/photos|" "$quickstart/data.yaml" >"$state/data.yaml"
  [ -e "$state/shards/manifest.json" ] || "$prepare" build "$state/data.yaml" --out "$state/shards" --quiet
  sed -e "s|path: base|path: $quickstart/base|; s|shards: .*|shards: $state/shards|; /^  samples:/d; /^eval:/,\$d" \
    -e 's/micro_batch: 8/micro_batch: 2/; s/global_batch: 16/global_batch: 8/; s/every: 50/every: 4/; s/triples: 256/triples: 16/' \
    -e 's/steps: 60/steps: 5/; s/steps: 400/steps: 10/; s/warmup_steps: [0-9]*/warmup_steps: 2/' \
    "$quickstart/train.yaml" >"$state/train.yaml"
}

# The run $1 ended with the weights and moments of $state/undisturbed, bit for bit.
same_weights() {
  local last=checkpoints/step-00000020 file
  say "the weights of $1"
  for file in $(cd "$state/undisturbed/$last" && find . -name '*.safetensors' | sort); do
    cmp "$state/undisturbed/$last/$file" "$1/$last/$file" || fail "$file differs" "see $state"
    echo "$file: the same, bit for bit"
  done
}
