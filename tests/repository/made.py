"""Artifacts and verdicts made by hand, and what a repository is checked with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from nemoport import artifact
from nemoport.artifact import Artifact, Signature, Tensor
from nemoport.repository import config
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish, verify
from nemoport.repository.versions import evidence_of, models, state
from nemoport.spec import Attention, Block, Dense, LanguageModel, ModelSpec, Norm, Plan

SPEC = ModelSpec(
    family="llama",
    vocab_size=5,
    hidden_size=8,
    max_positions=32,
    norm=Norm(),
    head=LanguageModel(),
    blocks=(Block(mixer=Attention(heads=2, kv_heads=1, head_dim=4, rope=None), ffn=Dense(intermediate=16)),) * 2,
)
IDS = Tensor("input_ids", "int64", ("batch", "sequence"))
LOGITS = Tensor("logits", "float32", ("batch", "sequence", 5))
SIGNATURE = Signature(inputs=(IDS,), outputs=(LOGITS,))


def make_artifact(directory: Path, seed: int = 1, signature: Signature = SIGNATURE, kind: str = "onnx") -> Path:
    """logits = seed * ids * [1 2 3 4 5], with the weights as external data beside the graph and its
    digest in the ledger."""
    directory.mkdir(parents=True)
    _write_graph(directory, seed)
    weights = directory / "model.onnx.data"
    row = {"target": "weights", "file": weights.name, "offset": 0, "bytes": weights.stat().st_size}
    (directory / artifact.LEDGER).write_text(json.dumps(row | {"blake3": artifact.digest(weights)}) + "\n")
    whole = tuple(artifact.describe(directory / name, directory) for name in ("model.onnx", artifact.LEDGER))
    made = Artifact(
        kind=kind,
        spec=SPEC,
        plan=Plan(),
        dtype="float32",
        files=(*whole, artifact.File(weights.name, weights.stat().st_size, None)),
        loads=("ONNX Runtime 1.17 or later",),
        source={"format": "by hand"},
        signature=signature,
    )
    artifact.write_manifest(directory, made)
    (directory / artifact.ORIGIN).write_bytes(artifact.json_bytes({"path": "nowhere"}))
    return directory


MODEL_PY = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        read = pb_utils.get_input_tensor_by_name
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("Y", read(request, "X").as_numpy() * {seed})])
            for request in requests
        ]
"""


def make_python(directory: Path, seed: int = 1, kind: str = "python") -> Path:
    """A python model, Y = seed * X, which a real tritonserver runs."""
    directory.mkdir(parents=True)
    (directory / "model.py").write_text(MODEL_PY.format(seed=seed))
    (directory / artifact.LEDGER).write_text("")
    made = Artifact(
        kind=kind,
        spec=SPEC,
        plan=Plan(),
        dtype="float32",
        files=tuple(artifact.describe(directory / name, directory) for name in ("model.py", artifact.LEDGER)),
        loads=("Triton",),
        source={"format": "by hand"},
        signature=Signature((Tensor("X", "float32", ("n",)),), (Tensor("Y", "float32", ("n",)),)),
    )
    artifact.write_manifest(directory, made)
    return directory


def write_verdict(directory: Path, passed: bool = True) -> None:
    verdict = {"passed": passed, "artifact": artifact.identity(directory)}
    (directory / artifact.REPORT).write_bytes(artifact.json_bytes(verdict))


def publish_proven(directory: Path, repository: Path, name: str = "m") -> int:
    """Publish and promote; the version."""
    published = publish(directory, repository, name)
    write_verdict(published.evidence)
    promote(repository, name, str(published.version))
    return published.version


def check_loadable(repository: Path) -> None:
    """What a server needs at any moment: only models at the root, each with a config that parses, and every version
    in it there and whole."""
    for model in repository.iterdir() if repository.is_dir() else ():
        found = config.parse((model / config.FILE).read_text(), str(model))
        assert found.versions, f"{model} serves nothing"
        for version in found.versions:
            evidence = evidence_of(repository, model.name) / str(version)
            verify(model / str(version), evidence, artifact.read_manifest(evidence))
    for name in models(repository):
        state(repository, name)


def tree(repository: Path) -> dict[str, bytes | None]:
    """Every path of a repository and of what lies beside it, without the times of events; directories are None."""
    return {
        str(path.relative_to(repository.parent)): _TIMES.sub(b"", path.read_bytes()) if path.is_file() else None
        for place in repository.parent.glob(f"{repository.name}*")
        for path in sorted(place.rglob("*"))
        if path.name != ".lock"
    }


_TIMES = re.compile(rb'"(when|previous)": "[^"]*"')


def _write_graph(directory: Path, seed: int) -> None:
    weights = seed * np.arange(1, 6, dtype=np.float32)
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "last"], ["columns"]),
        helper.make_node("Mul", ["columns", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, IDS.shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, LOGITS.shape)],
        [
            helper.make_tensor("last", TensorProto.INT64, [1], [2]),
            helper.make_tensor("weights", TensorProto.FLOAT, [5], weights.tobytes(), raw=True),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(
        model,
        directory / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
        convert_attribute=False,
    )
