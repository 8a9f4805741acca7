#!/usr/bin/env bash
# Slurm for real: a cluster of this one machine, made for the occasion, runs launch/slurm.sbatch on two tasks through everything
# that it is for: a signal to save, a rank killed, a requeue by Slurm itself. The weights must be, bit for bit, those of two
# ranks that nobody disturbed. Then it is given ranks that fail for good. Run on demand; it takes five minutes or so.
#
#   ./ci/slurm.sh [FOLDER]      state, logs and runs [a new folder in /tmp, removed at the end]
#
# HYPERLORA and DATA_PREP name programs that are built already (hyperlora with the feature mpi). Needs root, and Debian's
# slurm-wlm and munge, which it installs where it may; their own configuration and services stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
. ci/small_training.sh

[ "$(id -u)" = 0 ] || fail "slurmd starts jobs as their users and needs root" "run this as root, as in a container"
command -v slurmd >/dev/null || apt_install slurmd slurm-wlm munge
command -v mpirun >/dev/null || apt_install mpirun openmpi-bin libopenmpi-dev
for daemon in munged slurmctld slurmd; do
  PATH=$PATH:/usr/sbin command -v "$daemon" >/dev/null || fail "$daemon is missing" "apt-get install slurm-wlm munge"
done
PATH=$PATH:/usr/sbin

given=${1:-}
folder=${given:-$(mktemp -d /tmp/hyperlora-slurm.XXXXXX)}
mkdir -p "$folder"
state=$(realpath "$folder")
daemons=()
end() {
  local code=$?
  trap - EXIT INT TERM
  for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
    kill "${daemons[i]}" 2>/dev/null || continue
    # slurmctld writes its state once more before it ends.
    for _ in {1..100}; do kill -0 "${daemons[i]}" 2>/dev/null && sleep 0.1 || break; done
  done
  if [ "$code" = 0 ] && [ -z "$given" ]; then rm -rf "$state"; else echo "logs and runs: $state"; fi
  exit "$code"
}
trap end EXIT
trap 'exit 130' INT TERM
mkdir -p "$state"/{munge,control,node,log}

build_programs --features burn-hyperlora/mpi
make_training

say "two ranks that nobody disturbs"
export RAYON_NUM_THREADS=1
rm -rf "$state/undisturbed" "$state/run"
HYPERLORA=$program launch/local-mpi.sh 2 "$state/train.yaml" --out "$state/undisturbed" 2>&1 | grep finished

# --- The cluster. Munge vouches for who says what; one controller, one node.
say "a Slurm cluster of one machine"
port=${SLURM_TEST_PORT:-26817}
chmod 755 "$state" "$state/munge"
[ -e "$state/munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$state/munge/key")
cat >"$state/slurm.conf" <<EOF
ClusterName=hyperlora-test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its old credentials are void.
AuthInfo=socket=$state/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$state/control
SlurmdSpoolDir=$state/node
SlurmctldPidFile=$state/control/pid
SlurmdPidFile=$state/node/pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=60
MpiDefault=none
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
EOF
export SLURM_CONF=$state/slurm.conf
start() {
  local name=$1
  shift
  "$@" >"$state/log/$name" 2>&1 &
  daemons+=($!)
  disown $!
}
start munged munged --foreground --force --key-file="$state/munge/key" --socket="$state/munge/socket" \
  --pid-file="$state/munge/pid" --seed-file="$state/munge/seed" --log-file="$state/log/munged.log"
for _ in {1..50}; do [ -S "$state/munge/socket" ] && break || sleep 0.1; done
start slurmctld slurmctld -D -i
start slurmd slurmd -D
for _ in {1..150}; do
  sinfo -h -o %T 2>/dev/null | grep -q idle && break || sleep 0.2
done
sinfo -h -o '%n: %T, %c CPUs' || fail "the cluster did not come up" "see $state/log"

# --- The job, with launch/slurm.sbatch as it is; only the machine is another.
say "the job"
log=$state/job.log
: >"$log"
# One failure may come between two checkpoints; the job begins five times.
job=$(DEVICE=cpu HYPERLORA=$program MAX_FAILURES=1 sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 \
  --mem=0 --oversubscribe --output="$log" launch/slurm.sbatch "$state/train.yaml" --out "$state/run")

# await TEXT N: until the job's log says it for the N-th time.
await() {
  for _ in {1..600}; do
    [ "$(grep -c "$1" "$log")" -ge "$2" ] && return
    squeue -h -j "$job" -o %T 2>/dev/null | grep -q . || break
    sleep 0.2
  done
  tail -n 30 "$log" >&2
  fail "the job never said '$1'" "see $log and $state/log"
}
note() { echo "--- $(date +%T) $1" | tee -a "$log"; }

await 'base [0-9]*/5' 1
note "scancel --signal=TERM: the ranks are asked to stop"
scancel --signal=TERM "$job"
await 'the job is requeued' 1
await 'id_clip [0-9]*/5' 1
note "one rank is killed"
kill -KILL "$(pgrep -f "^$program train $state/train.yaml" | tail -n 1)"
await 'the job is requeued' 2
await 'id_embedding [0-9]*/10' 1
note "scontrol requeue: Slurm takes the machine back, as for a preemption"
scontrol requeue "$job"
await 'resuming from' 3
note "one rank is killed once more: there is a newer checkpoint than at the first time"
kill -KILL "$(pgrep -f "^$program train $state/train.yaml" | tail -n 1)"
await 'finished in life' 1
for _ in {1..100}; do squeue -h -j "$job" -t RUNNING,COMPLETING 2>/dev/null | grep -q . && sleep 0.2 || break; done
scontrol show job "$job" | grep -oE '(JobState|Restarts|ExitCode)=[^ ]*' | tr '\n' ' '
echo

say "the log"
grep -vE 'loss on the fixed set|^$' "$log"

same_weights "$state/run"

# --- Ranks that are lost again and again, and a rank that refuses while the others wait for it: stand-ins for the program.
# ends NAME CODES: a job of stand-ins must end with the exit codes of its lives, in order.
ends() {
  local found
  echo '#!/bin/bash' >"$state/$1"
  cat >>"$state/$1"
  chmod +x "$state/$1"
  : >"$state/$1.log"
  job=$(DEVICE=cpu HYPERLORA=$state/$1 MAX_FAILURES=1 sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 \
    --cpus-per-task=1 --mem=0 --oversubscribe --output="$state/$1.log" launch/slurm.sbatch "$state/train.yaml" --out "$state/none")
  for _ in {1..600}; do
    squeue -h -j "$job" 2>/dev/null | grep -q . || break
    sleep 0.2
  done
  found=$(grep -oE 'exit code [0-9]+[):]' "$state/$1.log" | grep -oE '[0-9]+' | tr '\n' ' ')
  [ "$found" = "$2 " ] || fail "the stand-in '$1' ended with '$found' instead of '$2'" "see $state/$1.log"
  grep 'exit code [0-9]*[):]' "$state/$1.log"
}
say "a rank is lost again and again: MAX_FAILURES=1"
ends lost '75 75' <<<'exit 75'
say "a rank refuses its input, the others wait for it and give up"
# shellcheck disable=SC2016
ends refused 2 <<<'[ "$SLURM_PROCID" = 1 ] && exit 2; trap "exit 75" TERM; sleep 60 & wait'
