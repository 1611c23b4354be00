#!/usr/bin/env bash
# Builds CoreDNS, the cluster's name server.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() { go_install "github.com/coredns/coredns@v$COREDNS_VERSION" "$1"; }

cached "coredns-$COREDNS_VERSION" build
