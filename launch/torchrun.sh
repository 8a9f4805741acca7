#!/usr/bin/env bash
# Runs a training on GPUs with torchrun, one rank per GPU. Call it on every machine. If a rank fails, torchrun stops the others and
# starts all of them again; they resume from the last whole checkpoint.
#
#   HYPERLORA_TOKEN=SECRET NNODES=2 MASTER=node-0:29500 ./launch/torchrun.sh CONFIG [further arguments of hyperlora train]
#
# torchrun comes with PyTorch (pip install torch); nothing else of PyTorch is used.
#
#   NNODES          machines, or MIN:MAX to continue with fewer or more (elastic)                           [1]
#   NPROC_PER_NODE  GPUs of this machine                        [those of CUDA_VISIBLE_DEVICES, else what nvidia-smi lists]
#   MASTER          HOST:PORT of the first machine; its ports PORT and the one that torchrun gives the ranks,
#                   with its successor, must be reachable from the others; one machine takes a free port      [none]
#   HYPERLORA_TOKEN the secret that proves to the ranks that they belong together, the same on all machines; one machine
#                   needs none                                                              [none]
#   RUN_ID          with MASTER: the same on all machines, different for runs at the same time          [hyperlora]
#   MAX_RESTARTS    how often torchrun starts again                                                             [20]
#   GRACE_S         how long the ranks may take to save after SIGTERM, seconds                           [110]
#   DEVICE          cuda: every rank takes the GPU of its LOCAL_RANK                                    [cuda]
#   HYPERLORA       the program, built with --features burn-hyperlora/cuda            [target/release/hyperlora]
#
# The world size must divide data.streams (48) and global_batch / micro_batch: with 8 GPUs each, 48 streams allow 1, 2, 3 or 6
# machines. With any other number every rank says so and ends with exit code 2.
#
# Do not use --restart: torchrun repeats it whenever it starts the ranks again. Move the old run folder aside, or give another --out.
#
# NCCL finds InfiniBand and NVLink by itself; NCCL_DEBUG=INFO shows its choice. On machines with several networks set
# NCCL_SOCKET_IFNAME (such as eth0), with InfiniBand NCCL_IB_HCA (such as mlx5).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh

config=${1:-}
[ -n "$config" ] || fail "no configuration" "./launch/torchrun.sh experiments/sdxl/id-clip.yaml --out runs/id-clip"
shift
program=${HYPERLORA:-${CARGO_TARGET_DIR:-target}/release/hyperlora}
[ -x "$program" ] || fail "$program is missing" "cargo build --release --features burn-hyperlora/cuda"
command -v "${TORCHRUN:=torchrun}" >/dev/null || fail "torchrun is missing" "pip install torch, or TORCHRUN=/path/to/torchrun"

nodes=${NNODES:-1}
if [ "$nodes" != 1 ]; then
  [ -n "${MASTER:-}" ] || fail "MASTER is not set, and there are several machines" "MASTER=HOST:29500, the first machine's name"
  [ -n "${HYPERLORA_TOKEN:-}" ] || fail "HYPERLORA_TOKEN is not set, and there are several machines" \
    "export the same one on all of them, such as openssl rand -hex 16 makes"
fi
# The program refuses it too, but torchrun would try again and again.
for argument in "$@"; do
  [ "$argument" != --restart ] || fail "--restart under torchrun would begin anew at every start" \
    "move the run folder aside by hand, or give another one with --out"
done

if [ -z "${NPROC_PER_NODE:-}" ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true)
    told="CUDA_VISIBLE_DEVICES names"
  else
    command -v nvidia-smi >/dev/null || fail "nvidia-smi is missing, so nobody says how many GPUs there are" \
      "install the NVIDIA driver, or set NPROC_PER_NODE; for CPUs use launch/local-mpi.sh"
    # The partitions of a GPU (MIG) are listed below it.
    gpus=$(nvidia-smi --list-gpus | grep -c '^GPU ' || true)
    told="nvidia-smi lists"
  fi
  [ "$gpus" -gt 0 ] || fail "$told no GPU" "set NPROC_PER_NODE; for CPUs use launch/local-mpi.sh"
  NPROC_PER_NODE=$gpus
fi

options=(--no-python --nnodes "$nodes" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "${MAX_RESTARTS:-20}")
if [ -n "${MASTER:-}" ]; then
  options+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "${RUN_ID:-hyperlora}")
else
  # Uses a free port and its own id, so that runs beside each other on one machine do not meet.
  options+=(--standalone)
fi
# PyTorch before about 2.10 gives its processes 30 s after SIGTERM and has no option for it.
if "$TORCHRUN" --help | grep -q -- --shutdown-timeout; then
  options+=(--shutdown-timeout "${GRACE_S:-110}")
fi
exec "$TORCHRUN" "${options[@]}" "$program" train "$config" --device "${DEVICE:-cuda}" "$@"
