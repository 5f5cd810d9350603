"""What others are told of a version, judged by the tools of others; signatures; and a server that asks for them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from nemoport import artifact
from nemoport.errors import MissingPackage, NemoportError, PolicyError, UsageError
from nemoport.repository import provenance, signing
from nemoport.repository.labels import label
from nemoport.repository.publish import publish
from nemoport.repository.sign import sign
from nemoport.repository.verify import admit, verify
from nemoport.repository.versions import evidence_of
from nemoport.runner.serve import ServeOptions, load_models

from .made import make_artifact, make_python, publish_proven


def ed25519_key() -> Any:
    return ed25519.Ed25519PrivateKey.generate()


def p256_key() -> Any:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for number in (1, 2):
        publish_proven(make_artifact(tmp_path / f"a{number}", seed=number), tmp_path / "repository")
    return tmp_path / "repository"


def write_keys(directory: Path, key: Any) -> tuple[Path, Path]:
    """A private and a public file, as openssl writes them."""
    directory.mkdir(exist_ok=True)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (directory / "key.pem").write_bytes(private)
    (directory / "key.pub").write_bytes(public)
    return directory / "key.pem", directory / "key.pub"


def problems(repository: Path, *keys: Path) -> dict[int | None, str | None]:
    return {row.version: row.problem for row in verify(repository, [signing.public_key(key) for key in keys])}


@pytest.mark.parametrize("make", [make_artifact, make_python])
def test_the_bill_of_materials_is_valid_and_names_every_file(tmp_path: Path, make: Any) -> None:
    published = publish(make(tmp_path / "a"), tmp_path / "repository", "m")
    text = (published.evidence / provenance.SBOM).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    (model,) = json.loads(text)["components"]
    made = artifact.read_manifest(published.evidence)
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [{"alg": "BLAKE3", "content": artifact.identity(published.evidence)}]
    assert {each["name"] for each in model["components"]} == {file.path for file in made.files}


def test_a_bill_with_a_wrong_word_would_not_be_valid(tmp_path: Path) -> None:
    published = publish(make_artifact(tmp_path / "a"), tmp_path / "repository", "m")
    text = (published.evidence / provenance.SBOM).read_text().replace("BLAKE3", "BLAKE9")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is not None


def test_the_statement_is_one_of_in_toto(tmp_path: Path) -> None:
    published = publish(make_artifact(tmp_path / "a"), tmp_path / "repository", "m")
    data = json.loads((published.evidence / provenance.STATEMENT).read_bytes())
    statement = Statement.copy_from_pb(json_format.ParseDict(data, statement_pb2.Statement()))
    statement.validate()
    assert json_format.MessageToDict(statement.pb) == data
    digests = {row["name"]: row["digest"] for row in data["subject"]}
    manifest = published.evidence / artifact.MANIFEST
    said = subprocess.run(["sha256sum", manifest], capture_output=True, text=True, check=True).stdout.split()[0]
    assert digests[artifact.MANIFEST] == {"sha256": said, "blake3": artifact.identity(published.evidence)}
    assert digests["model.onnx"]["blake3"] == artifact.digest(published.path / "model.onnx")


def test_the_same_artifact_has_the_same_documents(tmp_path: Path) -> None:
    found = [publish(make_artifact(tmp_path / name), tmp_path / f"r{name}", "m").evidence for name in ("a", "b")]
    for document in (provenance.SBOM, provenance.STATEMENT):
        assert (found[0] / document).read_bytes() == (found[1] / document).read_bytes()


@pytest.mark.parametrize("make_key", [ed25519_key, p256_key])
def test_a_signature_is_verified_by_us_and_by_others(
    tmp_path: Path, repository: Path, make_key: Callable[[], Any]
) -> None:
    key = make_key()
    private, public = write_keys(tmp_path / "keys", key)
    assert not sign(repository, "m", None, private).already
    envelope = json.loads((evidence_of(repository, "m") / "2" / signing.FILE).read_bytes())
    theirs = SSlibKey.from_crypto(key.public_key(), envelope["signatures"][0]["keyid"])
    assert Envelope.from_dict(json.loads(json.dumps(envelope))).verify([theirs], 1)
    assert problems(repository)[2] is None
    assert "version 1 of m is not signed" in str(problems(repository, public)[1])
    assert problems(repository, public)[2] is None


def test_a_key_that_openssl_made_signs(tmp_path: Path, repository: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    sign(repository, "m", "2", private)
    assert problems(repository, public)[2] is None
    assert sign(repository, "m", "2", private).already


def test_other_keys_and_other_bytes_are_refused(tmp_path: Path, repository: Path) -> None:
    private, public = write_keys(tmp_path / "ours", ed25519_key())
    _, other = write_keys(tmp_path / "theirs", ed25519_key())
    sign(repository, "m", "1", private)
    sign(repository, "m", "2", private)
    assert "has no signature by" in str(problems(repository, other)[1])
    assert problems(repository, other, public) == {1: None, 2: None, None: None}
    evidence = evidence_of(repository, "m")
    one, two = ((evidence / version / signing.FILE) for version in ("1", "2"))
    signed = one.read_bytes()
    one.write_bytes(two.read_bytes())
    assert "signs something else" in str(problems(repository, public)[1])
    forged = json.loads(signed)
    forged["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    one.write_text(json.dumps(forged))
    assert "has no signature by" in str(problems(repository, public)[1])
    one.write_text("{}")
    assert "is no DSSE envelope" in str(problems(repository, public)[1])


def test_what_is_no_key_is_said(tmp_path: Path, repository: Path) -> None:
    private, public = write_keys(tmp_path / "keys", rsa.generate_private_key(65537, 2048))
    with pytest.raises(UsageError, match="use Ed25519, or ECDSA on P-256"):
        sign(repository, "m", None, private)
    with pytest.raises(UsageError, match="is no private key in PEM"):
        sign(repository, "m", None, public)
    with pytest.raises(UsageError, match="is no public key in PEM"):
        signing.public_key(private)


def test_without_cryptography_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(MissingPackage, match=r"nemoport\[sign\]"):
        signing.public_key(tmp_path)


CHANGES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "weights": ("m/2/model.onnx.data", lambda content: content[::-1], "differs from its digest"),
    "another file": ("m/2/model.py", lambda content: b"import os", "model.py, which was not published"),
    "config": ("m/config.pbtxt", lambda content: content + b"\n# mine\n", "changed by hand"),
    "label": ("m/configs/canary.pbtxt", lambda content: content.replace(b"[ 1 ]", b"[ 2 ]"), "does not follow from"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_server_that_wants_verified_models_refuses_what_was_changed(repository: Path, change: str) -> None:
    label(repository, "m", "canary", "1")
    options = ServeOptions((repository,), admit=admit, exit_on_error=False, strict_readiness=False)
    server = load_models(options)
    assert {row["state"] for row in server.index()} == {"READY"}
    server.close()
    file, edit, reason = CHANGES[change]
    path = repository / file
    path.write_bytes(edit(path.read_bytes() if path.exists() else b""))
    with pytest.raises(PolicyError, match=reason):
        admit(repository / "m")
    server = load_models(options)
    (row,) = server.index()
    assert (row["state"], reason in row["reason"]) == ("UNAVAILABLE", True)
    server.close()
    with pytest.raises(NemoportError):
        load_models(ServeOptions((repository,), admit=admit))
