#!/bin/bash
# One batch job is one Ray cluster and one run of the pipeline, whose options it takes; docs/deploy.md has an example.
# It is submitted from a checkout with a .venv, in a folder that the nodes share, as the home folder is.
#SBATCH --job-name=asc-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --exclusive
set -euo pipefail
export PATH=$PWD/.venv/bin:$PATH RAY_AUTH_MODE=token RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
ray get-auth-token --generate > /dev/null # into the home folder
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Starts Ray on every node, runs the command on the first one, and stops all Ray that the user has on these nodes, which
# is why the job has them for itself.
srun --cpu-bind=none ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    asc-ray pipeline --set cluster.address=auto "$@"
