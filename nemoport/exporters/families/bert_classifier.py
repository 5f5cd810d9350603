"""BERT as a classifier or a reranker (`BertForSequenceClassification`): logits of the first token behind a pooler."""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.dialects.encoders import LABELS, bert
from nemoport.exporters.families.bert import BUFFERS, names
from nemoport.exporters.rules import Column

HEAD = {"pooling": "cls", "pooler": True, "head_bias": True}
LOADS = ("transformers 4.43 or later", "sentence-transformers (CrossEncoder)", "vLLM", "Text Embeddings Inference")

COLUMNS = {
    "huggingface": Column(
        rules=(
            *names("bert."),
            *naming.rules({"bert.pooler.dense.*": "pooler.*", "classifier.*": "head.*"}),
        ),
        dialects=(bert("bert", ("BertForSequenceClassification",), LABELS, fixed=HEAD),),
        buffers=BUFFERS,
        loads=LOADS,
    ),
}
