"""A finding points at the token that is wrong: `»` stands before it, and is not part of the config."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig

from nemoport.check import Request, check, text
from nemoport.check.rules import CONFIG, TEXT
from nemoport.check.subject import Target
from nemoport.compatibility import runtime, triton

from .cases import ADD, CASES, write

HEAD = 'backend: "python"\n# é and ☃ count as one\nmax_batch_size: 4\n'
MARKED = {
    "NP103": HEAD + "default_model_filename »8",
    "NP104": HEAD + "dynamic_batching {\n\t»prefered_batch_size: [ 4 ]\n}",
    "NP105": HEAD + 'input [\n  { name: "X", data_type: »FP32, dims: 4 }\n]',
    "NP106": HEAD + "dynamic_batching {}\n  »sequence_batching {}",
    "NP107": HEAD + 'input { name: "X" data_type: TYPE_FP32 dims: [ 4\n »5 ] }',
    "NP108": HEAD + "# ${fine}\nparameters { key: 'é' value { string_value: '»${path}' } }",
    "NP205": HEAD + "version_policy { specific { versions: [ 1,\n »2 ] } }",
    "NP206": HEAD + 'name: »"other"',
    "NP302": HEAD.replace('backend: "python"', 'platform: »"onnxruntime"'),
    "NP304": HEAD.replace('"python"', '»"pythn"'),
    "NP402": HEAD + 'output [ { name: "A" data_type: TYPE_BOOL dims: 1 }, »{ name: "B" dims: 1 } ]',
    "NP404": HEAD + '»output { name: "A" data_type: TYPE_BOOL }',
    "NP405": HEAD + 'output { name: "A" data_type: TYPE_BOOL dims: 1 dims: »0 }',
    "NP406": HEAD + 'output { name: "A" data_type: TYPE_BOOL dims: 2 »reshape { shape: 3 } }',
    "NP409": HEAD
    + """
input { name: "A" data_type: TYPE_BOOL dims: 1 }
input { name: »"A" data_type: TYPE_BOOL dims: 1 }""",
    "NP502": HEAD + "dynamic_batching { preferred_batch_size: [ 2,»8 ] }",
    "NP508": HEAD
    + """model_warmup {
    batch_size: 1 inputs { key: "A" value { zero_data: true } } »inputs { key: "X" value {} } }""",
    "NP801": HEAD + "instance_group [ { kind: KIND_CPU }, { kind: KIND_CPU »gpus: [ 0 ] } ]",
    "NP804": HEAD + "instance_group [ { kind: KIND_CPU }, { kind: »KIND_GPU } ]",
    "NP807": HEAD + "»model_metrics {}",
}
GRAPH = {
    "NP307": ADD
    + """optimization { execution_accelerators {
  cpu_execution_accelerator [ { name: "openvino" }, »{ name: "onednn" } ] } }""",
    "NP602": ADD.replace('"INPUT1"', '»"INPUT_1"'),
    "NP604": ADD.replace('"INPUT1" data_type: TYPE_INT32', '"INPUT1" data_type: »TYPE_FP32'),
    "NP606": ADD.replace(
        '"INPUT1" data_type: TYPE_INT32 dims: [ 16 ]', '"INPUT1" data_type: TYPE_INT32 »dims: [ -1, 16 ]'
    ),
    "NP607": ADD.replace('"INPUT1" data_type: TYPE_INT32 dims: [ 16 ]', '"INPUT1" data_type: TYPE_INT32 »dims: [ 8 ]'),
}

PARAMETER = ADD + 'parameters { key: "execution_mode" value { string_value: »"2" } }'


def place(marked: str) -> tuple[str, int, int]:
    at = marked.index("»")
    before = marked[:at]
    return marked.replace("»", ""), before.count("\n") + 1, at - (before.rfind("\n") + 1) + 1


@pytest.mark.parametrize("code, marked", [*MARKED.items(), *GRAPH.items(), ("NP307", PARAMETER)])
def test_a_finding_points_at_what_is_wrong(code: str, marked: str, tmp_path: Path) -> None:
    config, line, column = place(marked)
    files = CASES["add"].files if code in GRAPH else {"1/model.py": b""}
    for path, content in files.items():
        (tmp_path / "m" / path).parent.mkdir(parents=True)
        (tmp_path / "m" / path).write_bytes(content)
    (tmp_path / "m/config.pbtxt").write_text(config)
    found = check(Request(directory=tmp_path, target=Target(0), runtime=triton("24.10"))).findings
    places = [(each.file, each.line, each.column) for each in found if each.code == code]
    assert ("m/config.pbtxt", line, column) in places, found


def test_every_rule_for_configs_has_a_case(tmp_path: Path) -> None:
    """Those without are for manifests and ranks, which have tests of their own."""
    write(tmp_path)
    found = check(Request(directory=tmp_path, target=Target(1), runtime=triton("24.10"))).findings
    found += check(Request(directory=tmp_path, target=Target(0))).findings
    found += check(Request(directory=tmp_path, model="plan", runtime=runtime("tritonserver:24.10-vllm"))).findings
    codes = {each.code for each in found}
    assert {rule.code for rule in (*TEXT, *CONFIG)} - codes == {"NP215", "NP216", "NP808"}


def test_every_position_lies_in_the_file(tmp_path: Path) -> None:
    write(tmp_path)
    for each in check(Request(directory=tmp_path, target=Target(1), runtime=triton("24.10"))).findings:
        path = tmp_path / each.file
        if path.is_file() and path.suffix == ".pbtxt" and each.code != "NP201":
            lines = path.read_text().split("\n")
            assert 1 <= each.line <= len(lines)
            assert 1 <= each.column <= len(lines[each.line - 1]) + 1
        else:
            assert (each.line, each.column) == (1, 1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case.config, str)])
def test_the_scan_sees_every_field_that_the_parser_sees(name: str) -> None:
    config = CASES[name].config
    assert isinstance(config, str)
    found = text.read(config)
    if found.config is None:
        return
    for field, value in found.config.ListFields():
        if field.message_type is None and not field.is_repeated:
            said = found.places[(field.name,)].value
            again = text_format.Parse(f"{field.name}: {config[said.start : said.end]}", ModelConfig())
            assert getattr(again, field.name) == value
        else:
            assert (field.name,) in found.places


PIECES = [
    "input",
    "name",
    "dims",
    "step",
    "ensemble_scheduling",
    "input_map",
    "key",
    "value",
    ":",
    "{",
    "}",
    "[",
    "]",
    "<",
]
PIECES += [">", ",", ";", '"X"', "'", '"', "\\", "-1", "4", "TYPE_FP32", "#", "\n", " ", "é", "${", "\x00", "/", "."]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_any_text_has_positions_and_no_traceback(content: str) -> None:
    found = text.read(content)
    assert found.config is not None or found.syntax or found.misspelt
    for place in found.places.values():
        assert 0 <= place.value.start <= place.value.end <= len(content)
