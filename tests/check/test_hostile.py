"""Whatever lies in the directory, the answer is findings: no traceback, no end that does not come."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from runner.models import linear

from nemoport.check import Report, Request, check, look
from nemoport.check.graph import MAX_FIELDS, Unreadable, read
from nemoport.check.repair import repair

from .cases import ADD, CASES, PLAN, with_external_data


def codes(repository: Path) -> set[str]:
    return {each.code for each in check(Request(directory=repository)).findings}


def model(repository: Path, config: bytes = PLAN.encode()) -> Path:
    (repository / "m/1").mkdir(parents=True)
    (repository / "m/1/model.pt").touch()
    (repository / "m/config.pbtxt").write_bytes(config)
    return repository / "m"


def test_links_that_lead_to_themselves(tmp_path: Path) -> None:
    directory = model(tmp_path)
    (directory / "self").symlink_to(directory)
    (directory / "1/up").symlink_to("..")
    (directory / "2").symlink_to("2")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "again").symlink_to(tmp_path)
    assert "NP201" in codes(tmp_path)


def test_a_config_that_is_a_link_to_itself_a_pipe_or_a_directory(tmp_path: Path) -> None:
    for name in ("link", "pipe", "directory", "device"):
        (tmp_path / name / "1").mkdir(parents=True)
    (tmp_path / "link/config.pbtxt").symlink_to("config.pbtxt")
    os.mkfifo(tmp_path / "pipe/config.pbtxt")
    (tmp_path / "directory/config.pbtxt").mkdir()
    (tmp_path / "device/config.pbtxt").symlink_to("/dev/zero")
    found = check(Request(directory=tmp_path)).findings
    assert {each.model for each in found if each.code == "NP201"} == {"link", "pipe", "directory", "device"}


def test_a_graph_that_is_a_pipe(tmp_path: Path) -> None:
    directory = model(tmp_path, ADD.encode())
    os.mkfifo(directory / "1/model.onnx")
    assert codes(tmp_path) <= {"NP211", "NP601"}


def test_a_config_too_large_to_read(tmp_path: Path) -> None:
    directory = model(tmp_path)
    with (directory / "config.pbtxt").open("wb") as file:
        file.truncate(1 << 40)
    (finding,) = (each for each in check(Request(directory=tmp_path)).findings if each.code == "NP201")
    assert str(1 << 40) in finding.found


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "input {",
            "{",
            "[",
            '"',
            "'",
            "#",
            "\\",
            "\0",
            "a: 1 ",
            "a{",
            "dims: 1 ",
            "input{}",
            "input[",
            "]",
            "-",
            "${",
        ),
        'input { name: "x" data_type: TYPE_FP32 dims: 1 } ',
        'parameters { key: "x" value { string_value: "y" } } ',
        'ensemble_scheduling { step { model_name: "m" } } ',
    ],
)
def test_a_config_of_one_piece_again_and_again(piece: str, tmp_path: Path) -> None:
    model(tmp_path, (PLAN + piece * (look.MAX_CONFIG // len(piece) - 50)).encode()[: look.MAX_CONFIG])
    check(Request(directory=tmp_path))


def test_an_ensemble_of_very_many_steps(tmp_path: Path) -> None:
    steps = "".join(
        f'step {{ model_name: "m" input_map {{ key: "X" value: "{at}" }} output_map {{ key: "Y" value: "{at - 1}" }} }}'
        for at in range(2500, 0, -1)
    )
    model(tmp_path, f'platform: "ensemble" ensemble_scheduling {{ {steps} }}'.encode())
    assert "NP704" in codes(tmp_path)


def test_what_may_not_be_read(tmp_path: Path) -> None:
    directory = model(tmp_path)
    (directory / "config.pbtxt").chmod(0)
    (directory / "1").chmod(0)
    try:
        report = check(Request(directory=tmp_path))
        assert os.geteuid() == 0 or not report.passed
    finally:
        (directory / "1").chmod(0o700)


def test_more_entries_than_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look.listing, "__defaults__", (50,))
    directory = model(tmp_path)
    for number in range(60):
        (directory / f"{number}.txt").touch()
        (tmp_path / f"{number}").mkdir()
    found = [each for each in check(Request(directory=tmp_path)).findings if "more than 50" in each.found]
    assert "." in {each.file for each in found}


@pytest.mark.parametrize("name", ["", "\0", "é", "..", "m" * 255, "a\nb", "%s", "[x]"])
def test_external_data_of_any_name(name: str, tmp_path: Path) -> None:
    directory = model(tmp_path, b'backend: "onnxruntime"')
    (directory / "1/model.onnx").write_bytes(with_external_data(linear(), name).SerializeToString())
    assert "NP212" in codes(tmp_path)


def test_a_graph_cut_anywhere(tmp_path: Path) -> None:
    whole = CASES["add"].files["1/model.onnx"]
    (tmp_path / "g").write_bytes(whole)
    wanted = read(tmp_path / "g", "g")
    for size in range(len(whole)):
        (tmp_path / "g").write_bytes(whole[:size])
        try:
            found = read(tmp_path / "g", "g")
        except Unreadable:
            continue
        assert found.opset in (wanted.opset, None)
        assert replace(found, opset=wanted.opset) == wanted, "what follows the graph was cut, and the graph is whole"


def test_a_graph_of_too_many_parts(tmp_path: Path) -> None:
    (tmp_path / "g").write_bytes(b"\x08\x01" * (MAX_FIELDS // 100))
    with pytest.raises(Unreadable):
        read(tmp_path / "g", "g")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schema": 1}', b"1e999"])
def test_any_manifest(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    report: Report = check(Request(directory=tmp_path))
    assert {each.code for each in report.findings} == {"NP901"}


@pytest.mark.parametrize("name", ["model.json", "config.json", "model.yaml"])
@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff", b"{}", b'{"mapping": 3, "tensor_parallel_size": "x"}', b"a: &a [*a]"]
)
def test_any_sidecar(name: str, content: bytes, tmp_path: Path) -> None:
    (model(tmp_path) / "1" / name).write_bytes(content)
    assert codes(tmp_path) == set()


def test_repair_leaves_what_it_cannot_write(tmp_path: Path) -> None:
    model(tmp_path, b"\xff")
    assert repair(Request(directory=tmp_path))[1] == ()
