#!/usr/bin/env bash
# Starts trainer/main.py with torchrun, with the variables that let ranks save a checkpoint when they are stopped.
# One machine, one rank per GPU (or RANKS ranks):
#
#   launch/torchrun.sh --config cifar10
#   RANKS=2 launch/torchrun.sh --config digits
#
# Several machines: run the same line on each of them at about the same time. HEAD is the machine of the rendezvous.
#
#   NODES=4 HEAD=first-machine launch/torchrun.sh --config cifar10
#
# NODES=1:4 continues with fewer machines if some are lost, and accepts machines that join later (train.virtual_ranks
# keeps the curve bit-identical). RESTARTS is the number of times that failed ranks are restarted, by default 3.
set -euo pipefail

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
python=${SAMECURVE_PYTHON:-$(type -P python || type -P python3 || true)}
if [ -z "$python" ] || ! type -P -- "$python" >/dev/null; then
    echo "samecurve: no Python on $HOSTNAME (${python:-neither python nor python3 in PATH}); set SAMECURVE_PYTHON to the" \
        "path of one" >&2
    exit 2
fi
ranks=${RANKS:-gpu}
rendezvous=() # without options launch/elastic.py lets the ranks meet on this machine
if [ "$ranks" = gpu ] && ! compgen -G '/proc/driver/nvidia/gpus/*' >/dev/null; then
    ranks=1
fi
if [ -n "${HEAD:-}" ]; then
    rendezvous=(--nnodes="${NODES:-1}" --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}"
        --rdzv-id="${RUN_ID:-samecurve}" --rdzv-conf="last_call_timeout=${LAST_CALL_SECONDS:-5}")
    # torchrun does not tell a machine that joins later about the store that the first machines share (torch 2.15): it
    # waits for a minute, then both end. Without sharing, the ranks of each rendezvous round get their own store.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
signals=
for name in SIGTERM SIGINT SIGHUP SIGQUIT SIGUSR1 SIGUSR2; do
    # torchrun would handle also what this script was started to ignore, such as SIGHUP by nohup.
    [[ $(trap -p "$name") == "trap -- '' $name" ]] || signals+=${signals:+,}$name
done
export PET_SIGNALS_TO_HANDLE=$signals
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
if [ -z "${SAMECURVE_OUTCOME:-}" ]; then # ranks record an error here that a restart would only repeat
    # The ranks remove the folder. After a kill the next start removes it, because the folder names its owner.
    new_folder='import os, sys; sys.path.insert(0, sys.argv[1]); from trainer.process import temporary
print(temporary.new_folder(os.getppid()))'
    folder=$("$python" -c "$new_folder" "$here/..")
    export SAMECURVE_OUTCOME=$folder/outcome.json PET_LOG_DIR=${PET_LOG_DIR:-$folder}
fi
exec "$python" "$here/elastic.py" ${rendezvous[@]+"${rendezvous[@]}"} --nproc-per-node="$ranks" \
    --max-restarts="${RESTARTS:-3}" "$here/../trainer/main.py" "$@"
