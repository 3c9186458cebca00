#!/usr/bin/env bash
# Evaluates under Slurm, one task per GPU; further arguments go to tools/test.py:
#
#   GPUS=8 tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [--out FILE.pkl ...]
#
# GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS as in tools/slurm_train.sh.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
partition=$1 job_name=$2 config=$3 checkpoint=$4
shift 4
gpus=${GPUS:-8} gpus_per_node=${GPUS_PER_NODE:-8}
read -r -a srun_args <<<"${SRUN_ARGS:-}"
exec srun --partition="$partition" --job-name="$job_name" --gres="gpu:$gpus_per_node" \
  --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
  --kill-on-bad-exit=1 ${srun_args[@]+"${srun_args[@]}"} \
  python -u "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher slurm "$@"
