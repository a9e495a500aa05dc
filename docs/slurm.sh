#!/usr/bin/env bash
#SBATCH --job-name=satlib
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
# A sweep on the nodes of one Slurm job: `sbatch docs/slurm.sh gpu`, from the checkout, which all nodes see.
# After a preemption or a time limit, Slurm starts it again, or you do: finished runs are found, and a training
# that was cut off goes on from its last whole epoch.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
profile="${1:-gpu}"
export SATLIB_DATA="${SATLIB_DATA:-$PWD/data}" # may be another folder on each node
source .venv/bin/activate

head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port=6379
cores=(--num-cpus "$SLURM_CPUS_PER_TASK" --disable-usage-stats)
srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port="$port" "${cores[@]}" --block &
sleep 20 # until the head answers
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes="$((SLURM_JOB_NUM_NODES - 1))" --ntasks="$((SLURM_JOB_NUM_NODES - 1))" --exclude="$head" \
        ray start --address="$head:$port" "${cores[@]}" --block &
    sleep 20
fi

trap 'kill -TERM "$sweep"; wait "$sweep" || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' TERM
python -m satlib sweep --profile "$profile" --on ray --address "$head:$port" --cpus-per-run 2 &
sweep=$!
wait "$sweep"
