# shellcheck shell=bash
# Sourced by train.sh, sweep.sh and doctor.sh, which set SAMECURVE_SCRIPTS to the folder of this file.
# Reads the site file, finds Python and sets the array `samecurve`, the command that a script runs.

# In a checkout the scripts are in slurm/, after an installation in launch/scripts/.
case $SAMECURVE_SCRIPTS in
*/launch/scripts) project=${SAMECURVE_SCRIPTS%/launch/scripts} ;;
*) project=${SAMECURVE_SCRIPTS%/*} ;;
esac
export SAMECURVE_SCRIPTS SAMECURVE_HOME=${SAMECURVE_HOME:-$project}
# shellcheck source=slurm/read_site.sh
source "$SAMECURVE_SCRIPTS/read_site.sh"

site=${SAMECURVE_SITE:-}
if [ -z "$site" ] && { [ -e "$SAMECURVE_SCRIPTS/site.sh" ] || [ -L "$SAMECURVE_SCRIPTS/site.sh" ]; }; then
    site=$SAMECURVE_SCRIPTS/site.sh
fi
if [ -n "$site" ]; then
    trap 'echo "samecurve: SLURM ends this job while site file $site runs, $SECONDS s after the start" >&2; exit 143' TERM
    read_site "$site" || exit 2
    trap - TERM
    if [ -n "${samecurve_signal:-}" ]; then
        echo "samecurve: SLURM's warning before the time limit came while site file $site was running, which took" \
            "$SECONDS s; request more --time, or a later warning by --signal=B:USR1@60" >&2
    fi
fi
python=${SAMECURVE_PYTHON:-$(type -P python || type -P python3 || true)}
if [ -z "$python" ] || ! type -P -- "$python" >/dev/null; then
    echo "samecurve: no Python on $HOSTNAME (${python:-neither python nor python3 in PATH}); load it in slurm/site.sh," \
        "or set SAMECURVE_PYTHON to the path of one" >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    echo "samecurve: $python on $HOSTNAME does not run, or is older than Python 3.11; load another one in slurm/site.sh," \
        "or set SAMECURVE_PYTHON to its path" >&2
    exit 2
fi
# shellcheck disable=SC2034 # the scripts use it
samecurve=("$python" "$SAMECURVE_HOME/launch/main.py")
trap '' USR1 # by default it would end Python, until that handles signals; the ranks know the job's end anyway
if [ -n "${samecurve_signal:-}" ]; then
    export SAMECURVE_SIGNAL=$samecurve_signal # launch/slurm/batch.py acts on it
fi
