"""A service-account token as a cluster's API server signs it, for a worker that runs without a cluster.

`token.py MODULUS` writes jwks.json and payload; after openssl has signed payload, `token.py --join` writes token.
"""

import base64
import json
import pathlib
import sys
import time


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def prepare(modulus: str) -> None:
    key = {"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "smoke", "n": encode(bytes.fromhex(modulus)), "e": "AQAB"}
    pathlib.Path("jwks.json").write_text(json.dumps({"keys": [key]}))
    claims = {
        "aud": ["vicuna-gateway"],
        "exp": int(time.time()) + 3600,
        "kubernetes.io": {
            "namespace": "default",
            "serviceaccount": {"name": "vicuna-worker", "uid": "0"},
            "pod": {"name": "smoke", "uid": "0"},
        },
    }
    header = {"alg": "RS256", "kid": "smoke"}
    parts = [encode(json.dumps(part).encode()) for part in (header, claims)]
    pathlib.Path("payload").write_text(".".join(parts))


def join() -> None:
    signature = encode(pathlib.Path("signature").read_bytes())
    pathlib.Path("token").write_text(f"{pathlib.Path('payload').read_text()}.{signature}")


join() if sys.argv[1] == "--join" else prepare(sys.argv[1])
