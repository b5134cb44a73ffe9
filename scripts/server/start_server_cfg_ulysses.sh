#!/usr/bin/env bash
# As start_server.sh, on several GPUs.
source "$(dirname "${BASH_SOURCE[0]}")/../base/base.sh"

choose "${preset:-t2v_base}"
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "${nproc_per_node:-gpu}" \
    -m lightx2v.server "${what[@]}" --port 8000 "$@"
