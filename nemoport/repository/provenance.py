"""Where a version comes from, in the words of others: an ML-BOM and a build statement, beside its manifest.

    sbom.cdx.json           CycloneDX 1.6: the model as a component, its architecture, its inputs and outputs, its files
    statement.intoto.json   in-toto Statement v1 with SLSA Provenance v1: which bytes were made, from what, by what

Both follow from the manifest alone: the same version has the same documents, and who has the manifest can check them.
Sources: cyclonedx.org/docs/1.6/json, in-toto.io/Statement/v1, slsa.dev/spec/v1.0/provenance.
"""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

from nemoport import artifact
from nemoport.artifact import Artifact, Tensor
from nemoport.spec import to_json

SBOM, STATEMENT = "sbom.cdx.json", "statement.intoto.json"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:nemoport:convert:v1"
"""What the parameters of the statement mean."""
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, BUILD_TYPE)


def documents(made: Artifact, evidence: Path, name: str, version: int) -> dict[str, bytes]:
    """File name to content. `evidence` holds the manifest, and the ledger where there is one."""
    return {
        SBOM: artifact.json_bytes(sbom(made, artifact.identity(evidence), name, version)),
        STATEMENT: artifact.json_bytes(statement(made, evidence, name, version)),
    }


def sbom(made: Artifact, identity: str, name: str, version: int) -> dict[str, Any]:
    program, _, release = made.producer.partition(" ")
    reference = f"{name}@{version}"
    source = ((f"source.{key}", value) for key, value in sorted(made.source.items()))
    model = {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": name,
        "version": str(version),
        "hashes": [{"alg": "BLAKE3", "content": identity}],
        "modelCard": {"modelParameters": _parameters(made)},
        "components": [_file(file, reference) for file in made.files],
        "properties": [
            {"name": f"nemoport:{key}", "value": str(value)}
            for key, value in (("kind", made.kind), ("dtype", made.dtype), *source)
        ],
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, f'{reference} {identity}')}",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": program, "version": release or "unknown"}]},
            "component": {"type": "machine-learning-model", "bom-ref": f"subject:{reference}", "name": name},
        },
        "components": [model],
    }


def statement(made: Artifact, evidence: Path, name: str, version: int) -> dict[str, Any]:
    """Its subjects are the manifest, which holds the digests of all, by the algorithm that others know, and each file
    that has one digest as a whole."""
    manifest = evidence / artifact.MANIFEST
    digests = {"sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(), "blake3": artifact.digest(manifest)}
    files = [{"name": file.path, "digest": {"blake3": file.blake3}} for file in made.files if file.blake3]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": artifact.MANIFEST, "digest": digests}, *files],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "model": name,
                    "version": version,
                    "to": made.kind,
                    "dtype": made.dtype,
                    "plan": to_json(made.plan),
                },
                "resolvedDependencies": [{"name": "source checkpoint", "annotations": dict(made.source)}],
            },
            "runDetails": {"builder": {"id": f"urn:nemoport:{made.producer.partition(' ')[2]}"}},
        },
    }


def _parameters(made: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = {
        "task": type(made.spec.head).__name__,
        "architectureFamily": made.spec.family,
        "modelArchitecture": f"{made.spec.family}, {len(made.spec.blocks)} layers, hidden {made.spec.hidden_size}",
    }
    if made.signature:
        found["inputs"] = [{"format": _format(tensor)} for tensor in made.signature.inputs]
        found["outputs"] = [{"format": _format(tensor)} for tensor in made.signature.outputs]
    return found


def _format(tensor: Tensor) -> str:
    return f"{tensor.name}: {tensor.dtype}[{', '.join(map(str, tensor.shape))}]"


def _file(file: artifact.File, reference: str) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "bom-ref": f"{reference}/{file.path}", "name": file.path}
    if file.blake3:
        return row | {"hashes": [{"alg": "BLAKE3", "content": file.blake3}]}
    return row | {"properties": [{"name": "nemoport:digests", "value": f"a digest a tensor, in {artifact.LEDGER}"}]}
