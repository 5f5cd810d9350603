"""A model for Triton's vLLM backend (`model.json`, vLLM's engine arguments), executed by the reference decoder.

Only what changes the text is read of the arguments: where the model is. Nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.runner.backends.reference import ReferenceSession, gpus, serve
from nemoport.runner.instances import Placement
from nemoport.runner.model_config import ModelConfig

__all__ = ["gpus", "load"]

FILE = "model.json"


def load(version_directory: Path, config: ModelConfig, placement: Placement, *, complete: bool) -> ReferenceSession:
    path = version_directory / FILE
    try:
        said = json.loads(path.read_bytes())["model"]
        artifact = version_directory / said
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedInput(f"{path} does not say where the model is ({error!r}); it needs a member 'model'") from None
    if not artifact.is_dir():
        raise UnsupportedInput(
            f"model '{config.name}' is {said}, which is no directory here, and this runner downloads nothing; "
            f"put the model's files there, or their place into {path}"
        )
    return serve(artifact, _decoupled(config) if complete else config, placement, complete=complete)


def _decoupled(config: ModelConfig) -> ModelConfig:
    """As that backend completes it."""
    done = ModelConfig()
    done.CopyFrom(config)
    done.model_transaction_policy.decoupled = True
    return done
