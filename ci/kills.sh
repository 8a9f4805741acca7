#!/usr/bin/env bash
# Kills a short training at many random moments, as one process and as two MPI ranks: every run that is started again and again
# with the same command must end with the bits of an undisturbed one. On demand; the routine tests kill a few times.
#
#   ./ci/kills.sh [KILLS]      [120 of each]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh

check_tools
command -v mpirun >/dev/null && command -v mpicc >/dev/null || apt_install mpicc libopenmpi-dev openmpi-bin libclang-dev
export HYPERLORA_KILLS=${1:-120}
exec cargo test -p burn-hyperlora --features mpi --test training --test ranks killed_at_random_moments -- --nocapture
