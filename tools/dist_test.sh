#!/usr/bin/env bash
# Evaluates on several processes of this machine (torchrun); further arguments go to tools/test.py:
#
#   tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [--out FILE.pkl ...]
#
# Several machines: see tools/dist_train.sh.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # as torchrun, which writes a note about it
config=$1 checkpoint=$2 processes=$3
shift 3
exec python -m torch.distributed.run --nproc_per_node="$processes" \
  --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" \
  "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
