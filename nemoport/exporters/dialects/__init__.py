"""What families share of their configs: keys of Megatron-core, Hugging Face and TensorRT-LLM, as rows. A family adds
what its own configs say, and marks them."""
