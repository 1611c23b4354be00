#!/usr/bin/env bash
# Builds Kubernetes' control plane and kubelet from source, as one program under five names.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

version="$KUBERNETES_VERSION"
published="v0.${version#1.}"

# Kubernetes' own go.mod points its staging modules at folders that are not published with it.
staging_replacements() {
    go mod download -json "k8s.io/kubernetes@v$version" \
        | sed -n 's/^\s*"GoMod": "\(.*\)",$/\1/p' \
        | xargs sed -n 's|^\s*\(k8s\.io/[^ ]*\) => \./staging/.*|\1|p' \
        | sort -u \
        | while read -r module; do echo "replace $module => $module $published"; done
}

build() {
    local package=k8s.io/component-base/version component
    cp "$here/kubernetes/main.go" .
    sed "s/@VERSION@/$version/" "$here/kubernetes/go.mod.in" > go.mod
    staging_replacements >> go.mod
    go mod tidy
    say "kubernetes: compiling (about 6 minutes on 2 cores)"
    CGO_ENABLED=0 go build -trimpath -o "$1/kubernetes" -ldflags "-s -w \
        -X $package.gitVersion=v$version -X $package.gitMajor=1 -X $package.gitMinor=$(cut -d. -f2 <<< "$version") \
        -X $package.gitTreeState=clean" .
    for component in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet; do
        ln -s kubernetes "$1/$component"
    done
}

cached "kubernetes-$version" build
