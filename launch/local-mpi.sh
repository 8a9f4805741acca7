#!/usr/bin/env bash
# Runs a training as N ranks on the CPUs of this machine, started by mpirun. After an interruption the same command resumes.
#
#   ./launch/local-mpi.sh N CONFIG [further arguments of hyperlora train]
#
# HYPERLORA names the program [target/release/hyperlora], built with --features burn-hyperlora/mpi.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh

ranks=${1:-} config=${2:-}
[[ $ranks =~ ^[1-9][0-9]*$ && -n $config ]] || fail "number of ranks or configuration missing" \
  "./launch/local-mpi.sh 2 experiments/quickstart/train.yaml --out runs/two"
shift 2
program=${HYPERLORA:-${CARGO_TARGET_DIR:-target}/release/hyperlora}
[ -x "$program" ] || fail "$program is missing" "cargo build --release --features burn-hyperlora/mpi"
command -v mpirun >/dev/null || apt_install mpirun openmpi-bin libopenmpi-dev

# The ranks share the cores: each gets its share of the threads, and none is bound to a core, since there may be more ranks than cores.
cores=$(nproc)
export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
options=(-n "$ranks" --bind-to none --oversubscribe --mca mpi_yield_when_idle 1)
# mpirun passes SIGTERM on and kills ranks that still run after this time, which must be enough to save.
options+=(--mca odls_base_sigkill_timeout "${GRACE_S:-60}")
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
exec mpirun "${options[@]}" "$program" train "$config" --device cpu "$@"
