"""An ONNX graph as a TensorRT plan, with TensorRT 10.15 or later.

    python3 build_plan.py GRAPH PLAN SETTINGS TIMING_CACHE

SETTINGS is JSON: `shapes`, for each input its least, best and most; `flags` of trt.BuilderFlag; `optimization_level`
and `workspace` (bytes), or null for TensorRT's own. The precision is the graph's: the network is strongly typed, and
TF32 is off, since float32 means float32.
"""

import json
import sys
from pathlib import Path
from typing import NoReturn

import tensorrt as trt

FLAGS = {"refit": trt.BuilderFlag.REFIT, "version_compatible": trt.BuilderFlag.VERSION_COMPATIBLE}


def main(graph: str, plan: str, settings: str, timing_cache: str) -> None:
    said = json.loads(Path(settings).read_text())
    logger = trt.Logger(trt.Logger.INFO)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(graph):
        fail("its parser refuses the graph:", *(parser.get_error(number).desc() for number in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for flag in said["flags"]:
        config.set_flag(FLAGS[flag])
    if said["optimization_level"] is not None:
        config.builder_optimization_level = said["optimization_level"]
    if said["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, said["workspace"])
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in said["shapes"].items():
        profile.set_shape(name, least, best, most)
    if config.add_optimization_profile(profile) < 0:
        fail("it refuses the optimization profile; what it said stands above")
    use_timings(config, Path(timing_cache))
    made = builder.build_serialized_network(network, config)
    if made is None:
        fail("it could not build the plan; what it said stands above")
    Path(plan).parent.mkdir(parents=True, exist_ok=True)
    Path(plan).write_bytes(made)
    if found := config.get_timing_cache():
        Path(timing_cache).write_bytes(found.serialize())


def use_timings(config: trt.IBuilderConfig, path: Path) -> None:
    """Those of another release or GPU are left aside."""
    known = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def fail(*lines: str) -> NoReturn:
    sys.exit("\n".join((f"Error: TensorRT {trt.__version__}: {lines[0]}", *lines[1:])))


if __name__ == "__main__":
    main(*sys.argv[1:])
