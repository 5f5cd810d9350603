"""The files that checkpoints are made of: pickles, zips, distributed metadata, safetensors, tokenizers."""
