#!/usr/bin/env bash
# Trains under Slurm, one task per GPU; further arguments go to tools/train.py:
#
#   GPUS=16 GPUS_PER_NODE=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG [--work-dir DIR ...]
#
# CPUS_PER_TASK (default 5); SRUN_ARGS: further options of srun, such as "--time=3-0 --qos=high".
# SIGNAL_SECONDS (default 120) before its time is up, the run saves a checkpoint and ends with the
# exit code 75. With REQUEUE=1, a job of sbatch is then queued again, and resumes.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
MMCONV2FORMER_COMMAND=$(printf '%q ' "$0" "$@")
export MMCONV2FORMER_COMMAND=${MMCONV2FORMER_COMMAND% }
partition=$1 job_name=$2 config=$3
shift 3
gpus=${GPUS:-8} gpus_per_node=${GPUS_PER_NODE:-8}
read -r -a srun_args <<<"${SRUN_ARGS:-}"
[ "${REQUEUE:-0}" = 0 ] || [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- "$@" --resume
trap : TERM USR1  # srun hands them on to its tasks; this script has to see how they end
code=0
srun --partition="$partition" --job-name="$job_name" --gres="gpu:$gpus_per_node" \
  --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
  --kill-on-bad-exit=1 --signal="USR1@${SIGNAL_SECONDS:-120}" \
  ${srun_args[@]+"${srun_args[@]}"} \
  python -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@" || code=$?
if [ "$code" = 75 ] && [ "${REQUEUE:-0}" != 0 ]; then
  scontrol requeue "${SLURM_JOB_ID:?REQUEUE=1 needs a job of sbatch}"
fi
exit "$code"
