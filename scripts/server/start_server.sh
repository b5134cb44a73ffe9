#!/usr/bin/env bash
# Serves Wan2.2-T2V-A14B on http://127.0.0.1:8000. For another model: preset=i2v_base, or model_path=… config_json=….
# For others on the network: LIGHTX2V_API_KEY=… bash start_server.sh --host 0.0.0.0
source "$(dirname "${BASH_SOURCE[0]}")/../base/base.sh"

choose "${preset:-t2v_base}"
exec "$python" -m lightx2v.server "${what[@]}" --port 8000 "$@"
