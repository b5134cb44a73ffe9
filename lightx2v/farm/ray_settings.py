"""The environment variables that Ray reads when it is imported."""

import secrets

from ..config.environment import set_variables


def prepare(*, own: bool) -> None:
    """Call it before Ray is imported. `own`: the cluster is of this machine alone; only this program and its workers
    know its token, since Ray's ports are open to every program that reaches the machine."""
    variables = {
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a call after the loss of a cluster would start another one
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "1000000",  # Ray would end this process where the head is gone
    }
    set_variables(variables, replace=False)
    if own:
        set_variables({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
