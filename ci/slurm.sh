#!/usr/bin/env bash
# Slurm for real: a cluster of this one machine, made for the occasion, runs launch/slurm.sbatch on two tasks through everything
# that it is for: a signal to save, a rank killed, a requeue by Slurm itself. The weights must be, bit for bit, those of two
# ranks that nobody disturbed. Run on demand; it takes three minutes or so.
#
#   ./ci/slurm.sh [FOLDER]      state, logs and runs [a new folder in /tmp, removed at the end]
#
# HYPERLORA and DATA_PREP name programs that are built already (hyperlora with the feature mpi). Needs root, and Debian's
# slurm-wlm and munge, which it installs where it may; their own configuration and services stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/setup.sh

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
mkdir -p "$state"/{munge,control,node,log,photos/orl}

# --- Programs and a small training: 4 people, 20 steps of 8 samples.
target=${CARGO_TARGET_DIR:-target}
if [ -z "${HYPERLORA:-}" ]; then
  say "build"
  cargo build -p data-prep -p burn-hyperlora --features burn-hyperlora/mpi --bins
fi
program=$(realpath "${HYPERLORA:-$target/debug/hyperlora}")
prepare=$(realpath "${DATA_PREP:-$target/debug/data-prep}")
ci/assets.sh

say "data"
quickstart=$PWD/experiments/quickstart
photos=${HYPERLORA_CACHE:-$HOME/.cache/hyperlora}/photos/orl
cp -r "$photos"/s0[1-4] "$state/photos/orl/"
grep -E '^key|^orl/s0[1-4]/' "$quickstart/split.csv" >"$state/split.csv"
sed "s|root: .*|root: $state/photos|" "$quickstart/data.yaml" >"$state/data.yaml"
[ -e "$state/shards/manifest.json" ] || "$prepare" build "$state/data.yaml" --out "$state/shards" --quiet
sed -e "s|path: base|path: $quickstart/base|; s|shards: .*|shards: $state/shards|; /^  samples:/d; /^eval:/,\$d" \
  -e 's/micro_batch: 8/micro_batch: 2/; s/global_batch: 16/global_batch: 8/; s/every: 50/every: 4/; s/triples: 256/triples: 16/' \
  -e 's/steps: 60/steps: 5/; s/steps: 400/steps: 10/; s/warmup_steps: [0-9]*/warmup_steps: 2/' \
  "$quickstart/train.yaml" >"$state/train.yaml"

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
job=$(DEVICE=cpu HYPERLORA=$program sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 \
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
await 'finished in life' 1
for _ in {1..100}; do squeue -h -j "$job" -t RUNNING,COMPLETING 2>/dev/null | grep -q . && sleep 0.2 || break; done
scontrol show job "$job" | grep -oE '(JobState|Restarts|ExitCode)=[^ ]*' | tr '\n' ' '
echo

say "the log"
grep -vE 'loss on the fixed set|^$' "$log"

say "the weights"
last=checkpoints/step-00000020
for file in $(cd "$state/undisturbed/$last" && find . -name '*.safetensors' | sort); do
  cmp "$state/undisturbed/$last/$file" "$state/run/$last/$file" || fail "$file differs" "see $state"
  echo "$file: the same, bit for bit"
done
