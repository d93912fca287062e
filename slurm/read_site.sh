# shellcheck shell=bash
# Sourced by prologue.sh in a job, and by samecurve on the login node. Defines read_site.

# Applies the variables, umask and limits that the site file $1 sets to this shell. Nothing else that the file does to
# its shell reaches this one: exit, cd, exec, traps, options, functions. Prints one line and returns 2 if the file
# cannot be used. Stays able to handle signals while the file runs.
read_site() {
    local site=$1 problem state='' part pipe reader code
    [[ $site == /* ]] || site=$PWD/$site # bash looks for a bare name in PATH
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
    exec {pipe}< <(exec bash "${BASH_SOURCE[0]%/*}/site_state.sh" "$site")
    reader=$!
    while :; do # bash runs a trap between two commands, so no command may wait long
        code=0
        IFS= read -r -d '' -t 1 part <&"$pipe" || code=$?
        state+=$part
        [ "$code" -gt 128 ] || break
    done
    exec {pipe}<&-
    code=0
    wait "$reader" || code=$?
    if [[ $state != *$'\n# end\n' ]]; then
        echo "samecurve: site file $site ended its shell (exit code $code) before its last line; remove exit and exec from it" >&2
        return 2
    fi
    eval "$state"
}
