#!/usr/bin/env bash
# torchrun by hand, with what a run needs to save when it is stopped. One machine, all its GPUs (or RANKS processes):
#
#   launch/torchrun.sh --config cifar10
#   RANKS=2 launch/torchrun.sh --config digits
#
# Several machines: the same line on each, at about the same time. The first named machine is where they meet.
#
#   NODES=4 HEAD=first-machine launch/torchrun.sh --config cifar10
#
# NODES=1:4 goes on with fewer machines when some are lost, and takes more in when they come (train.virtual_ranks keeps
# the curve the same, bit for bit). RESTARTS: how often ranks are started again; default 3.
set -euo pipefail

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
python=${SAMECURVE_PYTHON:-$(command -v python || command -v python3)}
ranks=${RANKS:-gpu}
if [ "$ranks" = gpu ] && ! compgen -G '/proc/driver/nvidia/gpus/*' >/dev/null; then
    ranks=1
fi
if [ -n "${HEAD:-}" ]; then
    meeting=(--nnodes="${NODES:-1}" --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}"
        --rdzv-id="${RUN_ID:-samecurve}" --rdzv-conf="last_call_timeout=${LAST_CALL_SECONDS:-5}")
    # torchrun tells a machine that comes later nothing of the store that the first ones share (torch 2.15): it waits a
    # minute, then both end. So the ranks of each round get a store of their own.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
else
    meeting=(--standalone)
fi
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
if [ -z "${SAMECURVE_OUTCOME:-}" ]; then # where ranks leave that a mistake is not to be repeated
    SAMECURVE_OUTCOME=$(mktemp -d "${TMPDIR:-/tmp}/samecurve-XXXXXX")/outcome.json
    export SAMECURVE_OUTCOME
fi
exec "$python" -m torch.distributed.run "${meeting[@]}" --nproc-per-node="$ranks" \
    --max-restarts="${RESTARTS:-3}" "$here/../trainer/main.py" "$@"
