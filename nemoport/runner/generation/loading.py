"""A generator for a model that can step: what its directory and its config say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.runner.generation import tokenizing
from nemoport.runner.generation.engine import Engine, Limits
from nemoport.runner.generation.executor import Executor
from nemoport.runner.generation.measured import Measured
from nemoport.runner.generation.texts import Generator
from nemoport.runner.model_config import ModelConfig

SEQUENCES, POSITIONS = "max_num_seqs", "max_cached_positions"
"""Parameters of a config: rows of the running batch at most, and positions in its state."""
_MOST_SEQUENCES = 32
_STATE = 2**30  # bytes of the running batch's state, where the config does not say


def generator(version_directory: Path, config: ModelConfig, executor: Executor[Any]) -> Generator | None:
    """None where no tokenizer lies beside the model."""
    tokenizer = tokenizing.read(version_directory)
    if tokenizer is None:
        return None
    measured = Measured()
    engine = Engine(config.name, executor, limits(config, executor), measured)
    return Generator(config.name, tokenizer, engine, measured, executor.vocab_size)


def limits(config: ModelConfig, executor: Executor[Any]) -> Limits:
    """By default one sequence of full length fits whatever it takes."""
    fitting = _STATE // max(executor.position_bytes, 1)
    return Limits(
        sequences=_parameter(config, SEQUENCES, _MOST_SEQUENCES),
        positions=_parameter(config, POSITIONS, max(fitting, executor.max_positions)),
    )


def _parameter(config: ModelConfig, name: str, default: int) -> int:
    if name not in config.parameters:
        return default
    text = config.parameters[name].string_value
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise DamagedInput(f"model '{config.name}' has parameter {name} = '{text}'; give a whole number from 1 on")
    return int(text)
