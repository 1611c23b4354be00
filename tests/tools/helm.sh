#!/usr/bin/env bash
# Builds Helm, which installs the project's charts in the tests.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

build() { go_install "helm.sh/helm/v4/cmd/helm@v$HELM_VERSION" "$1"; }

cached "helm-$HELM_VERSION" build
