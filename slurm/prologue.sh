# shellcheck shell=bash
# Sourced by train.sh, sweep.sh and doctor.sh, which set SAMECURVE_SCRIPTS to the folder of this file.
# Reads the site file and sets the array `samecurve`, the command that a script runs.

# In a checkout the scripts are in slurm/, after an installation in launch/scripts/.
case $SAMECURVE_SCRIPTS in
*/launch/scripts) project=${SAMECURVE_SCRIPTS%/launch/scripts} ;;
*) project=${SAMECURVE_SCRIPTS%/*} ;;
esac
export SAMECURVE_SCRIPTS SAMECURVE_HOME=${SAMECURVE_HOME:-$project}

site=${SAMECURVE_SITE:-$SAMECURVE_SCRIPTS/site.sh}
if [ -f "$site" ]; then
    set +eu # site files and the module command are rarely written for these options
    # shellcheck disable=SC1090
    source "$site"
    set -eu
fi
python=${SAMECURVE_PYTHON:-$(command -v python || command -v python3)}
# shellcheck disable=SC2034 # the scripts use it
samecurve=("$python" "$SAMECURVE_HOME/launch/main.py")
