#!/usr/bin/env bash
# Installs the Debian packages that the tests run on, without starting any of their services.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

packages=(
    ca-certificates unzip openssl iproute2 nftables conntrack util-linux
    etcd-server containerd runc containernetworking-plugins
    buildah prometheus protobuf-compiler chromium fonts-dejavu-core
)
policy=/usr/sbin/policy-rc.d

missing() {
    local package
    for package in "${packages[@]}"; do
        [[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" == installed ]] || echo "$package"
    done
}

# The packages' own services must not run: they would take the ports and sockets of the host.
install_quietly() {
    if [[ ! -e "$policy" ]]; then
        printf '#!/bin/sh\nexit 101\n' > "$policy"
        chmod +x "$policy"
        trap 'rm -f "$policy"' EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update > /dev/null
    apt-get -q install -y --no-install-recommends "$@" > /dev/null
}

mapfile -t wanted < <(missing)
if ((${#wanted[@]} == 0)); then
    say "packages: all installed"
else
    say "packages: installing ${wanted[*]}"
    install_quietly "${wanted[@]}"
    say "packages: installed after $SECONDS s"
fi
