"""The Megatron columns, judged by their author: models that Megatron-core built, and what it answers with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from nemoport import reference
from nemoport.exporters import source
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.tensor import Held

from .mcore_hybrids import HYBRIDS
from .mcore_models import MODELS

pytest.importorskip("megatron.core")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("megatron")
    for script in map(Path(__file__).with_name, ("mcore_models.py", "mcore_hybrids.py")):
        done = subprocess.run([sys.executable, script, directory], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("name", [*MODELS, *HYBRIDS, *(f"{name}, in pieces" for name in HYBRIDS)])
def test_the_reference_answers_as_megatron_core_does(name: str, built: Path) -> None:
    stored = load_file(built / f"{name}.safetensors")
    tokens, logits = stored.pop("tokens"), stored.pop("logits")
    checkpoint = Checkpoint(
        path=built,
        format="",
        writer="Megatron-core",
        naming="megatron",
        config=json.loads((built / f"{name.removesuffix(', in pieces')}.json").read_text()),
        tensors={key: Held(array, "float32") for key, array in stored.items()},
    )
    model = source.resolved(checkpoint)
    assert model.spec.family == name.split(",")[0]
    np.testing.assert_allclose(reference.logits(model.spec, model.tensors, tokens), logits, rtol=0, atol=1e-5)
