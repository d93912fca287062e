#!/usr/bin/env bash
# Runs a site file in this shell of its own and writes shell code to stdout that repeats what the file leaves behind:
# exported variables, removed variables, umask and limits. The output of the site file goes to stderr. The code stands
# between the lines `# begin` and `# end`, with a zero byte at its end; they are missing when the site file ends its
# shell by exit or exec. read_site.sh calls this script, and gives it BASH_ENV as samecurve_bash_env.
#
#   bash site_state.sh FILE
: "${1:?expected the path of a site file}"
samecurve_site=$1
[ -z "${samecurve_bash_env:-}" ] || export BASH_ENV=$samecurve_bash_env
samecurve_before=$(builtin compgen -e)
exec 19>&1 1>&2 </dev/null
if [ -r "${BASH_ENV:-}" ]; then # it may define `module`
    # shellcheck disable=SC1090
    source "$BASH_ENV" 19>&-
fi
trap 'printf "samecurve: note: %s: line %s: failed with exit code %s: %s\n" \
    "${BASH_SOURCE[0]}" "$LINENO" "$?" "$BASH_COMMAND" >&2' ERR
# A program that the site file leaves in the background must not hold the pipe to our caller open.
# shellcheck disable=SC1090
source "$samecurve_site" 19>&-

{ builtin set +eufvx; } 2>/dev/null
trap - ERR DEBUG
IFS=$' \t\n'
samecurve_is_own() { # the shell's own variables, which are read-only or describe this shell
    case $1 in
    _ | PWD | OLDPWD | SHLVL | SHELLOPTS | BASHOPTS | UID | EUID | PPID | BASHPID | samecurve_*) ;;
    BASH_ARGC | BASH_ARGV | BASH_ARGV0 | BASH_VERSINFO | BASH_VERSION | BASH_LINENO | BASH_SOURCE | BASH_COMMAND) ;;
    BASH_SUBSHELL | BASH_EXECUTION_STRING | BASH_CMDS | BASH_ALIASES | BASH_REMATCH | BASH_XTRACEFD) ;;
    *) return 1 ;;
    esac
}
for samecurve_name in "${!SAMECURVE_@}"; do # a site file may set these without `export`
    builtin export "${samecurve_name?}"
done
samecurve_after=$(builtin compgen -e)
{
    builtin printf '# begin\n'
    for samecurve_name in $samecurve_before; do
        samecurve_is_own "$samecurve_name" || [[ $'\n'$samecurve_after$'\n' == *$'\n'"$samecurve_name"$'\n'* ]] ||
            builtin printf 'unset %s\n' "$samecurve_name"
    done
    for samecurve_name in $samecurve_after; do
        samecurve_is_own "$samecurve_name" || builtin printf 'export %s=%q\n' "$samecurve_name" "${!samecurve_name}"
    done
    builtin printf 'umask %s\n' "$(builtin umask)"
    for samecurve_name in c d f l m n s t u v; do
        # shellcheck disable=SC2016 # the caller's shell compares its own limit
        samecurve_limit=$(builtin ulimit -S"$samecurve_name" 2>/dev/null) &&
            builtin printf '[ "$(ulimit -S%s)" = %s ] || ulimit -S%s %s\n' \
                "$samecurve_name" "$samecurve_limit" "$samecurve_name" "$samecurve_limit"
    done
    builtin printf '# end\n\0'
} >&19
