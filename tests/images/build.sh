#!/usr/bin/env bash
# Builds the operator and runtime images from the release binaries; unchanged inputs are not built again.
#
#   tests/images/build.sh [operator] [runtime]     both by default
#
# An image's tag is the digest of its inputs. For each image this prints NAME_IMAGE=reference and NAME_TAR=archive,
# which may be evaluated by a shell, and points $VICUNA_CACHE/images/NAME.tar at the newest archive.
set -euo pipefail
source "$(dirname "$0")/../tools/cache.sh"

recipes="$(cd "$(dirname "$0")" && pwd)"
binaries="${BINARIES:-$CARGO_TARGET_DIR/release}"
images="$VICUNA_CACHE/images"
storage=()

# Overlay halves the time of a build, but not every file system can carry it.
choose_storage() {
    local driver
    for driver in overlay vfs; do
        storage=(--root "$VICUNA_CACHE/buildah-$driver/storage" --runroot "$VICUNA_CACHE/buildah-$driver/run" --storage-driver "$driver")
        if buildah "${storage[@]}" images > /dev/null 2>&1; then return; fi
    done
    say "buildah has no working storage under $VICUNA_CACHE: run tests/tools/packages.sh, or choose another VICUNA_CACHE"
    exit 1
}

programs_of() {
    case "$1" in
        operator) echo vicuna-operator vicuna-gateway ;;
        runtime) echo vicuna-trainer vicuna-worker vicuna-data ;;
        *) echo "$1: no such image; there are operator and runtime" >&2; return 1 ;;
    esac
}

# The names of the system's libraries that the given files need, libtorch's own set aside.
system_libraries() {
    ldd "$@" | sed -n 's|^\s*\(.* => \)\?\(/[^ ]*\) (0x.*|\2|p' | grep -v "^$LIBTORCH/" | sort -u
}

stage_base() { # FOLDER FILE...: what any program needs to start, resolve names and trust certificates
    local base="$1" library
    shift
    mkdir -p "$base"/{etc/ssl/certs,tmp,usr/lib,lib64}
    chmod 1777 "$base/tmp"
    printf 'root:x:0:0::/:/none\nnonroot:x:65532:65532::/tmp:/none\n' > "$base/etc/passwd"
    printf 'root:x:0:\nnonroot:x:65532:\n' > "$base/etc/group"
    printf 'hosts: files dns\n' > "$base/etc/nsswitch.conf"
    cp /etc/ssl/certs/ca-certificates.crt "$base/etc/ssl/certs/"
    for library in $(system_libraries "$@"); do
        if [[ "$library" == /lib64/* ]]; then
            cp -L "$library" "$base/lib64/"
        else
            cp -L "$library" "$base/usr/lib/"
        fi
    done
}

stage_programs() { # FOLDER PROGRAM...
    local folder="$1/usr/bin" program
    shift
    mkdir -p "$folder"
    for program in "$@"; do strip -o "$folder/$program" "$binaries/$program"; done
}

# Stripping libtorch saves a fifth of it and takes a while: done once.
strip_libtorch() {
    local library
    for library in "$LIBTORCH"/lib/*.so*; do
        [[ -L "$library" ]] || strip --strip-unneeded -o "$1/$(basename "$library")" "$library"
    done
    ln -s libtorch_cpu.so "$1/libtorch.so"
}

stage_libtorch() { # FOLDER
    mkdir -p "$1/usr/lib/libtorch"
    cp -al "$VICUNA_CACHE/libtorch-$LIBTORCH_VERSION-stripped/." "$1/usr/lib/libtorch/"
}

digest_of() { # FILE...: of their contents, and of how an image is made from them
    { echo "$LIBTORCH_VERSION"; cat "$recipes/build.sh" "$@" /etc/ssl/certs/ca-certificates.crt; } | sha256sum | cut -c1-12
}

build_image() { # NAME REFERENCE ARCHIVE PROGRAM...
    local name="$1" reference="$2" archive="$3" files=()
    shift 3
    scratch="$(mktemp -d "$images/.$name.XXXXXX")"
    files=("${@/#/$binaries/}")
    if [[ "$name" == runtime ]]; then
        stage_libtorch "$scratch/libtorch"
        files+=("$LIBTORCH"/lib/*.so*)
    fi
    stage_base "$scratch/base" "${files[@]}"
    stage_programs "$scratch/programs" "$@"
    find "$scratch" -exec touch --no-dereference --date=@0 {} +
    buildah "${storage[@]}" build --quiet --isolation chroot --layers --timestamp 0 \
        --file "$recipes/Containerfile.$name" --tag "$reference" "$scratch" > /dev/null
    buildah "${storage[@]}" push --quiet "$reference" "docker-archive:$scratch/image.tar:$reference" > /dev/null
    mv "$scratch/image.tar" "$archive"
    leave_no_scratch
}

keep_newest() { # NAME COUNT: archives and images of builds long past only fill the disk
    local archive
    ls -t "$images/$1"-*.tar | tail -n "+$(($2 + 1))" | while read -r archive; do
        archive="$(basename "$archive" .tar)"
        rm -f "$images/$archive.tar"
        buildah "${storage[@]}" rmi "vicuna.dev/$1:${archive#"$1"-}" > /dev/null 2>&1 || true
    done
}

make_image() { # NAME
    local name="$1" started=$SECONDS programs program reference archive tag
    read -ra programs < <(programs_of "$name")
    for program in "${programs[@]}"; do
        [[ -x "$binaries/$program" ]] || { say "$name: no $binaries/$program: cargo build --release first"; exit 1; }
    done
    tag="$(digest_of "$recipes/Containerfile.$name" "${programs[@]/#/$binaries/}")"
    reference="vicuna.dev/$name:$tag" archive="$images/$name-$tag.tar"
    if [[ -e "$archive" ]]; then
        say "$reference: unchanged"
        touch "$archive"
    else
        say "$reference: building"
        build_image "$name" "$reference" "$archive" "${programs[@]}"
        say "$reference: ready after $((SECONDS - started)) s, $(du -h "$archive" | cut -f1)"
    fi
    ln -sfn "$(basename "$archive")" "$images/$name.tar"
    keep_newest "$name" 3
    printf '%s_IMAGE=%s\n%s_TAR=%s\n' "${name^^}" "$reference" "${name^^}" "$archive"
}

mkdir -p "$images"
exec 8> "$images/.lock"
flock 8
choose_storage
wanted=("$@")
((${#wanted[@]})) || wanted=(operator runtime)
for name in "${wanted[@]}"; do
    if [[ "$name" == runtime ]]; then
        cached "libtorch-$LIBTORCH_VERSION-stripped" strip_libtorch
    fi
    make_image "$name"
done
