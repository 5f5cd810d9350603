"""An ONNX graph as ONNX Runtime's optimizer leaves it for one provider, written with its weights beside it.

python3 optimize.py GRAPH OPTIMIZED PROVIDER basic|extended|all
"""

import sys
from pathlib import Path

import onnxruntime

LEVELS = {
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
WITHIN = 1024
"""Bytes of a tensor that stays in the graph, where shapes are read; protobuf ends at 2 GB."""

graph, optimized, provider, level = sys.argv[1:]
Path(optimized).parent.mkdir(parents=True, exist_ok=True)
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads = 1
options.graph_optimization_level = LEVELS[level]
options.optimized_model_filepath = optimized
beside = "session.optimized_model_external_initializers"
options.add_session_config_entry(f"{beside}_file_name", f"{Path(optimized).name}.data")
options.add_session_config_entry(f"{beside}_min_size_in_bytes", str(WITHIN))
if provider == "CUDAExecutionProvider":
    onnxruntime.preload_dlls()  # where pip installed CUDA's libraries
session = onnxruntime.InferenceSession(graph, options, providers=[provider])
if provider not in session.get_providers():
    sys.exit(f"Error: ONNX Runtime could not start {provider} and would build for {session.get_providers()[0]}")
