"""Signatures over a version's build statement: DSSE envelopes, as of in-toto and Sigstore, with a key of one's own.

The key is Ed25519 or ECDSA P-256 in PEM, as `openssl genpkey -algorithm ed25519` makes it. What is signed is DSSEv1's
pre-authentication encoding, github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md; a key is named by the SHA-256
of its DER. The package `cryptography` does the arithmetic; the format is thirty lines, and other tools verify it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from nemoport import artifact
from nemoport.errors import DamagedInput, MissingPackage, PolicyError, UsageError

FILE = "statement.dsse.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"


def private_key(path: Path) -> Any:
    serialization = _cryptography().serialization
    try:
        return _known(serialization.load_pem_private_key(path.read_bytes(), password=None), path)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is no private key in PEM without a password ({error})") from error


def public_key(path: Path) -> Any:
    serialization = _cryptography().serialization
    try:
        return _known(serialization.load_pem_public_key(path.read_bytes()), path)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{path} is no public key in PEM ({error}); give the one that belongs to the signer"
        ) from error


def sign(statement: bytes, key: Any) -> bytes:
    """An envelope around exactly these bytes."""
    row = {"keyid": keyid(key.public_key()), "sig": base64.b64encode(_sign(key, _encoded(statement))).decode()}
    payload = base64.b64encode(statement).decode()
    return artifact.json_bytes({"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": [row]})


def check(envelope: bytes, statement: bytes, keys: list[Any], place: Path | str) -> str:
    """The id of the key that signed exactly this statement."""
    try:
        data = json.loads(envelope)
        payload = base64.b64decode(data["payload"], validate=True)
        signatures = [base64.b64decode(row["sig"], validate=True) for row in data["signatures"]]
        kind = data["payloadType"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedInput(f"{place} is no DSSE envelope ({error!r}); sign again") from error
    if kind != PAYLOAD_TYPE or payload != statement:
        raise PolicyError(f"{place} signs something else than this version's statement; sign again")
    for key in keys:
        if any(_verifies(key, signature, _encoded(payload)) for signature in signatures):
            return keyid(key)
    raise PolicyError(f"{place} has no signature by {' or '.join(keyid(key)[:16] for key in keys)}; sign with that key")


def keyid(public: Any) -> str:
    serialization = _cryptography().serialization
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _encoded(payload: bytes) -> bytes:
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _sign(key: Any, message: bytes) -> bytes:
    found: bytes = key.sign(message, *_scheme(key.public_key()))
    return found


def _verifies(key: Any, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message, *_scheme(key))
    except InvalidSignature:
        return False
    return True


def _scheme(public: Any) -> tuple[Any, ...]:
    """What ECDSA has to be told, and Ed25519 has not."""
    module = _cryptography()
    return (module.ec.ECDSA(module.hashes.SHA256()),) if hasattr(public, "curve") else ()


def _known(key: Any, path: Path) -> Any:
    module = _cryptography()
    ed25519 = (module.ed25519.Ed25519PrivateKey, module.ed25519.Ed25519PublicKey)
    if isinstance(key, ed25519) or getattr(getattr(key, "curve", None), "name", "") == "secp256r1":
        return key
    raise UsageError(f"{path} is a {type(key).__name__}; use Ed25519, or ECDSA on P-256")


def _cryptography() -> Any:
    try:
        from types import SimpleNamespace

        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    except ImportError:
        raise MissingPackage("cryptography", "sign", "a signature") from None
    return SimpleNamespace(hashes=hashes, serialization=serialization, ec=ec, ed25519=ed25519)
