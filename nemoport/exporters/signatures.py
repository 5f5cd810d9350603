"""What goes into a model that answers each text at once and what comes out, whatever it is written as."""

from __future__ import annotations

from nemoport.artifact import Signature, Tensor
from nemoport.spec import Classifier, Embedding, ModelSpec


def of_encoder(spec: ModelSpec, head: Embedding | Classifier) -> Signature:
    inputs = [Tensor(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")]
    if spec.token_types > 1:
        inputs.append(Tensor("token_type_ids", "int64", ("batch", "sequence")))
    if isinstance(head, Embedding) and head.matryoshka:
        inputs.append(Tensor("dimensions", "int64", ("batch", 1)))
    name, width = ("logits", head.labels) if isinstance(head, Classifier) else ("embeddings", spec.hidden_size)
    return Signature(inputs=tuple(inputs), outputs=(Tensor(name, "float32", ("batch", width)),))
