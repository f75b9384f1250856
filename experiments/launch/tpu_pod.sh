#!/bin/bash
# CIFAR-10 on a Cloud TPU slice of several hosts: one process a host. An example, to be copied and changed.
#
# What it does. `gcloud compute tpus tpu-vm ssh --worker=all` runs a command on every host of a slice; here it starts
# the same run on each, in the background. `--distributed.auto` lets JAX find out which is which: it asks the metadata
# server for the machine's `agent-worker-number` and `worker-network-endpoints`. Worker 0 coordinates, at port 8482 or
# $JAX_COORDINATOR_PORT. That takes libtpu and requests, both in jax[tpu]; in a container --net=host --privileged too.
# Where it is started on some of the hosts only, it waits for the others until --distributed.timeout, and fails.
#
# What to change. The variables below, here or in the environment. CHIPS is that of the slice: 32 for v5litepod-32, but
# 16 for v5p-32, whose number counts cores. SHARED is a directory that all hosts mount, here by NFS from Filestore
# (NFS=SERVER:/SHARE), writable by you, with OS Login enabled on the slice so that users have the same number
# everywhere. Not a bucket: checkpoints are renamed when they are whole. WORKDIR and DATA are under it. The batch size
# is that of all chips together, a multiple of their number along `data`. 256 is another training than the papers',
# whose batch is 64.
#
# How to submit, with a slice that exists; what follows `start` goes to the run:
#
#     gcloud compute tpus queued-resources create resflow --node-id=resflow --zone=ZONE \
#       --accelerator-type=v5litepod-32 --runtime-version=v2-alpha-tpuv5-lite --spot
#     experiments/launch/tpu_pod.sh setup              # NFS, Python, the repository; once, and again after a change
#     experiments/launch/tpu_pod.sh start --seed 1
#     experiments/launch/tpu_pod.sh follow             # the output of worker 0
#     experiments/launch/tpu_pod.sh status             # finished, running, or stopped
#     experiments/launch/tpu_pod.sh stop               # after its step, with a checkpoint
#
# Google calls the Cloud TPU API, which this uses, no longer under active development; on GKE see jobset.yaml.
#
# What happens on preemption. A machine that is shut down sends SIGTERM to what runs on it. The run finishes its step,
# or the validation that it is in, writes a checkpoint and ends with status 0, as a finished one does. Which of the two
# it was `status` tells by report.html, which a run writes last. A spot slice has half a minute for that at best:
# --save-every says how old the last checkpoint may be. Nothing starts again by itself. Delete the slice
# (gcloud compute tpus queued-resources delete resflow --zone=ZONE --force), create it anew, then `setup` and the same
# `start`: it goes on from the last checkpoint.

# shellcheck disable=SC2016 # what stands in single quotes is for the shell at the other end
set -euo pipefail

TPU=${TPU:-resflow}
ZONE=${ZONE:-us-central1-a}
CHIPS=${CHIPS:-32}
NFS=${NFS:-10.0.0.2:/share}
SHARED=${SHARED:-/mnt/resflow}
WORKDIR=${WORKDIR:-$SHARED/runs/cifar10}
DATA=${DATA:-$SHARED/tensorflow_datasets}
REPOSITORY=${REPOSITORY:-} # its URL, for `setup`

# on WORKER COMMAND: runs it there, or on all.
on() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

# quoted WORD...: the words for a shell at the other end.
quoted() {
  printf '%q ' "$@"
}

setup() {
  : "${REPOSITORY:?expected a URL as git clone takes it}"
  on all "set -e
    sudo apt-get -o DPkg::Lock::Timeout=600 update -q
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y -q nfs-common git python3-pip
    sudo mkdir -p $(quoted "$SHARED")
    mountpoint -q $(quoted "$SHARED") || sudo mount -t nfs $(quoted "$NFS" "$SHARED")
    [ -d resflow_jax ] || git clone $(quoted "$REPOSITORY") resflow_jax
    git -C resflow_jax pull --ff-only
    python3 -m pip install --user --quiet uv # which brings Python 3.12: the machines may have 3.10
    [ -d venv ] || .local/bin/uv venv --python 3.12 venv
    .local/bin/uv pip install --python venv/bin/python 'jax[tpu]' -e './resflow_jax[experiments]'"
}

start() {
  local run=(
    ../venv/bin/python -m experiments.density cifar10
    --distributed.auto
    --distributed.timeout 600
    --parallel jit
    --mesh.data "$CHIPS"
    --mesh.model 1
    --mesh.parameters replicated
    --batch-size 256
    --save-every 1000
    --data.dir "$DATA"
    --workdir "$WORKDIR"
    "$@"
  )
  on all 'if [ -e resflow.pid ] && kill -0 "$(cat resflow.pid)" 2>/dev/null; then
      echo already running
      exit 1
    fi'
  on 0 "mkdir -p $(quoted "$WORKDIR") && touch $(quoted "$WORKDIR/.started")"
  # Process 0 alone writes compiled programs, so the others find them only where they share a directory.
  on all "export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=$(quoted "$SHARED/compiled")
    cd resflow_jax || exit 1
    nohup $(quoted "${run[@]}") </dev/null >>../resflow.log 2>&1 &
    echo \$! >../resflow.pid"
}

stop() {
  on all 'kill -TERM "$(cat resflow.pid)"'
}

status() {
  on 0 "if [ -e resflow.pid ] && kill -0 \"\$(cat resflow.pid)\" 2>/dev/null; then
      echo running
    elif [ $(quoted "$WORKDIR/report.html") -nt $(quoted "$WORKDIR/.started") ]; then
      echo finished: $(quoted "$WORKDIR/report.html")
    else
      echo stopped before its end: start goes on from the last checkpoint
      [ ! -e resflow.log ] || tail -n 5 resflow.log
    fi"
}

follow() {
  on 0 "tail -n 50 -F resflow.log"
}

case ${1:-} in
  setup | stop | status | follow) "$1" ;;
  start) start "${@:2}" ;;
  *)
    echo "usage: $0 setup | start [FLAG...] | follow | status | stop" >&2
    exit 2
    ;;
esac
