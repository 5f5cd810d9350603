"""PyTorch's distributed checkpoint without Megatron-core's files around it: Megatron-LM's `torch_dcp` and
`fsdp_dtensor`, or Hugging Face names as FSDP2 trainers (NeMo AutoModel, NeMo RL) save them.

Names are those of the modules, a layer each, below whatever the trainer calls its model; Megatron's FSDP stores the two
halves of a gated fc1 as `linear_fc1.weight_w` and `weight_v`. Megatron-LM's `args` are a pickle among the tensors.
Sources: Megatron-LM, training/checkpointing.py, core/transformer/fsdp_dtensor_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import distributed, megatron, tokenizer, torch_dist, torch_zip
from nemoport.exporters.formats.torch_dist import Contents
from nemoport.exporters.formats.tree import Directory
from nemoport.exporters.readers import huggingface
from nemoport.exporters.readers.torch_dist import checkpoint

WRAPS: tuple[str, ...] = ()
LOOKS_FOR = ".metadata with .distcp files"
NEEDED = (distributed.INDEX, "*.distcp/args")
files = distributed.tree
_ARGUMENTS = "args"
_EMBEDDING = "model.embed_tokens.weight"


def recognises(path: Path) -> bool:
    directory = distributed.locate(path)
    return directory is not None and distributed.kind(directory) == "torch_dcp"


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    directory = distributed.locate(path)
    assert directory is not None
    contents = torch_dist.read(Directory(directory))
    if any(name.endswith(_EMBEDDING) for name in contents.tensors):
        return huggingface_names(path, directory, contents, config)
    words = {**_arguments(contents), **(config or {})}
    writer = "Megatron-LM" if _ARGUMENTS in contents.objects else "PyTorch"
    return checkpoint(path, directory, format_name="torch_dcp", writer=writer, config=words, contents=contents)


def huggingface_names(path: Path, directory: Path, contents: Contents, config: Mapping[str, Any] | None) -> Checkpoint:
    """The checkpoint of one whose model is that of transformers, with the config that lies beside, if any."""
    beside = (directory, directory / ".hf_metadata", directory.parent, path)
    found = next((place for place in beside if (place / huggingface.CONFIG).is_file()), None)
    whole = next(name for name in contents.tensors if name.endswith(_EMBEDDING))
    prefix = whole.removesuffix(_EMBEDDING)
    tensors, skipped = {}, dict.fromkeys(contents.objects, "pickled object")
    for name, tensor in contents.tensors.items():
        if rule := megatron.skipped_by(name) or huggingface.skipped_by(name):
            skipped[name] = rule
        else:
            tensors[name.removeprefix(prefix)] = tensor
    return Checkpoint(
        path=path,
        format="torch_dcp",
        writer="PyTorch",
        naming="huggingface",
        config=huggingface.words(found, config) if found else dict(config or {}),
        tensors=tensors,
        skipped=skipped,
        tokenizer=tokenizer.find(*(Directory(place) for place in beside), Directory(directory.parent / "tokenizer")),
    )


def _arguments(contents: Contents) -> Mapping[str, Any]:
    """Megatron-LM's, where they are stored; what else lies there as a pickle is not opened."""
    store = contents.objects.get(_ARGUMENTS)
    arguments = torch_zip.load(store) if store else None
    return megatron.words_of_arguments(arguments) if isinstance(arguments, dict) else {}
