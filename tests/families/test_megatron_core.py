"""The Megatron columns, judged by their author: models that Megatron-core built, and what it answers with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from nemoport import reference
from nemoport.exporters import source
from nemoport.exporters.checkpoint import Checkpoint, Model
from nemoport.exporters.formats.megatron import words_of_config
from nemoport.exporters.tensor import Held

from .mcore_hybrids import HYBRIDS
from .mcore_models import ENCODERS, MODELS

pytest.importorskip("megatron.core")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("megatron")
    for script in map(Path(__file__).with_name, ("mcore_models.py", "mcore_hybrids.py")):
        done = subprocess.run([sys.executable, script, directory], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return directory


def resolved(built: Path, stored: Mapping[str, NDArray[np.float32]], config: Mapping[str, Any]) -> Model:
    checkpoint = Checkpoint(
        path=built,
        format="",
        writer="Megatron-core",
        naming="megatron",
        config=config,
        tensors={key: Held(array, "float32") for key, array in stored.items()},
    )
    return source.resolved(checkpoint)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_reference_embeds_and_scores_as_nemo_does_on_megatron_core(name: str, built: Path) -> None:
    stored = load_file(built / f"{name}.safetensors")
    tokens, mask, answer = (stored.pop(each) for each in ("tokens", "mask", "answer"))
    model = resolved(built, stored, words_of_config(json.loads((built / f"{name}.json").read_text())))
    assert model.spec.family == name
    found = reference.encode(model.spec, model.tensors, tokens, mask=mask)
    np.testing.assert_allclose(found, answer, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, *HYBRIDS, *(f"{name}, in pieces" for name in HYBRIDS)])
def test_the_reference_answers_as_megatron_core_does(name: str, built: Path) -> None:
    stored = load_file(built / f"{name}.safetensors")
    tokens, logits = stored.pop("tokens"), stored.pop("logits")
    model = resolved(built, stored, json.loads((built / f"{name.removesuffix(', in pieces')}.json").read_text()))
    assert model.spec.family == name.split(",")[0]
    np.testing.assert_allclose(reference.logits(model.spec, model.tensors, tokens), logits, rtol=0, atol=1e-5)
