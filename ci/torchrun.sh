#!/usr/bin/env bash
# torchrun for real: launch/torchrun.sh with one worker on the CPU (several need GPUs), in two runs beside each other on this
# machine. The worker of one is killed twice; torchrun starts it again, and the weights must be, bit for bit, those of a run that
# nobody disturbed. Run on demand; it takes two minutes or so.
#
#   ./ci/torchrun.sh [FOLDER]      logs and runs [a new folder in /tmp, removed at the end]
#
# HYPERLORA and DATA_PREP name programs that are built already, TORCHRUN a torchrun; without one the pinned PyTorch is installed
# into a virtual environment in HYPERLORA_CACHE [~/.cache/hyperlora].
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
. ci/small_training.sh

given=${1:-}
folder=${given:-$(mktemp -d /tmp/hyperlora-torchrun.XXXXXX)}
mkdir -p "$folder"
state=$(realpath "$folder")
launched=()
end() {
  local code=$?
  trap - EXIT INT TERM
  [ ${#launched[@]} = 0 ] || kill "${launched[@]}" 2>/dev/null || true
  if [ "$code" = 0 ] && [ -z "$given" ]; then rm -rf "$state"; else echo "logs and runs: $state"; fi
  exit "$code"
}
trap end EXIT
trap 'exit 130' INT TERM

if [ -z "${TORCHRUN:-}" ] && ! TORCHRUN=$(command -v torchrun); then
  tools=${HYPERLORA_CACHE:-$HOME/.cache/hyperlora}/torchrun
  if [ ! -x "$tools/bin/torchrun" ]; then
    say "PyTorch"
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet --only-binary :all: "$(grep '^torch==' ci/parity/requirements.txt)"
  fi
  TORCHRUN=$tools/bin/torchrun
fi
export TORCHRUN
build_programs --locked
export HYPERLORA=$program DEVICE=cpu NPROC_PER_NODE=1 RAYON_NUM_THREADS=1
make_training

say "a run that nobody disturbs"
rm -rf "$state/undisturbed" "$state/killed" "$state/beside"
"$program" train "$state/train.yaml" --out "$state/undisturbed" 2>&1 | grep finished

say "two runs under torchrun"
# launch NAME: starts a run into the folder of that name.
launch() {
  launch/torchrun.sh "$state/train.yaml" --out "$state/$1" >"$state/$1.log" 2>&1 &
  launched+=($!)
}
# await NAME TEXT N: until the log of a run says it for the N-th time.
await() {
  for _ in {1..900}; do
    [ "$(grep -c "$2" "$state/$1.log")" -ge "$3" ] && return
    sleep 0.2
  done
  tail -n 30 "$state/$1.log" >&2
  fail "the run '$1' never said '$2'" "see $state/$1.log"
}
launch killed
launch beside
for time in 1 2; do
  await killed "$([ "$time" = 1 ] && echo 'id_clip [1-9]*/5' || echo 'id_embedding [2-9]*/10')" 1
  worker=$(pgrep -f "^$program train $state/train.yaml --device cpu --out $state/killed")
  echo "--- $(date +%T) the worker $worker is killed" | tee -a "$state/killed.log"
  kill -KILL "$worker"
  await killed 'resuming from' "$time"
done
for process in "${launched[@]}"; do
  wait "$process" || fail "a run under torchrun ended with exit code $?" "see the logs in $state"
done
launched=()
grep -hE 'killed$|failed \(exitcode|restart worker group|resuming from|finished after' "$state/killed.log" "$state/beside.log"
same_weights "$state/killed"
same_weights "$state/beside"

say "--restart is refused"
code=0
"$TORCHRUN" --no-python --standalone --max-restarts 1 "$program" train "$state/train.yaml" --out "$state/killed" --restart \
  >"$state/restart.log" 2>&1 || code=$?
grep -m 1 'error: --restart' "$state/restart.log"
[ "$code" != 0 ] && [ ! -e "$state/killed.1" ] || fail "--restart was not refused" "see $state/restart.log"
