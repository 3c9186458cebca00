#!/usr/bin/env bash
# Trains under Slurm, one task per GPU; further arguments go to tools/train.py:
#
#   GPUS=16 GPUS_PER_NODE=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG [--work-dir DIR ...]
#
# CPUS_PER_TASK (default 5); SRUN_ARGS: further options of srun, such as "--time=3-0 --qos=high".
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
partition=$1 job_name=$2 config=$3
shift 3
gpus=${GPUS:-8} gpus_per_node=${GPUS_PER_NODE:-8}
read -r -a srun_args <<<"${SRUN_ARGS:-}"
exec srun --partition="$partition" --job-name="$job_name" --gres="gpu:$gpus_per_node" \
  --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
  --kill-on-bad-exit=1 ${srun_args[@]+"${srun_args[@]}"} \
  python -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"
