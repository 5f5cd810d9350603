"""Llama that sees both ways, as a reranker: NeMo's `ReRankerModel` and NVIDIA's
`LlamaBidirectionalForSequenceClassification` (llama-nemotron-rerank, NV-RerankQA).
"""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.configs import PRESENT, Mark, choice
from nemoport.exporters.dialects.encoders import LABELS, POOLING, POOLINGS, TEMPERATURE
from nemoport.exporters.families.llama_bidirectional import LOADS, NO_OUTPUT, of_huggingface, of_megatron
from nemoport.exporters.rules import Column

_SCORE = naming.rules({"score.weight": "head.weight"})

COLUMNS = {
    "megatron": Column(
        rules=(*naming.headless(naming.MEGATRON_GATED), *_SCORE),
        dialects=(
            of_megatron(
                choice("pooling", "pool_type", POOLINGS, "avg"),
                TEMPERATURE,
                marks=(Mark("pool_type", PRESENT),),
                fixed={"labels": 1},
            ),
        ),
        buffers={**NO_OUTPUT, "score.bias": "bias that NeMo stores and does not add"},
    ),
    "huggingface": Column(
        rules=(*naming.headless(naming.HUGGINGFACE), *_SCORE),
        dialects=(
            of_huggingface(
                "llama_bidirec", "LlamaBidirectionalForSequenceClassification", LABELS, POOLING, TEMPERATURE
            ),
        ),
        loads=LOADS,
    ),
}
