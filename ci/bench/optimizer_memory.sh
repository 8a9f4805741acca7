#!/usr/bin/env bash
# Memory of the optimiser's state on each of 1, 2 and 4 MPI ranks of this machine, beside what `hyperlora plan` says.
#
#   ./ci/bench/optimizer_memory.sh [SITES]      [8 attentions of width 1280]
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/setup.sh

profile=${PROFILE:-release}
command -v mpirun >/dev/null || apt_install mpirun openmpi-bin libopenmpi-dev
cargo build --quiet --profile "$profile" -p hyperlora-tools --features mpi --bin optimizer_memory
target=$(cargo metadata --format-version 1 --no-deps | grep -oP '"target_directory":"\K[^"]*')/${profile/dev/debug}

export RAYON_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
for ranks in 1 2 4; do
  mpirun -n "$ranks" --bind-to none --oversubscribe --mca mpi_yield_when_idle 1 "$target/optimizer_memory" "${1:-8}"
done
