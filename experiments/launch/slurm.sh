#!/bin/bash
# CIFAR-10 on several GPU nodes under Slurm: one process a GPU. An example, to be copied and changed.
#
# What it does. srun starts a process for every GPU, and `--distributed.auto` lets JAX find out which is which, from
# SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_PROCID and SLURM_LOCALID. The list of nodes is set by srun,
# in the tasks alone: started without srun, the run would not be recognised. Process 0 runs on the first node of that
# list, whose name the others must be able to resolve, and listens at port 61440 + SLURM_JOB_ID % 4096, or
# $JAX_COORDINATOR_PORT.
#
# Why a process a GPU. JAX takes that for granted under Slurm: of the GPUs that a task sees it gives it the one with
# the number SLURM_LOCALID. So each task must see all GPUs of its node: --gpus-per-node and --gpu-bind=none. Not
# --gpus-per-task, which hides all but one, as number 0. For a process a node set --ntasks-per-node=1 and
# export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7; without the latter seven of eight GPUs would stay idle. With
# --distributed.coordinator, --distributed.num-processes and --distributed.process-id in place of auto a process has
# all GPUs that it sees.
#
# What to change. The #SBATCH lines, the partition and the account; WORKDIR and DATA, both on a file system that all
# nodes share; how Python is found. The batch size is that of all GPUs together, a multiple of their number along
# `data`. 256 is another training than the papers', whose batch is 64.
#
# How to submit, from the repository's root; what follows the script goes to the run:
#
#     sbatch experiments/launch/slurm.sh
#     WORKDIR=/mnt/shared/runs/other sbatch experiments/launch/slurm.sh --seed 1
#
# What happens on preemption. 300 s before the time limit (up to a minute earlier), and when the job is preempted with
# a grace time, Slurm sends SIGTERM to the tasks and not to this script. The run finishes its step, or the validation
# that it is in, writes a checkpoint and ends with status 0. As a finished run ends with status 0 as well, the script
# looks for report.html, which a run writes last: if there is none newer than this start, the job goes back into the
# queue under its old number and goes on from the checkpoint. A signal while the run is set up counts for its first step;
# one in its closing report is ignored, and the report goes on. So it does too if SIGTERM killed the run (status 143), as
# it may before the processes have met. Other errors are not repeated.
# A preemption without grace time, and a lost node, leave the last checkpoint that there is: --save-every says how old
# it may be. Slurm itself requeues then, if it is configured to.
#
# How to stop it for good. scancel JOB ends it at once, with a checkpoint or without. With one:
#
#     scontrol update JobId=JOB Requeue=0 && scancel --signal=TERM JOB
#
#SBATCH --job-name=resflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail
: "${SLURM_JOB_ID:?expected to be run by sbatch}"

WORKDIR=${WORKDIR:-/mnt/shared/runs/cifar10}
DATA=${DATA:-/mnt/shared/tensorflow_datasets}
devices=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))

# module load ...; source /mnt/shared/venv/bin/activate
export PYTHONUNBUFFERED=1
# Process 0 alone writes compiled programs, so the others find them only where they share a directory.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$WORKDIR")/compiled}
# With a proxy the processes may not find each other.
unset http_proxy https_proxy all_proxy grpc_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY

mkdir -p "$WORKDIR"
touch "$WORKDIR/.started"

status=0
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --gpu-bind=none --distribution=block --kill-on-bad-exit=1 --label \
  python -m experiments.density cifar10 \
  --distributed.auto \
  --distributed.timeout 600 \
  --parallel jit \
  --mesh.data "$devices" \
  --mesh.model 1 \
  --mesh.parameters replicated \
  --batch-size 256 \
  --save-every 1000 \
  --data.dir "$DATA" \
  --workdir "$WORKDIR" \
  "$@" || status=$?

if [[ $status -ne 0 && $status -ne 143 ]]; then
  echo "the run failed with status $status; not requeued"
  exit "$status"
fi
if [[ $status -eq 0 && $WORKDIR/report.html -nt $WORKDIR/.started ]]; then
  echo "finished: $WORKDIR/report.html"
  exit 0
fi
# "Incomplete" leaves a job alone that was cancelled meanwhile. What follows is not reached if the job is requeued.
echo "stopped before its end; back into the queue"
scontrol requeue Incomplete "$SLURM_JOB_ID" || echo "not requeued; the same command goes on"
