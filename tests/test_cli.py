"""The command line as scripts rely on it: names, exit codes, one JSON object on stdout."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nemoport import __version__
from nemoport.cli import main

DATA = Path(__file__).parent / "data"
MEGATRON = DATA / "megatron"
BARE, CONFIG = MEGATRON / "mcore/llama_te_tp2pp2", MEGATRON / "mcore/llama_te_tp2pp2.cfg.json"
LM, BRIDGE, NEMO2 = (MEGATRON / name for name in ("megatron_lm/torch_dist_tp2", "bridge/llama", "nemo2/llama_tp1pp1"))
HUGGINGFACE = MEGATRON / "hf/llama"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="nemoport")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def told(*arguments: object) -> dict[str, Any]:
    """The JSON object of a command that succeeds, alone on stdout."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_both_commands_are_the_same_object() -> None:
    scripts = {script.name: script for script in entry_points(group="console_scripts")}
    assert scripts["nemoport"].load() is scripts["export"].load() is main


@pytest.mark.parametrize("door", [["-m", "nemoport"], ["-c", "from nemoport.cli import main; main()"]])
def test_both_doors_open(door: list[str]) -> None:
    ended = subprocess.run([sys.executable, *door, "--version"], capture_output=True, text=True, check=True)
    assert __version__ in ended.stdout
    ended = subprocess.run([sys.executable, *door, "inspect", "nowhere"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "Error: nowhere does not exist\n")


def test_help_names_every_verb() -> None:
    text = run("--help").stdout
    for verb in ("inspect", "convert", "validate", "publish", "repo", "serve"):
        assert f"\n  {verb} " in text, verb


@pytest.mark.parametrize("verb", sorted(main.commands))
def test_every_verb_has_help(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 4


@pytest.mark.parametrize(
    "path, expected",
    [
        (BARE, {"format": "torch_dist", "trained": {}}),
        (LM, {"format": "megatron_lm"}),
        (BRIDGE, {"format": "megatron_bridge"}),
        (NEMO2, {"format": "nemo2"}),
        (HUGGINGFACE, {"format": "huggingface"}),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_inspect_says_what_a_checkpoint_is(path: Path, expected: dict[str, Any]) -> None:
    config = ("--config", CONFIG) if path == BARE else ()
    facts = told("inspect", path, *config)
    assert facts["format"] == expected["format"]
    assert facts["family"] == "llama"
    assert facts["parameters"] == 272_448 == _parameters()
    assert facts["vocabulary"]["true"] == 300
    assert facts["vocabulary"]["padded"] in (300, 384, 512)
    assert facts["dtypes"] == {"bfloat16": facts["tensors"]}
    shown = run("inspect", path, *config)
    assert shown.exit_code == 0
    for word in (expected["format"], "llama", "272,448", "300"):
        assert word in shown.stdout


def test_inspect_counts_what_it_would_skip_and_finds_the_tokenizer() -> None:
    facts = told("inspect", NEMO2)
    assert facts["tokenizer"]["ids"] == 300
    assert "tokenizer.json" in facts["tokenizer"]["files"]
    assert all(isinstance(count, int) for count in facts["skipped"].values())


def test_inspect_of_a_bare_checkpoint_says_what_is_missing() -> None:
    facts = told("inspect", BARE)
    assert "--config" in facts["problem"]
    assert facts["tensors"] > 0
    assert "problem" in run("inspect", BARE).stdout


def test_inspect_reports_a_suspicious_pickle_that_need_not_be_read() -> None:
    """NeMo 2's context holds a cloudpickle beside the YAML: told, and not opened."""
    pickles = told("inspect", NEMO2)["pickles"]
    assert any("02b26e39" in each["path"] and each["verdict"] == "suspicious, not needed" for each in pickles)


EVIL = {
    "index": (MEGATRON / "evil/torch_dist_metadata", "torch_dist", ".metadata"),
    "rank": (MEGATRON / "evil/legacy", "megatron_legacy", "mp_rank_00/model_optim_rng.pt"),
}


@pytest.mark.parametrize("path, format_name, pickle", EVIL.values(), ids=EVIL.keys())
def test_inspect_names_a_suspicious_pickle_that_must_be_read_and_refuses(
    path: Path, format_name: str, pickle: str
) -> None:
    result = run("inspect", path, "--json")
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["format"]) == (5, format_name)
    assert result.stderr == f"Error: {facts['refused']}\n"
    (found,) = (each for each in facts["pickles"] if each["verdict"] != "clean")
    assert (found["path"], found["verdict"], found["globals"]) == (pickle, "suspicious, needed", ["posix.system"])
    shown = run("inspect", path)
    assert shown.exit_code == 5
    assert f"suspicious, needed: {pickle} would import posix.system" in shown.stdout


def test_inspect_of_what_is_no_checkpoint_says_what_it_looked_for(tmp_path: Path) -> None:
    from nemoport import plugins
    from nemoport.exporters import source

    result = run("inspect", tmp_path)
    assert result.exit_code == 3
    for name, reader in plugins.load_all(source.READERS).items():
        assert f"{reader.LOOKS_FOR} ({name})" in result.stderr


def test_convert_takes_the_weights_of_the_model_or_of_the_optimizer(tmp_path: Path) -> None:
    """What it then does is in test_optimizer_weights; here, that the flag arrives."""
    result = run("convert", NEMO2, "--to", "hf", "--weights", "optimizer", "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert "use --weights model" in result.stderr
    assert run("convert", NEMO2, "--to", "hf", "--weights", "model", "-o", tmp_path / "out").exit_code == 0
    assert run("convert", NEMO2, "--to", "hf", "--weights", "both", "-o", tmp_path / "out").exit_code == 2


def test_convert_tells_what_it_wrote(tmp_path: Path) -> None:
    facts = told("convert", LM, "--to", "trtllm", "--tp", 2, "--pp", 2, "-o", tmp_path / "out")
    assert (facts["target"], facts["tp"], facts["pp"], facts["dtype"]) == ("trtllm", 2, 2, "bfloat16")
    assert facts["output"] == str(tmp_path / "out")
    assert {f"rank{rank}.safetensors" for rank in range(4)} < {file["path"] for file in facts["files"]}
    for file in facts["files"]:
        assert (tmp_path / "out" / file["path"]).stat().st_size == file["size"]


@pytest.mark.parametrize(
    "target, files",
    [
        ("hf", {"config.json", "model.safetensors"}),
        ("trtllm", {"config.json", "rank0.safetensors"}),
        ("onnx", {"model.onnx", "model.onnx.data"}),
    ],
)
def test_convert_leaves_the_files_of_its_target(target: str, files: set[str], tmp_path: Path) -> None:
    result = run("convert", BARE, "--to", target, "--config", CONFIG, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= files | {"manifest.json", "ledger.jsonl"}
    assert str(tmp_path / "out") in "".join(result.stdout.split("\n"))
    assert "loaded by" in result.stdout


@pytest.mark.parametrize("target", ["hf", "trtllm", "onnx"])
def test_a_dry_run_says_the_same_and_writes_nothing(target: str, tmp_path: Path) -> None:
    arguments = ("convert", BARE, "--to", target, "--config", CONFIG, "-o", tmp_path / "out")
    planned = told(*arguments, "--dry-run")
    assert not list(tmp_path.iterdir())
    assert run(*arguments, "--dry-run").exit_code == 0
    assert not list(tmp_path.iterdir())
    done = told(*arguments)
    assert (planned["files"], planned["contract"], done["contract"]) == (None, None, [])
    assert {**done, "files": None, "contract": None} == planned


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path) -> None:
    result = run("convert", NEMO2, "--to", "trtllm", "--tp", 3, "--dry-run", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == "Error: 8 heads do not divide over tp=3; use tp 1, 2, 4 or 8\n"


def test_a_dry_run_says_that_the_place_is_taken(tmp_path: Path) -> None:
    """Everything that can be checked is checked before the first byte is read."""
    (tmp_path / "out").mkdir()
    assert run("convert", NEMO2, "--to", "hf", "--dry-run", "-o", tmp_path / "out").exit_code == 2


@pytest.mark.parametrize("synonym, word", [(["--tp_size", "2"], ["--tp", "2"]), (["--pp_size", "2"], ["--pp", "2"])])
def test_the_ecosystems_words_are_understood(synonym: list[str], word: list[str], tmp_path: Path) -> None:
    first, second = (
        told("convert", NEMO2, "--to", "trtllm", "--dry-run", *each, "-o", tmp_path / "out") for each in (synonym, word)
    )
    assert first == second


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", str(NEMO2)],
        ["convert", str(NEMO2), "--to", "hf"],
        ["convert", str(NEMO2), "--to", "hf", "-o", "out", "--dtype", "int3"],
        ["convert", str(NEMO2), "--to", "hf", "-o", "out", "--vocab", "half"],
        ["convert", str(NEMO2), "--to", "hf", "-o", "out", "--max-memory", "lots"],
        ["convert", str(NEMO2), "--to", "hf", "-o", "out", "--nonsense"],
        ["inspect"],
        ["nonsense"],
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[2:]),
)
def test_a_command_that_makes_no_sense_ends_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_errors_go_to_stderr_also_with_json(tmp_path: Path) -> None:
    result = run("convert", NEMO2, "--to", "trtllm", "--tp", 3, "--json", "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")


def _parameters() -> int:
    from safetensors import safe_open

    with safe_open(HUGGINGFACE / "model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))
