#!/usr/bin/env bash
# Trains on several processes of one machine or more (torchrun); further arguments go to
# tools/train.py:
#
#   tools/dist_train.sh CONFIG PROCESSES [--work-dir DIR ...]
#
# Several machines: run it on each with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR, MASTER_PORT set.
# SIGTERM, SIGUSR1 or Ctrl-C: the run saves a checkpoint and this script ends with the exit code 75.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
MMCONV2FORMER_COMMAND=$(printf '%q ' "$0" "$@")
MMCONV2FORMER_COMMAND=${MMCONV2FORMER_COMMAND% }
MMCONV2FORMER_MESSAGE_FILE=$(mktemp)
# torchrun kills processes that have not ended by then; older torch waits 30 s.
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
export MMCONV2FORMER_COMMAND MMCONV2FORMER_MESSAGE_FILE TORCH_ELASTIC_SHUTDOWN_TIMEOUT
trap 'rm -f "$MMCONV2FORMER_MESSAGE_FILE"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # as torchrun, which writes a note about it
config=$1 processes=$2
shift 2
python -m torch.distributed.run --nproc_per_node="$processes" \
  --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" \
  "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@" &
torchrun=$!
received=0
# torchrun hands SIGTERM and Ctrl-C, which it receives itself, on to its processes. They have sessions
# of their own. It would end at SIGUSR1, and at a second signal.
# shellcheck disable=SC2329  # the traps call it
hand_on() {
  received=$((received + 1))
  if [ "$received" -gt 1 ]; then
    pkill -TERM -P "$torchrun"
  elif [ "$1" != INT ]; then
    kill -TERM "$torchrun"
  fi
}
trap 'hand_on TERM' TERM USR1
trap 'hand_on INT' INT
code=0
wait "$torchrun" || code=$?
while kill -0 "$torchrun" 2>/dev/null; do  # a signal ends `wait`
  code=0
  wait "$torchrun" || code=$?
done
if [ -s "$MMCONV2FORMER_MESSAGE_FILE" ]; then  # torchrun has its own exit code
  cat "$MMCONV2FORMER_MESSAGE_FILE" >&2
  code=75
fi
exit "$code"
