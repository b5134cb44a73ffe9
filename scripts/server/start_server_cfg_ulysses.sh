#!/usr/bin/env bash
# As start_server.sh, on several GPUs. If one process fails all end and start again, and the queue goes on.
source "$(dirname "${BASH_SOURCE[0]}")/../base/base.sh"

choose "${preset:-t2v_base}"
exec "$python" -m torch.distributed.run --standalone --max-restarts 20 --nproc_per_node "${nproc_per_node:-gpu}" \
    -m lightx2v.server "${what[@]}" --port 8000 "$@"
