"""Good and bad models, each a directory of a repository: what a tritonserver takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.external_data_helper import set_external_data
from runner.models import add_sub, identity, linear

X, Y = 'input { name: "X" data_type: TYPE_FP32 dims: [ 4 ] }', 'output { name: "Y" data_type: TYPE_FP32 dims: [ 4 ] }'
PLAN = f'backend: "pytorch"\nmax_batch_size: 8\n{X}\n{Y}\n'
"""A model of which only the config is looked at."""
ADD = """backend: "onnxruntime"
max_batch_size: 8
input [ { name: "INPUT0" data_type: TYPE_INT32 dims: [ 16 ] }, { name: "INPUT1" data_type: TYPE_INT32 dims: [ 16 ] } ]
output { name: "OUTPUT0" data_type: TYPE_INT32 dims: [ 16 ] }
output { name: "OUTPUT1" data_type: TYPE_INT32 dims: [ 16 ] }
"""
PYTHON = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([]) for _ in requests]
"""


def _onnx(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString())


def with_external_data(model: onnx.ModelProto, location: str) -> onnx.ModelProto:
    """The same graph, which says that its weight [4, 3] float32 lies in another file."""
    (weight,) = model.graph.initializer
    set_external_data(weight, location, offset=0, length=48)
    weight.ClearField("raw_data")
    return model


def of_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same graph, which says that it is of another opset."""
    (said,) = model.opset_import
    said.version = opset
    return model


@dataclass(frozen=True)
class Case:
    config: str | bytes | None
    files: Mapping[str, bytes] = field(default_factory=lambda: {"1/model.pt": b""})
    directories: tuple[str, ...] = ()


def plan(more: str = "", *, without: str = "", instead: str = "") -> Case:
    assert without in PLAN
    return Case((PLAN.replace(without, instead) if without else PLAN) + more)


def python(more: str) -> Case:
    return Case(PLAN.replace("pytorch", "python") + more, {"1/model.py": PYTHON.encode()})


def add(more: str = "", *, without: str = "", instead: str = "", model: onnx.ModelProto | None = None) -> Case:
    assert without in ADD
    config = (ADD.replace(without, instead) if without else ADD) + more
    return Case(config, {"1/model.onnx": _onnx(model or add_sub())})


def accelerated(kind: str, *names: str, **parameters: str) -> str:
    said = " ".join(f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in parameters.items())
    entries = " ".join(f'{kind} {{ name: "{name}" {said} }}' for name in names)
    return f"optimization {{ execution_accelerators {{ {entries} }} }}"


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'


def ensemble(
    steps: str, *, x: str = X, y: str = Y, more: str = "max_batch_size: 8", directories: tuple[str, ...] = ("1",)
) -> Case:
    text = f'platform: "ensemble"\n{more}\n{x}\n{y}\nensemble_scheduling {{\n{steps}\n}}\n'
    return Case(text, {}, directories)


def step(model: str = "plan", x: str = "X", y: str = "Y", version: str = "model_version: -1", more: str = "") -> str:
    return (
        f'step {{ model_name: "{model}" {version} input_map {{ key: "X" value: "{x}" }} '
        f'output_map {{ key: "Y" value: "{y}" }} {more} }}\n'
    )


def joined(x: str, z: str) -> str:
    """A step from two tensors to Y."""
    return step("two-inputs", x=x, more=f'input_map {{ key: "Z" value: "{z}" }}')


SEQUENCE = 'sequence_batching { control_input { name: "START" control { kind: CONTROL_SEQUENCE_START %s } } }'
WARM = 'model_warmup { name: "w" batch_size: 1 inputs { key: "X" value { data_type: TYPE_FP32 dims: %s %s } } }'

CASES: dict[str, Case] = {
    # whole
    "plan": plan(),
    "add": add(),
    "platform": plan(without='backend: "pytorch"', instead='platform: "pytorch_libtorch"'),
    "both": plan('platform: "pytorch_libtorch"'),
    "named": plan('name: "named"'),
    "from-file": plan(without='backend: "pytorch"'),
    "comments": plan("# ${not} a placeholder\n# café"),
    "semicolons": plan("dynamic_batching <>; version_policy: { latest: { num_versions: 2 }, };"),
    "no-batch": plan(without="max_batch_size: 8"),
    "reshaped": plan(without="dims: [ 4 ] }\noutput", instead="dims: [ 4 ] reshape { shape: [ 2, 2 ] } }\noutput"),
    "scalar-item": plan(without="dims: [ 4 ] }\noutput", instead="dims: [ 1 ] reshape { shape: [] } }\noutput"),
    "hexadecimal": plan(without="max_batch_size: 8", instead="max_batch_size: 0x10"),
    "vllm": Case('backend: "vllm" instance_group { kind: KIND_MODEL }', {"1/model.json": b"{}"}),
    "tensorrt": Case(PLAN.replace("pytorch", "tensorrt"), {"1/model.plan": b""}),
    "openvino": Case(PLAN.replace("pytorch", "openvino"), {"1/model.xml": b""}),
    "tensorrtllm": Case(PLAN.replace("pytorch", "tensorrtllm"), {}, ("1",)),
    "python": Case(PLAN.replace("pytorch", "python"), {"1/model.py": PYTHON.encode()}),
    "other-file": Case(PLAN + 'default_model_filename: "my.pt"', {"1/my.pt": b""}),
    "two-versions": Case(PLAN + "version_policy { all {} }", {"1/model.pt": b"", "3/model.pt": b""}),
    "specific": Case(
        PLAN + "version_policy { specific { versions: [ 1, 3 ] } }", {"1/model.pt": b"", "3/model.pt": b""}
    ),
    "zero": Case(PLAN, {"0/model.pt": b""}),
    "canary": Case(PLAN, {"1/model.pt": b"", "configs/canary.pbtxt": PLAN.encode()}),
    "staged": Case(PLAN, {"1/model.pt": b"", "staging-2/model.pt": b""}),
    "dynamic": plan("dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }"),
    "priorities": plan("dynamic_batching { priority_levels: 2 default_priority_level: 1 }"),
    "sequence": plan(SEQUENCE % "int32_false_true: [ 0, 1 ]"),
    "warm": python(WARM % ("[ 4 ]", "zero_data: true")),
    "parameters": plan(
        'parameters { key: "a" value { string_value: "b" } } parameters { key: "c" value { string_value: "d" } }'
    ),
    "cpu": plan("instance_group [ { kind: KIND_CPU count: 2 } ]"),
    "labelled": Case(
        PLAN.replace('"Y" ', '"Y" label_filename: "labels.txt" '), {"1/model.pt": b"", "labels.txt": b"a\nb\n"}
    ),
    "decoupled": plan("model_transaction_policy { decoupled: true }"),
    "narrowed": Case(
        ADD.replace('PUT0" data_type: TYPE_INT32 dims: [ 16 ] }\n', 'PUT0" data_type: TYPE_INT32 dims: -1 }\n').replace(
            '"OUTPUT1" data_type: TYPE_INT32 dims: [ 16 ]', '"OUTPUT1" data_type: TYPE_INT32 dims: -1'
        ),
        {"1/model.onnx": _onnx(add_sub(("batch", "n")))},
    ),
    "one-output": add(without='output { name: "OUTPUT1" data_type: TYPE_INT32 dims: [ 16 ] }\n'),
    "octal": plan(without="max_batch_size: 8", instead="max_batch_size: 010"),
    "byte-order-mark": Case("\ufeff" + PLAN),
    "chain": ensemble(step(y="t") + step(x="t")),
    "of-version": ensemble(step("two-versions", version="model_version: 3")),
    "nested": ensemble(step("chain")),
    # the text
    "unknown-field": plan("max_batchsize: 4"),
    "unknown-field-inside": plan("dynamic_batching { prefered_batch_size: [ 4 ] }"),
    "unknown-type": plan(without="TYPE_FP32", instead="FP32"),
    "unknown-kind": plan("instance_group { kind: CPU }"),
    "two-schedulers": plan("dynamic_batching {} sequence_batching {}"),
    "twice": plan("max_batch_size: 4"),
    "no-comma": Case(
        'backend: "pytorch" input [ { name: "X" data_type: TYPE_FP32 dims: 4 }'
        ' { name: "Z" data_type: TYPE_FP32 dims: 4 } ]'
    ),
    "no-comma-in-dims": plan(without="[ 4 ] }\noutput", instead="[ 4 4 ] }\noutput"),
    "comma-at-end": plan(without="[ 4 ] }\noutput", instead="[ 4, ] }\noutput"),
    "no-end": plan("dynamic_batching {"),
    "no-colon": plan(without="max_batch_size: 8", instead="max_batch_size 8"),
    "string-for-number": plan(without="max_batch_size: 8", instead='max_batch_size: "8"'),
    "number-with-point": plan(without="max_batch_size: 8", instead="max_batch_size: 8.0"),
    "too-large": plan(without="max_batch_size: 8", instead="max_batch_size: 99999999999"),
    "placeholder": plan(without="max_batch_size: 8", instead="max_batch_size: ${max_batch_size}"),
    "placeholder-in-string": plan('parameters { key: "gpt_model_path" value { string_value: "${engine_dir}" } }'),
    "binary": Case(bytes(range(256))),
    "latin": Case(PLAN.encode() + b"# caf\xe9"),
    "string-without-end": plan('name: "x'),
    # the tree
    "no-version": Case(PLAN, {}),
    "v1": Case(PLAN, {"v1/model.pt": b""}),
    "01": Case(PLAN, {"01/model.pt": b""}),
    "v2-too": Case(PLAN, {"1/model.pt": b"", "v2/model.pt": b""}),
    "none-listed": plan("version_policy { specific { versions: 2 } }"),
    "one-missing": plan("version_policy { specific { versions: [ 1, 2 ] } }"),
    "latest-none": plan("version_policy { latest {} }"),
    "renamed": plan('name: "other"'),
    "nothing": Case(None, {}),
    "no-file": Case(PLAN, {}, ("1",)),
    "no-file-onnx": Case(ADD, {}, ("1",)),
    "no-label": plan(without='"Y" ', instead='"Y" label_filename: "labels.txt" '),
    "label-outside": plan(without='"Y" ', instead='"Y" label_filename: "../plan/config.pbtxt" '),
    # backends
    "no-backend": Case(f"{X} {Y}", {}, ("1",)),
    "backend-as-platform": plan(without='backend: "pytorch"', instead='platform: "onnxruntime"'),
    "platform-as-backend": plan(without='backend: "pytorch"', instead='backend: "onnxruntime_onnx"'),
    "misspelt-backend": plan(without='backend: "pytorch"', instead='backend: "pytroch"'),
    "contradiction": plan('platform: "onnxruntime_onnx"'),
    "unknown-backend": plan(without='backend: "pytorch"', instead='backend: "ours"'),
    "own-runtime": python('runtime: "libtriton_python.so"'),
    "python-based-runtime": plan('runtime: "model.py"'),
    "other-runtime": plan('runtime: "nope.py"'),
    "runtime-of-another": plan('runtime: "libtriton_onnxruntime.so"'),
    "program-as-runtime": python('runtime: "model.py"'),
    "steps-without-ensemble": plan("ensemble_scheduling { " + step() + " }"),
    "ensemble-with-backend": ensemble(step(), more='max_batch_size: 8 backend: "python"'),
    "ensemble-without-steps": Case(f'platform: "ensemble" {X} {Y}', {}, ("1",)),
    # tensors
    "no-name": plan(without='name: "X"'),
    "no-type": plan(without="data_type: TYPE_FP32"),
    "no-dims": plan(without="dims: [ 4 ] }\noutput", instead="}\noutput"),
    "zero-dim": plan(without="[ 4 ]", instead="[ 0 ]"),
    "minus-two": plan(without="[ 4 ]", instead="[ -2 ]"),
    "reshape-differs": plan(without="dims: [ 4 ] }\noutput", instead="dims: [ 4 ] reshape { shape: [ 3 ] } }\noutput"),
    "reshape-varies": plan(
        without="dims: [ 4 ] }\noutput", instead="dims: [ -1, 4 ] reshape { shape: [ 2, -1, 1 ] } }\noutput"
    ),
    "reshape-to-nothing": plan(
        without="max_batch_size: 8", instead='input { name: "Z" data_type: TYPE_FP32 dims: 1 reshape {} }'
    ),
    "nchw": plan(without="dims: [ 4 ] }\noutput", instead="dims: [ 4 ] format: FORMAT_NCHW }\noutput"),
    "shape-tensor": Case(PLAN.replace("[ 4 ] }\noutput", "[ 4 ] is_shape_tensor: true }\noutput"), {"1/model.pt": b""}),
    "two-of-a-name": plan(X),
    "type-as-number": plan(without="TYPE_FP32", instead="99"),
    "batch-input": plan(
        'batch_input { kind: BATCH_ELEMENT_COUNT target_name: "c" data_type: TYPE_FP32 source_input: "Z" }'
    ),
    # scheduling
    "negative-batch": plan(without="max_batch_size: 8", instead="max_batch_size: -1"),
    "preferred": plan("dynamic_batching { preferred_batch_size: 9 }"),
    "preferred-zero": plan("dynamic_batching { preferred_batch_size: 0 }"),
    "no-batch-dynamic": plan("dynamic_batching {}", without="max_batch_size: 8"),
    "preferred-oldest": plan("sequence_batching { oldest { preferred_batch_size: 9 } }"),
    "no-default-priority": plan("dynamic_batching { priority_levels: 2 }"),
    "no-such-priority": plan(
        "dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value {} } }"
    ),
    "order-and-priorities": plan(
        "dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }"
    ),
    "order-and-delay": plan(
        "dynamic_batching { preserve_ordering: true "
        "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1 } }"
    ),
    "control-without-values": plan(SEQUENCE % ""),
    "control-of-one": plan(SEQUENCE % "int32_false_true: 1"),
    "controls-twice": plan(
        "sequence_batching { "
        + 2 * 'control_input { name: "S" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } } '
        + "}"
    ),
    "correlation-type": plan(
        'sequence_batching { control_input { name: "S" '
        "control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32 } } }"
    ),
    "slots": plan("sequence_batching { direct { minimum_slot_utilization: 2 } }"),
    "cached-sequence": plan("response_cache { enable: true } " + SEQUENCE % "int32_false_true: [ 0, 1 ]"),
    "cached-decoupled": plan("response_cache { enable: true } model_transaction_policy { decoupled: true }"),
    "warm-varies": python(WARM % ("[ -1 ]", "zero_data: true")),
    "warm-without-data": python(WARM % ("[ 4 ]", "")),
    "warm-without-file": python(WARM % ("[ 4 ]", 'input_data_file: "x"')),
    "warm-other-input": python((WARM % ("[ 4 ]", "zero_data: true")).replace('"X"', '"Z"')),
    # the graph
    "not-onnx": Case(ADD, {"1/model.onnx": b"no graph"}),
    "other-input": add(without='"INPUT1"', instead='"INPUT_1"'),
    "missing-input": add(without=', { name: "INPUT1" data_type: TYPE_INT32 dims: [ 16 ] }'),
    "other-output": add(without='"OUTPUT1"', instead='"OUT"'),
    "other-type": add(without='"INPUT1" data_type: TYPE_INT32', instead='"INPUT1" data_type: TYPE_INT64'),
    "batch-repeated": add(
        without='"INPUT1" data_type: TYPE_INT32 dims: [ 16 ]', instead='"INPUT1" data_type: TYPE_INT32 dims: [ -1, 16 ]'
    ),
    "other-dims": add(
        without='"INPUT1" data_type: TYPE_INT32 dims: [ 16 ]', instead='"INPUT1" data_type: TYPE_INT32 dims: [ 8 ]'
    ),
    "variable-over-fixed": add(
        without='"INPUT1" data_type: TYPE_INT32 dims: [ 16 ]', instead='"INPUT1" data_type: TYPE_INT32 dims: [ -1 ]'
    ),
    "narrowed-output": add(model=add_sub(("batch", "n"))),
    "fixed-batch": add(model=add_sub((1, 16))),
    "could-batch": Case(
        ADD.replace("max_batch_size: 8", "").replace("[ 16 ]", "[ -1, 16 ]"), {"1/model.onnx": _onnx(add_sub())}
    ),
    "optional-input": add(without='"INPUT1"', instead='"INPUT1" optional: true'),
    "not-a-scalar": Case(
        'backend: "onnxruntime" input { name: "X" data_type: TYPE_FP32 dims: 2 } '
        'output { name: "Y" data_type: TYPE_FP32 dims: 1 }',
        {"1/model.onnx": _onnx(identity(TensorProto.FLOAT, ()))},
    ),
    "no-weights": Case(
        'backend: "onnxruntime"', {"1/model.onnx": _onnx(with_external_data(linear(), "model.onnx.data"))}
    ),
    "weights-elsewhere": Case(
        'backend: "onnxruntime"', {"1/model.onnx": _onnx(with_external_data(linear(), "../w")), "w": bytes(48)}
    ),
    "cut-weights": Case(
        'backend: "onnxruntime"',
        {"1/model.onnx": _onnx(with_external_data(linear(), "w")), "1/w": bytes(47)},
    ),
    # ensembles
    "no-member": ensemble(step("plam")),
    "no-directory": ensemble(step(), directories=()),
    "with-instances": ensemble(step(), more="max_batch_size: 8 instance_group { kind: KIND_CPU }"),
    "with-optimization": ensemble(step(), more="max_batch_size: 8 optimization { priority: PRIORITY_MAX }"),
    "with-warm-up": ensemble(step(), more="max_batch_size: 8 " + WARM % ("[ 4 ]", "zero_data: true")),
    "no-step": ensemble(""),
    "no-map": ensemble('step { model_name: "plan" model_version: -1 output_map { key: "Y" value: "Y" } }'),
    "circle": ensemble(step(x="a", y="b") + step(x="b", y="a") + step()),
    "in-itself": ensemble(step("in-itself")),
    "made-twice": ensemble(step() + step()),
    "makes-its-input": ensemble(step(y="X") + step()),
    "unmade-output": ensemble(step(y="t")),
    "dangling": ensemble(step(x="t")),
    "unused": ensemble(step() + step(y="t")),
    "unused-input": ensemble(step(), x=X + ' input { name: "Z" data_type: TYPE_FP32 dims: [ 4 ] }'),
    "member-input": ensemble(step().replace('key: "X"', 'key: "x"')),
    "member-output": ensemble(step().replace('key: "Y"', 'key: "YY"')),
    "unmapped": ensemble(step("two-inputs")),
    "two-inputs": plan('input { name: "Z" data_type: TYPE_FP32 dims: [ 4 ] }'),
    "ensemble-type": ensemble(step(), x=X.replace("FP32", "INT32")),
    "ensemble-dims": ensemble(step(), y=Y.replace("4", "5")),
    "ensemble-wild": ensemble(step(), y=Y.replace("4", "-1")),
    "ensemble-batch": ensemble(step(), more="max_batch_size: 16"),
    "ensemble-unbatched": ensemble(step("no-batch")),
    "ensemble-unbatched-whole": ensemble(step("no-batch-whole")),
    "no-batch-whole": Case(PLAN.replace("max_batch_size: 8", "").replace("[ 4 ]", "[ -1, 4 ]")),
    "member-version": ensemble(step("two-versions", version="model_version: 2")),
    "no-member-version": ensemble(step(version="")),
    "broken-member": ensemble(step("renamed")),
    # instances
    "gpu": plan("instance_group { kind: KIND_GPU }"),
    "gpu-9": plan("instance_group { kind: KIND_GPU gpus: [ 9 ] }"),
    "auto-with-gpus": plan("instance_group { gpus: [ 0 ] }"),
    "cpu-with-gpus": plan("instance_group { kind: KIND_CPU gpus: [ 0 ] }"),
    "model-with-gpus": plan("instance_group { kind: KIND_MODEL gpus: [ 0 ] }"),
    "profile": Case(PLAN + 'instance_group { kind: KIND_CPU profile: "1" }', {"1/model.pt": b""}),
    "profile-word": plan('instance_group { kind: KIND_CPU profile: "first" }'),
    "spans-two": Case(
        'backend: "vllm" instance_group { kind: KIND_CPU }', {"1/model.json": b'{"tensor_parallel_size": 2}'}
    ),
    "accelerators": add(accelerated("gpu_execution_accelerator", "tensorrt", precision_mode="FP16")),
    "cuda-again": add(accelerated("gpu_execution_accelerator", "cuda", gpu_mem_limit="7")),
    "accelerator-of-gpus": add(accelerated("gpu_execution_accelerator", "tensorrt", workspace="1")),
    "accelerator-of-no-use": add(
        accelerated("gpu_execution_accelerator", "tensorrt", workspace="1") + "instance_group { kind: KIND_CPU }"
    ),
    "accelerator-of-another": plan(accelerated("cpu_execution_accelerator", "xnnpack")),
    "accelerator-unknown": add(accelerated("cpu_execution_accelerator", "xnnpack")),
    "accelerator-twice": add(accelerated("cpu_execution_accelerator", "openvino", "openvino")),
    "execution-mode": add(parameter("execution_mode", "1")),
    "execution-mode-2": add(parameter("execution_mode", "2")),
    "arena-perhaps": add(parameter("enable_mem_arena", "perhaps")),
    "threads-many": add(parameter("intra_op_thread_count", "many")),
    "newer-field": plan('model_metrics { metric_control { metric_identifier { family: "f" } } }'),
    "newer-platform": Case(PLAN + 'platform: "torch_aoti"', {"1/model.pt2": b""}),
    "newer-opset": add(model=of_opset(add_sub(), 23)),
    "one-decoupled": ensemble(step("decoupled", y="t") + step(x="t", y="a") + step(x="t", y="b") + joined("a", "b")),
    "two-decoupled": ensemble(step("decoupled", y="a") + step("decoupled", y="b") + joined("a", "b")),
    "decoupled-in-a-row": ensemble(step("decoupled", y="a") + step("decoupled", x="a", y="b") + joined("b", "b")),
    "decoupled-and-not": ensemble(step("decoupled", y="a") + joined("X", "a")),
    "decoupled-inside": ensemble(step("decoupled")),
    "two-decoupled-inside": ensemble(step("decoupled-inside", y="a") + step("nested", y="b") + joined("a", "b")),
    "two-decoupled-answers": ensemble(
        step("decoupled") + step(y="W"), more="max_batch_size: 8 " + Y.replace('"Y"', '"W"')
    ),
    "newer-in-ensemble": ensemble(step() + "max_inflight_requests: 4"),
}


def write(repository: Path, *names: str) -> None:
    """These cases, or all."""
    for name in names or CASES:
        case = CASES[name]
        model = repository / name
        model.mkdir(parents=True)
        for directory in case.directories:
            (model / directory).mkdir()
        for path, content in case.files.items():
            (model / path).parent.mkdir(exist_ok=True)
            (model / path).write_bytes(content)
        if case.config is not None:
            (model / "config.pbtxt").write_bytes(
                case.config if isinstance(case.config, bytes) else case.config.encode()
            )
