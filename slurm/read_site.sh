# shellcheck shell=bash
# Sourced by prologue.sh in a job, and by samecurve on the login node. Defines read_site.

# Applies the variables, umask and limits that the site file $1 sets to this shell. Nothing else that the file does to
# its shell reaches this one: exit, cd, exec, traps, options, functions. Prints one line and returns 2 if the file
# cannot be used. Stays able to handle signals while the file runs.
read_site() {
    local site=$1 problem state='' part pipe reader is_gone code
    [[ $site == /* ]] || site=$PWD/$site # bash looks for a bare name in PATH
    if [ -L "$site" ] && [ ! -e "$site" ]; then
        echo "samecurve: site file $site: no such file, but a link to $(readlink -- "$site"); correct the link, or remove it" >&2
        return 2
    fi
    if [ ! -f "$site" ] || [ ! -r "$site" ]; then
        echo "samecurve: site file $site: no such file, or not readable; correct SAMECURVE_SITE, or unset it" >&2
        return 2
    fi
    if grep -q $'\r$' -- "$site"; then
        echo "samecurve: site file $site has Windows line ends, which bash reads as part of each word; convert it with dos2unix" >&2
        return 2
    fi
    if ! problem=$(bash -n -- "$site" 2>&1); then
        problem=${problem#"$site: "}
        echo "samecurve: site file $site is not valid bash (${problem%%$'\n'*}); correct that line" >&2
        return 2
    fi
    exec {pipe}< <( # without BASH_ENV, whose output would be read as code; site_state.sh sources that file
        export samecurve_bash_env=${BASH_ENV:-}
        unset BASH_ENV
        exec bash "${BASH_SOURCE[0]%/*}/site_state.sh" "$site"
    )
    reader=$!
    while :; do # bash runs a trap between two commands, so no command may wait long
        is_gone=0 code=0
        kill -0 "$reader" 2>/dev/null || is_gone=1 # a subshell in the background may hold the pipe open all the same
        IFS= read -r -d '' -t 1 part <&"$pipe" || code=$?
        state+=$part
        [ "$code" -gt 128 ] && [ "$is_gone" = 0 ] || break
    done
    exec {pipe}<&-
    code=0
    wait "$reader" || code=$?
    if [[ $state != *$'# begin\n'*$'\n# end\n' ]]; then
        echo "samecurve: site file $site ended its shell (exit code $code) before its last line; remove exit and exec from it" >&2
        return 2
    fi
    eval "${state#*$'# begin\n'}"
}
