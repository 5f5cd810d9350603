"""What a build job says to a shell, to docker and to Kubernetes, for every builder."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from exporters.commands import command, sentence
from exporters.conftest import Once
from exporters.fixtures import LLAMA

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""RFC 1123, which Kubernetes holds names of Jobs' pods and claims to."""
FIELDS: dict[str, Any] = {
    # The fields of batch/v1 Job that a job uses, with their types: kubernetes.io, API reference, v1.31.
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "labels": dict},
    "spec": {
        "backoffLimit": int,
        "template": {
            "spec": {
                "restartPolicy": str,
                "automountServiceAccountToken": bool,
                "securityContext": {
                    "runAsNonRoot": bool,
                    "runAsUser": int,
                    "runAsGroup": int,
                    "fsGroup": int,
                    "seccompProfile": {"type": str},
                },
                "containers": [
                    {
                        "name": str,
                        "image": str,
                        "command": [str],
                        "workingDir": str,
                        "env": [{"name": str, "value": str}],
                        "resources": {"limits": dict},
                        "securityContext": {
                            "allowPrivilegeEscalation": bool,
                            "readOnlyRootFilesystem": bool,
                            "capabilities": {"drop": [str]},
                        },
                        "volumeMounts": [{"name": str, "mountPath": str}],
                    }
                ],
                "volumes": [
                    {"name": str, "persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": str}},
                ],
            }
        },
    },
}


@pytest.fixture(scope="module")
def made(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of two GPUs, with a name that no shell and no server likes."""
    out = tmp_path_factory.mktemp("jobs") / "Engines of 2'; $(touch ran) ${HOME} --"
    options = ("--workers", 2, "--timing-cache", out.with_name("cache"), "--plugin", "gemm_plugin=auto")
    ended = command("compile", once(LLAMA["nemo2"], "trtllm", tp=2), "--to", "trtllm", "--job", "-o", out, *options)
    assert ended.exit_code == 0, ended.stderr
    return out.with_name(f"{out.name}.job")


def test_a_job_is_whole(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert names == {"artifact", "build.sh", "Dockerfile", "job.yaml", "README.md", "request.json"}
    for name in names - {"artifact"}:
        text = (made / name).read_text()
        assert "{{" not in text
        assert "{%" not in text
        assert str(made) not in text


def test_the_script_is_one_that_shells_accept(made: Path) -> None:
    subprocess.run(["bash", "-n", str(made / "build.sh")], check=True)
    if (shellcheck := shutil.which("shellcheck")) is None:
        pytest.skip("no shellcheck here")
    ended = subprocess.run([shellcheck, str(made / "build.sh")], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_kubernetes_has_every_field_of_the_job(made: Path) -> None:
    said = yaml.safe_load((made / "job.yaml").read_text())
    check(said, FIELDS, "job.yaml")
    assert (said["apiVersion"], said["kind"]) == ("batch/v1", "Job")
    pod = said["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert container["command"] == ["bash", "/job/build.sh"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert [mount["name"] for mount in container["volumeMounts"]] == list(volumes)
    claim = volumes["job"]["persistentVolumeClaim"]["claimName"]
    for name in (said["metadata"]["name"], container["name"], claim, *volumes):
        assert LABEL.fullmatch(name), name


def check(said: Any, documented: Any, place: str) -> None:
    if isinstance(documented, dict):
        assert said.keys() <= documented.keys(), place
        for name, value in said.items():
            check(value, documented[name], f"{place}.{name}")
    elif isinstance(documented, list):
        for value in said:
            check(value, documented[0], f"{place}[]")
    else:
        assert type(said) is documented, place


@pytest.mark.parametrize("name", ["-", "Größe", "a.b_c", "x" * 70, "a" * 62 + "-b", "42"])
def test_any_directory_has_a_name_that_kubernetes_takes(name: str, once: Once, tmp_path: Path) -> None:
    ended = command("compile", once(LLAMA["nemo2"], "trtllm", tp=2), "--to", "trtllm", "--job", "-o", tmp_path / name)
    assert ended.exit_code == 0, ended.stderr
    said = yaml.safe_load((tmp_path / f"{name}.job/job.yaml").read_text())
    assert LABEL.fullmatch(said["metadata"]["name"])


@pytest.mark.parametrize("content", ["null", "[1]", '{"to": "trtllm"}', "{", "\udcff"])
def test_a_directory_of_something_else_is_left_alone(content: str, once: Once, tmp_path: Path) -> None:
    taken = tmp_path / "engines.job/request.json"
    taken.parent.mkdir()
    taken.write_bytes(before := content.encode(errors="surrogateescape"))
    ended = command("compile", once(LLAMA["nemo2"], "trtllm", tp=2), "--to", "trtllm", "-o", tmp_path / "engines")
    assert ended.exit_code == 2
    assert "remove it, or choose another directory with -o" in sentence(ended.stderr)
    assert taken.read_bytes() == before


INSTRUCTIONS = {"FROM", "COPY", "RUN", "USER", "ENV", "WORKDIR", "ENTRYPOINT"}


def test_the_dockerfile_copies_the_job_and_runs_it_as_nobody_s_root(made: Path) -> None:
    lines = [line for line in (made / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    said = [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]
    assert {name for name, _ in said} <= INSTRUCTIONS
    assert said[0] == ("FROM", "nvcr.io/nvidia/tritonserver:25.12-trtllm-python-py3")
    assert said[-1] == ("ENTRYPOINT", '["bash", "/job/build.sh"]')
    assert dict(said)["USER"] == "1000"


def commands(text: str) -> Iterator[list[str]]:
    """The lines of a page that are for a shell."""
    for line in text.splitlines():
        if line.startswith("    "):
            for part in line.strip().split(" && "):
                yield shlex.split(part)


def test_the_page_says_commands_that_fit_what_lies_there(made: Path) -> None:
    said = list(commands((made / "README.md").read_text()))
    name = yaml.safe_load((made / "job.yaml").read_text())["metadata"]["name"]
    assert [words[:2] for words in said] == [
        ["docker", "run"],
        ["docker", "build"],
        ["docker", "run"],
        ["docker", "cp"],
        ["docker", "cp"],
        ["kubectl", "apply"],
        ["kubectl", "wait"],
    ]
    assert said[1] == ["docker", "build", "-t", name, "."]
    assert said[-1][-1] == f"job/{name}"
    assert {f"{name}:/job/product", f"{name}:/job/built_with"} == {words[2] for words in said if words[1] == "cp"}
