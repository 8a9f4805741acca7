#!/usr/bin/env bash
# How training scales: measures computing, packing and the wire on 1, 2 and 4 MPI ranks of this machine, fits
# time = alpha x hops + bytes / beta, and prints what `hyperlora plan` predicts by the same formula: with this fit for the ranks of
# this machine, and for GPUs.
#
#   ./ci/bench/scaling.sh [CONFIG]      [experiments/sdxl/id-clip.yaml, the largest gradients]
#
# PROFILE=release is what docs/design/distributed.md quotes; any other is for trying the script out.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/setup.sh

profile=${PROFILE:-release}
command -v mpirun >/dev/null || apt_install mpirun openmpi-bin libopenmpi-dev
cargo build --quiet --profile "$profile" -p data-prep -p burn-hyperlora -p hyperlora-tools --features burn-hyperlora/mpi --bins
target=${CARGO_TARGET_DIR:-target}/${profile/dev/debug}
[ -x "$target/hyperlora" ] || target=$(cargo metadata --format-version 1 --no-deps | grep -oP '"target_directory":"\K[^"]*')/${profile/dev/debug}

measured=$(mktemp)
trap 'rm -f "$measured"' EXIT
# Four ranks on two cores would measure how the cores are shared: without blocking waits, and one thread each.
export RAYON_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
for ranks in 1 2 4; do
  mpirun -n "$ranks" --bind-to none --oversubscribe --mca mpi_yield_when_idle 1 "$target/scaling" | tee -a "$measured"
done
python3 ci/bench/scaling.py "$measured" "$target/hyperlora" "${1:-experiments/sdxl/id-clip.yaml}"
