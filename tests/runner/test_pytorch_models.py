"""TorchScript models: bound by argument name, by number or in order, held against torch itself.

What is refused, and how, is what Triton's backend refuses: src/pt/model_instance_state.cc of
triton-inference-server/pytorch_backend. The one freedom taken is to refuse numbers of inputs that it would write out of
bounds for.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemoport.errors import DamagedInput, MachineError, NemoportError, UnsupportedInput
from nemoport.runner.model import LoadOptions, ModelVersion, load_version
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import request_of
from nemoport.runner.tensors import Array

from .models import write_config

TENSOR = '{{ name: "{}" data_type: {} dims: [ 3 ] }}'
OUTPUTS = ("OUTPUT__1", "OUTPUT__0")


class Apart(torch.nn.Module):
    """Not symmetric, so that a wrong order of anything is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0, 5.0]))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return left * 2 - right, (left + right * 3) * self.scale.to(left.dtype)


class Named(torch.nn.Module):
    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return given["left"] * 2 - given["right"]


class Answers(torch.nn.Module):
    """A dictionary, which Triton does not take apart."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"OUTPUT__0": left, "OUTPUT__1": right}


class Sums(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left + right).sum()


class Joins(torch.nn.Module):
    def forward(self, left: list[str], right: torch.Tensor) -> torch.Tensor:
        return right * len(left)


class Without(torch.nn.Module):
    """No forward."""

    @torch.jit.export
    def answer(self, left: torch.Tensor) -> torch.Tensor:
        return left


def loaded(
    directory: Path,
    inputs: tuple[str, ...] = ("left", "right"),
    outputs: tuple[str, ...] = OUTPUTS,
    *,
    data_type: str = "TYPE_FP32",
    module: torch.nn.Module | None = None,
    more: str = "max_batch_size: 8",
    options: LoadOptions | None = None,
) -> ModelVersion:
    model = directory / "apart"
    (model / "1").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module or Apart()).save(model / "1" / "model.pt")  # type: ignore[no-untyped-call]
    tensors = {kind: ", ".join(TENSOR.format(name, data_type) for name in names) for kind, names in
               {"input": inputs, "output": outputs}.items()}  # fmt: skip
    said = " ".join(f"{kind} [ {rows} ]" for kind, rows in tensors.items() if rows)
    write_config(model, f'backend: "pytorch" {more} {said}')
    return load_version(model, "1", options or LoadOptions())


def rows(seed: int, count: int = 2) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)


def wanted(x: Array, y: Array) -> list[Array]:
    return [each.detach().numpy() for each in Apart()(torch.from_numpy(x), torch.from_numpy(y))]


@pytest.mark.parametrize(
    "first, second, left",
    [
        ("right", "left", "left"),
        ("IN__1", "IN__0", "IN__0"),
        ("a", "b", "a"),
        ("right", "other", "right"),
        ("a__b__1", "b__0", "a__b__1"),
    ],
    ids=[
        "by argument",
        "by number",
        "in order",
        "in order, since one is no argument",
        "in order, since one has no number",
    ],
)
def test_inputs_are_bound_as_triton_binds_them(tmp_path: Path, first: str, second: str, left: str) -> None:
    right = second if left == first else first
    x, y = rows(0), rows(1)
    found = loaded(tmp_path, (first, second)).infer(request_of({left: x, right: y})).arrays()
    minus, plus = wanted(x, y)
    np.testing.assert_array_equal(found["OUTPUT__0"], minus)
    np.testing.assert_array_equal(found["OUTPUT__1"], plus)


@pytest.mark.parametrize(
    "outputs, places",
    [(("OUT__1",), [1]), (("b", "a"), [0, 1]), (("b__1", "a"), [0, 1]), (("only",), [0])],
    ids=["a number is a place", "in order", "in order, since one has no number", "the first"],
)
def test_outputs_are_bound_as_triton_binds_them(tmp_path: Path, outputs: tuple[str, ...], places: list[int]) -> None:
    x, y = rows(0), rows(1)
    found = loaded(tmp_path, outputs=outputs).infer(request_of({"left": x, "right": y})).arrays()
    for name, place in zip(outputs, places, strict=True):
        np.testing.assert_array_equal(found[name], wanted(x, y)[place])


def test_one_dictionary_is_given_all_inputs_by_name(tmp_path: Path) -> None:
    x, y = rows(0), rows(1)
    version = loaded(tmp_path, ("right", "left"), ("minus",), module=Named())
    np.testing.assert_array_equal(version.infer(request_of({"left": x, "right": y})).arrays()["minus"], wanted(x, y)[0])


@pytest.mark.parametrize(
    "words, error, reason",
    [
        ({"inputs": ("left",)}, DamagedInput, "configuration expects 1 inputs, model provides 2"),
        ({"inputs": ("left", "right", "third")}, DamagedInput, "configuration expects 3 inputs, model provides 2"),
        ({"inputs": ("IN__1", "IN__2")}, DamagedInput, "stand for one argument twice or for none of left, right"),
        ({"inputs": ("IN__0", "X__0")}, DamagedInput, "stand for one argument twice or for none of left, right"),
        ({"inputs": ()}, NemoportError, "needs inputs and outputs in its config"),
        ({"outputs": ()}, NemoportError, "needs inputs and outputs in its config"),
        (
            {"data_type": "TYPE_BF16"},
            UnsupportedInput,
            "unsupported datatype TYPE_BF16 for input 'left' for model 'apart'",
        ),
        ({"data_type": "TYPE_UINT16"}, UnsupportedInput, "unsupported datatype TYPE_UINT16 for input 'left'"),
        ({"module": Joins()}, UnsupportedInput, r"an argument 'left' of type List\[str\]"),
        ({"module": Without()}, DamagedInput, "torch cannot load .*model.pt: .*no attribute 'forward'"),
    ],
)
def test_what_triton_does_not_load_is_not_loaded(
    words: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        loaded(tmp_path, **words)


@pytest.mark.parametrize(
    "said",
    ['platform: "torch_aoti"', 'backend: "pytorch" platform: "torch_aoti"', ""],
    ids=["platform", "both", "file"],
)
def test_a_package_of_aotinductor_is_refused_with_its_reason(said: str, tmp_path: Path) -> None:
    (tmp_path / "m/1").mkdir(parents=True)
    (tmp_path / "m/1/model.pt2").write_bytes(b"PK")
    tensors = " ".join(f"{kind} [ {TENSOR.format(kind, 'TYPE_FP32')} ]" for kind in ("input", "output"))
    write_config(tmp_path / "m", f"{said} {tensors}")
    with pytest.raises(UnsupportedInput, match=r"platform torch_aoti: model\.pt2 is native code of AOTInductor"):
        load_version(tmp_path / "m", "1")


def test_optional_inputs_are_refused(tmp_path: Path) -> None:
    name = loaded(tmp_path).name
    path = tmp_path / name / "config.pbtxt"
    path.write_text(path.read_text().replace('name: "right"', 'name: "right" optional: true'))
    with pytest.raises(UnsupportedInput, match="optional input 'right', and forward takes all"):
        load_version(tmp_path / name, "1")


@pytest.mark.parametrize(
    "words, code, reason",
    [
        ({"outputs": ("a__0", "b__2")}, Code.INVALID_ARG, "The output b__2 .* refers to an output index which doesn't"),
        ({"module": Answers()}, Code.INTERNAL, "PyTorch execute failure: output must be of type Tensor"),
        ({"module": Sums(), "outputs": ("sum",)}, Code.INVALID_ARG, "output 'sum' is a scalar which is not supported"),
    ],
)
def test_answers_that_triton_does_not_pass_on_are_not_passed_on(
    words: dict[str, Any], code: Code, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=reason) as refused:
        loaded(tmp_path, **words).infer(request_of({"left": rows(0), "right": rows(1)}))
    assert refused.value.code is code


def test_an_answer_of_another_type_is_not_passed_on(tmp_path: Path) -> None:
    version = loaded(tmp_path, data_type="TYPE_FP64")
    x = rows(0).astype(np.float64)
    assert version.infer(request_of({"left": x, "right": x})).arrays()["OUTPUT__0"].dtype == np.float64
    path = tmp_path / version.name / "config.pbtxt"
    path.write_text(path.read_text().replace('"OUTPUT__1" data_type: TYPE_FP64', '"OUTPUT__1" data_type: TYPE_FP16'))
    reason = "configuration expects datatype TYPE_FP16 for output 'OUTPUT__1', model provides TYPE_FP64"
    with pytest.raises(Refusal, match=reason):
        load_version(tmp_path / version.name, "1").infer(request_of({"left": x, "right": x}))


def test_what_the_model_raises_is_the_clients_to_see(tmp_path: Path) -> None:
    path = tmp_path / loaded(tmp_path).name / "config.pbtxt"
    path.write_text(path.read_text().replace("dims: [ 3 ]", "dims: [ -1 ]").replace("max_batch_size: 8", ""))
    version = load_version(path.parent, "1")
    with pytest.raises(Refusal, match=r"PyTorch execute failure: .*must match") as refused:
        version.infer(request_of({"left": rows(0)[0], "right": rows(1)[0, :2]}))
    assert refused.value.code is Code.INTERNAL


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_asked_for_in_vain_or_done_without_when_allowed(tmp_path: Path) -> None:
    more = "max_batch_size: 8 instance_group [ { kind: KIND_GPU } ]"
    with pytest.raises(MachineError, match="has kind KIND_GPU but no GPUs are available"):
        loaded(tmp_path / "refused", more=more)
    version = loaded(tmp_path / "allowed", more=more, options=LoadOptions(allow_cpu_fallback=True))
    assert version.fell_back_to_cpu
    x, y = rows(0), rows(1)
    found = version.infer(request_of({"left": x, "right": y})).arrays()
    np.testing.assert_array_equal(found["OUTPUT__0"], wanted(x, y)[0])


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\3\4" * 30])
def test_what_is_no_torchscript_is_refused(content: bytes, tmp_path: Path) -> None:
    model = loaded(tmp_path).name
    (tmp_path / model / "1" / "model.pt").write_bytes(content)
    with pytest.raises(DamagedInput, match=r"torch cannot load .*model\.pt"):
        load_version(tmp_path / model, "1")


def test_a_damaged_archive_is_loaded_or_refused(tmp_path: Path) -> None:
    """One byte is another, or the end is missing: torch raises errors of many kinds."""
    path = tmp_path / loaded(tmp_path).name / "1/model.pt"
    whole, draw, refused = path.read_bytes(), np.random.default_rng(5), 0
    for number in range(60):
        content = bytearray(whole if number % 6 else whole[: draw.integers(len(whole))])
        if content:
            content[draw.integers(len(content))] ^= draw.integers(1, 256)
        path.write_bytes(content)
        try:
            load_version(path.parents[1], "1")
        except DamagedInput as error:
            refused += "torch cannot load" in str(error) or "inputs, model provides" in str(error)
    assert refused > 20


def test_a_pickle_in_the_place_of_an_archive_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    model = loaded(tmp_path).name
    torch.save({"weights": Evil()}, tmp_path / model / "1" / "model.pt")
    with pytest.raises(DamagedInput, match=r"torch cannot load .*model\.pt"):
        load_version(tmp_path / model, "1")
    assert not (tmp_path / "ran").exists()
