#!/usr/bin/env bash
# Installs the gateways that tests/bench/gateway.sh runs beside ours: vllm-router, LiteLLM's proxy, and nginx as the floor.
set -euo pipefail
source "$(dirname "$0")/cache.sh"

install_into() {
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target "$@"
}

build_vllm_router() { install_into "$1" "vllm-router==$VLLM_ROUTER_VERSION"; }

# Its extra "proxy" asks for a package that is not on PyPI; this is what the proxy imports besides.
build_litellm() {
    install_into "$1" "litellm==$LITELLM_VERSION" gunicorn uvicorn uvloop fastapi backoff rq orjson apscheduler \
        fastapi-sso pyjwt python-multipart cryptography pynacl websockets mcp httpx2 rich restrictedpython \
        expression semver soundfile
}

# Unpacked, not installed: the machine gets no service.
build_nginx() {
    apt-get -q update > /dev/null
    chmod 755 . && apt-get -q download nginx > /dev/null
    dpkg-deb -x nginx_*.deb "$1"
}

cached "vllm-router-$VLLM_ROUTER_VERSION" build_vllm_router
cached "litellm-$LITELLM_VERSION" build_litellm
cached nginx build_nginx
