"""Continuous batching over every kind of state: latents, convolutions and state spaces, windows, experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from families.test_transformers import CASES, VOCAB, save

from nemoport import reference
from nemoport.exporters import convert, source, stream
from nemoport.reference.executor import ReferenceExecutor
from nemoport.runner.backends import find_backend
from nemoport.runner.generation.engine import Engine, Limits, Reason
from nemoport.runner.generation.graph import GraphExecutor
from nemoport.runner.generation.measured import Measured
from nemoport.runner.generation.sampling import Sampling
from nemoport.spec import Plan

from .test_generation import ask

MODELS = ("deepseek v3", "nemotron h, experts", "gemma2")


def graph(model: Path, out: Path, *gpus: str, run_options: Any = None) -> Any:
    if not out.exists():
        stream.run(convert.plan(model, "onnx", out, plan=Plan(dtype="float32")))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    providers = [*((gpu, {"use_tf32": 0}) for gpu in gpus), "CPUExecutionProvider"]
    return GraphExecutor(onnxruntime.InferenceSession(out / "model.onnx", options, providers=providers), run_options)


def plain(model: Path, out: Path) -> Any:
    found = source.model(model)
    return ReferenceExecutor(reference.load(found.spec, found.tensors, keep=1 << 30))


@pytest.mark.parametrize("make", [graph, plain])
@pytest.mark.parametrize("name", MODELS)
def test_texts_are_the_same_alone_and_together(name: str, make: Any, tmp_path: Path) -> None:
    save(CASES[name], tmp_path / "model")
    executor, numbers = make(tmp_path / "model", tmp_path / "out"), np.random.default_rng(2)
    asked = [
        (numbers.integers(0, VOCAB, 2 + 3 * at).tolist(), 9 - at, Sampling(temperature=0.7 * (at % 2), seed=at))
        for at in range(6)
    ]
    texts = []
    for limits in (Limits(sequences=1, positions=128), Limits(sequences=4, positions=64)):
        engine = Engine(name, executor, limits, Measured())
        heard = [ask(engine, *stream) for stream in asked]
        assert {each.wait() for each in heard} == {Reason.LENGTH}
        texts.append([each.tokens for each in heard])
        engine.close()
    assert texts[0] == texts[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_keeps_the_state_and_gives_the_texts_of_the_cpu(name: str, tmp_path: Path) -> None:
    if not find_backend("onnxruntime", name).gpus():
        pytest.skip("no GPU that onnxruntime can use")
    save(CASES[name], tmp_path / "model")
    numbers = np.random.default_rng(3)
    prompts = [numbers.integers(0, VOCAB, 2 + 3 * at).tolist() for at in range(4)]
    texts = []
    for gpus in ((), ("CUDAExecutionProvider",)):
        executor = graph(tmp_path / "model", tmp_path / "out", *gpus)
        _, state = executor.prefill(prompts[0], None)
        assert {tensor.device_name() for tensor in state.tensors} == {"cuda" if gpus else "cpu"}
        engine = Engine(name, executor, Limits(sequences=4, positions=128), Measured())
        heard = [ask(engine, prompt, 9, Sampling(temperature=0)) for prompt in prompts]
        assert {each.wait() for each in heard} == {Reason.LENGTH}
        texts.append([each.tokens for each in heard])
        engine.close()
    assert texts[0] == texts[1]


def test_a_decoder_runs_as_its_options_say(tmp_path: Path) -> None:
    """ONNX Runtime refuses a run that is told to shrink the arena of a device that is not there."""
    save(CASES[MODELS[0]], tmp_path / "model")
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:7")
    with pytest.raises(Exception, match="arena shrink list: gpu:7"):
        graph(tmp_path / "model", tmp_path / "out", run_options=options).prefill([1, 2], None)
