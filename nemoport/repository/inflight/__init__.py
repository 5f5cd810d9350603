"""The five models that TensorRT-LLM up to 1.2 is served by on Triton: what the engine says of itself, what its backend
may be told, the tensors that pass between them, and their configs."""
