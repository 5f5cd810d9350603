"""BERT, RoBERTa and XLM-R as embedding models (MiniLM, E5, BGE): bidirectional, LayerNorm after each residual sum,
learned positions, token types, biases and GELU; with sentence-transformers' pooling and normalization.
"""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.dialects.encoders import ROBERTA, bert, embedding
from nemoport.exporters.layouts import PADDED
from nemoport.exporters.rules import Column, Rule

PREFIXES = ("bert.", "roberta.")
"""Below which a model with a head of its own keeps its encoder."""
BUFFERS = {
    "*embeddings.position_ids": "counted positions",
    "*embeddings.token_type_ids": "token types of nothing",
}


def names(prefix: str) -> tuple[Rule, ...]:
    embeddings, layer = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{i}}."
    return (
        *naming.rules({f"{embeddings}word_embeddings.weight": "embed.weight"}, PADDED),
        *naming.rules(
            {
                f"{embeddings}position_embeddings.weight": "positions.weight",
                f"{embeddings}token_type_embeddings.weight": "token_types.weight",
                f"{embeddings}LayerNorm.*": "embed_norm.*",
            }
        ),
        *naming.layer(
            layer,
            {
                "attention.self.query.*": "attn.q.*",
                "attention.self.key.*": "attn.k.*",
                "attention.self.value.*": "attn.v.*",
                "attention.output.dense.*": "attn.o.*",
                "attention.output.LayerNorm.*": "attn_norm.*",
                "intermediate.dense.*": "ffn.up.*",
                "output.dense.*": "ffn.down.*",
                "output.LayerNorm.*": "ffn_norm.*",
            },
        ),
    )


# sentence-transformers takes a model that says nothing as one with mean pooling and no normalization.
_EMBEDDING = embedding(normalized=False)
HUGGINGFACE = (
    bert("bert", ("BertModel", "BertForMaskedLM", "BertForPreTraining"), *_EMBEDDING),
    bert("roberta", ("RobertaModel", "RobertaForMaskedLM"), *_EMBEDDING, kind=ROBERTA),
    bert("xlm-roberta", ("XLMRobertaModel", "XLMRobertaForMaskedLM"), *_EMBEDDING, kind=ROBERTA),
)

COLUMNS = {
    "huggingface": Column(
        rules=(*names(""), *(rule for prefix in PREFIXES for rule in names(prefix))),
        dialects=HUGGINGFACE,
        buffers={
            **BUFFERS,
            "*pooler.dense.*": "pooler, which no embedding goes through",
            "cls.*": "heads of pre-training",
            "lm_head.*": "heads of pre-training",
        },
        loads=("transformers 4.43 or later", "sentence-transformers", "vLLM", "Text Embeddings Inference"),
    ),
}
