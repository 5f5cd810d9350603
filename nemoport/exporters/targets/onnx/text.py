"""What a server needs besides the graph to answer in text: the tokenizer, and which tokens end a text."""

from __future__ import annotations

from nemoport.artifact import json_bytes
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import tokenizer

END = "eos_token_id"


def beside(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Nothing for a model without a tokenizer."""
    if not checkpoint.tokenizer:
        return {}
    special = tokenizer.special_ids(checkpoint.tokenizer)
    said = checkpoint.config.get(END)  # may be several
    special_ids = special if said is None else {**special, END: said}
    return {**tokenizer.files(checkpoint.tokenizer), "generation_config.json": json_bytes(special_ids)}
