"""TorchScript of encoders, together all that a config can say, against the reference and torch's own archives."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.jit._fuser import optimized_execution

from nemoport import reference
from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters import convert
from nemoport.exporters.checkpoint import Model, Slot
from nemoport.exporters.formats import stored_zip, torchscript
from nemoport.exporters.targets import torchscript as target
from nemoport.exporters.tensor import Files, Zeros, cut, read
from nemoport.spec import Attention, LanguageModel, ModelSpec, Plan, tensors
from nemoport.validation.prompts import Prompt
from nemoport.validation.texts import texts

from .test_conformance import MODELS, unwritten, write
from .test_encoder_graphs import ENCODERS, every_encoder

Array = NDArray[Any]
DTYPES = ("float32", "float16", "bfloat16")


def written(spec: ModelSpec, directory: Path, **plan: Any) -> tuple[Model, Path]:
    model = unwritten(spec, directory)
    write(target.output(model, Plan(**plan)), directory)
    return model, directory / target.FILE


def loaded(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript as a whole
        return torch.jit.load(path).eval()  # type: ignore[no-untyped-call]


def given(text: Prompt) -> dict[str, torch.Tensor]:
    arrays = {"input_ids": text.tokens, "attention_mask": text.mask, "token_type_ids": text.token_types}
    arrays |= {"dimensions": None if text.dimensions is None else text.dimensions[:, None]}
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}


def wanted(model: Model, text: Prompt) -> Array:
    return reference.encode(
        model.spec,
        model.tensors,
        text.tokens,
        mask=text.mask,
        token_types=text.token_types,
        dimensions=text.dimensions,
    )


@every_encoder
def test_the_script_is_the_reference_s_model(spec: ModelSpec, tmp_path: Path) -> None:
    """Batches of several shapes, padded on either side, given to one module in turn: torch specializes what it has
    seen, and must still take what it has not."""
    model, path = written(spec, tmp_path)
    script = loaded(path)
    with torch.inference_mode():
        for text in (*texts(spec, 3), *texts(spec, 2)):
            assert given(text).keys() == {each.name for each in script.forward.schema.arguments[1:]}
            right = wanted(model, text)
            np.testing.assert_allclose(script(**given(text)), right, rtol=0, atol=2e-5 * np.abs(right).max())


HOW: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "DISABLE_OPTIMIZED_EXECUTION": (lambda script: script, lambda: optimized_execution(False)),
    "frozen": (torch.jit.freeze, nullcontext),
}
"""What Triton's parameter of that name does, and what those do who deploy with LibTorch."""


@pytest.mark.parametrize("how", HOW)
@every_encoder
def test_the_script_means_the_same_however_it_is_executed(spec: ModelSpec, how: str, tmp_path: Path) -> None:
    model, path = written(spec, tmp_path)
    prepare, execution = HOW[how]
    with warnings.catch_warnings(), torch.inference_mode(), execution():
        warnings.simplefilter("ignore")
        script = prepare(loaded(path))
        for text in texts(spec, 2):
            right = wanted(model, text)
            np.testing.assert_allclose(script(**given(text)), right, rtol=0, atol=2e-5 * np.abs(right).max())


@pytest.mark.parametrize("dtype", DTYPES)
@every_encoder
def test_torch_finds_every_tensor_and_writes_the_same_archive_again(
    spec: ModelSpec, dtype: str, tmp_path: Path
) -> None:
    """The judge of names, numbers and dtypes is what torch.jit.save makes of the loaded module, read by our reader."""
    _, path = written(spec, tmp_path, dtype=dtype)
    script, again = loaded(path), tmp_path / "again.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script.save(again)
    ours, theirs = torchscript.read(Files(), path), torchscript.read(Files(), again)
    assert ours.keys() == theirs.keys() == script.state_dict().keys() >= tensors(spec).keys()
    for name, tensor in script.state_dict().items():
        said = str(tensor.dtype).removeprefix("torch.")
        assert said == ours[name].dtype == theirs[name].dtype == (dtype if name in tensors(spec) else "float32")
        assert np.array_equal(read(ours[name]), read(theirs[name])), name
    with torch.inference_mode():
        (text, *_) = texts(spec, 2)
        assert script(**given(text)).dtype == torch.float32


@every_encoder
def test_the_archive_is_a_sound_zip_whose_tensors_are_aligned_as_torch_aligns_them(
    spec: ModelSpec, tmp_path: Path
) -> None:
    _, path = written(spec, tmp_path)
    again = tmp_path / "again.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded(path).save(again)
    assert kinds(path) | {"code/__torch__.py.debug_pkl", "serialization_id"} == kinds(again)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            assert start(path, info) % stored_zip.ALIGNMENT == 0, info.filename
    assert {name.partition("/")[0] for name in zipfile.ZipFile(path).namelist()} == {"model"}


def kinds(path: Path) -> set[str]:
    """Members below the archive's name; a tensor for all tensors. From 6 on torch writes the version elsewhere, and
    reads it in both places."""
    names = (name.partition("/")[2] for name in zipfile.ZipFile(path).namelist())
    return {"data/" if name.startswith("data/") else name.removeprefix(".data/") for name in names}


def start(path: Path, info: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return info.header_offset + 30 + name + extra


@pytest.mark.parametrize(
    "rows", [(1, 1), (2**31, 3), (2**30 - 1, 2**30, 7)], ids=["small", "one above 4 GiB", "above 4 GiB together"]
)
def test_archives_of_any_size_are_read_by_torch(rows: tuple[int, ...], tmp_path: Path) -> None:
    """Of holes. Sizes and places above 4 GiB stand in Zip64 fields."""
    slots = [Slot(f"t{number}", Zeros((count, 1), "float32"), (), "") for number, count in enumerate(rows)]
    root = torchscript.Module(type="Root", parameters=tuple(slot.name for slot in slots), modules={})
    declared = "".join(f"  {slot.name} : Tensor\n" for slot in slots)
    code = f"class Root(Module):\n  __parameters__ = []\n  __buffers__ = []\n{declared}  training : bool\n"
    file = torchscript.file("model.pt", root, code, slots)
    path = tmp_path / "model.pt"
    assert file.seal is not None
    with path.open("wb") as out:
        out.write(file.header)
        for offset, content in file.seal([7] * len(slots)).items():
            out.seek(offset)
            out.write(content)
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: (start(path, info), info.file_size, info.CRC) for info in archive.infolist()}
    found: Any = torch._C.PyTorchFileReader(str(path))
    for slot, offset, count in zip(slots, file.offsets, rows, strict=True):
        assert sizes[f"model/data/{slot.name}"] == (offset, 4 * count, 7)
        assert found.get_record_offset(f"data/{slot.name}") == offset
    held = torchscript.read(Files(), path)
    assert {name: tensor.shape for name, tensor in held.items()} == {slot.name: slot.tensor.shape for slot in slots}
    assert not read(cut(held["t0"], 0, 0, 1)).any()


DECODERS = {family: spec for family, _, spec in MODELS.values() if isinstance(spec.head, LanguageModel)}


@pytest.mark.parametrize("family", DECODERS)
def test_a_model_that_writes_text_is_refused_with_the_way_out(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match=f"{family} writes text.*use --to onnx, vllm, llmapi or trtllm"):
        target.output(unwritten(DECODERS[family], tmp_path), Plan())


ENCODER = next(iter(ENCODERS.values()))


@pytest.mark.parametrize(
    "plan, error, reason",
    [
        ({"tp": 2}, UsageError, "tp=2 pp=1 ep=1 do not exist for TorchScript, which comes as one module"),
        ({"pp": 3}, UsageError, "tp=1 pp=3 ep=1 do not exist"),
        ({"dtype": "float64"}, UnsupportedInput, "in float64, which no encoder runs in; use --dtype float32 or"),
    ],
)
def test_plans_that_one_module_has_no_place_for_are_refused(
    plan: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        target.output(unwritten(ENCODER, tmp_path), Plan(**plan))


def test_pt2_is_refused_with_its_reason(tmp_path: Path) -> None:
    """Before anything is read: the source need not be there."""
    with pytest.raises(UnsupportedInput, match=r"--to pt2 is not written: .*AOTInductor.*use --to torchscript or onnx"):
        convert.plan(tmp_path / "nowhere", "pt2", tmp_path / "out", plan=Plan())


def test_a_block_that_the_script_has_no_words_for_is_refused(tmp_path: Path) -> None:
    (block, *rest) = ENCODER.blocks
    assert isinstance(block.mixer, Attention)
    spec = replace(ENCODER, blocks=(replace(block, mixer=replace(block.mixer, window=4)), *rest))
    with pytest.raises(UnsupportedInput, match=r"no words for a block .*window=4.*use --to onnx"):
        target.output(unwritten(spec, tmp_path), Plan())
