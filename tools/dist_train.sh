#!/usr/bin/env bash
# Trains on several processes of one machine or more (torchrun); further arguments go to
# tools/train.py:
#
#   tools/dist_train.sh CONFIG PROCESSES [--work-dir DIR ...]
#
# Several machines: run it on each with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR, MASTER_PORT set.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
config=$1 processes=$2
shift 2
exec python -m torch.distributed.run --nproc_per_node="$processes" \
  --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" \
  "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
