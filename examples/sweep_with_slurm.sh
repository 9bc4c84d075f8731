#!/bin/bash
# A sweep whose points are divided between the jobs of a SLURM array, in a folder that all of them mount:
#
#   sbatch --array=1-16 examples/sweep_with_slurm.sh /shared/sweep
#   actscale-fast sweep --gather --out /shared/sweep            # when all have finished
#
# Without SLURM, the two variables stand for it, one job after the other or several at a time:
#
#   for i in 1 2; do SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_COUNT=2 examples/sweep_with_slurm.sh sweep; done
#
# `scancel` and the time limit send SIGTERM to what `srun` started, after which the step that was reached is kept; a job
# that is queued again goes on from there.
#SBATCH --requeue
#SBATCH --gres=gpu:1
set -euo pipefail
folder=${1:?"the folder of the sweep"}

${SLURM_JOB_ID:+srun} actscale-fast sweep --task country-capital --n-train 16 --n-test 8 --layers 20,25 \
    --path 2 --seeds 0-1 --steps 2 --batch-size 8 --at-once 1 \
    --out "$folder" --points "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
