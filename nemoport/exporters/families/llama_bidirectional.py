"""Llama that sees both ways, as an embedding model: NeMo's `LlamaEmbeddingModel` and NVIDIA's
`LlamaBidirectionalModel` (llama-nemotron-embed, NV-EmbedQA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemoport.exporters import naming
from nemoport.exporters.configs import Dialect, Mark, Row
from nemoport.exporters.dialects.encoders import NO_TEXT, embedding
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ROPE, RMS_EPS, huggingface, huggingface_sizes
from nemoport.exporters.dialects.megatron import (
    BIDIRECTIONAL,
    GATED,
    MEGATRON_ROPE,
    MEGATRON_SCALE,
    RMS,
    ROTARY,
    WHOLE_HEADS,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import Marks, biased, without
from nemoport.exporters.rules import Column


def of_megatron(*rows: Row, marks: Marks, fixed: Mapping[str, Any]) -> Dialect:
    """NeMo's config is that of a Llama; what makes it see both ways is the layer spec that it names
    (nemo/collections/llm/gpt/model/llama_embedding.py)."""
    shape = (*RMS, *GATED, Mark("activation_func", "silu", absent="gelu"), *ROTARY, *WHOLE_HEADS, *centered(False))
    return megatron(
        *MEGATRON_ROPE,
        *MEGATRON_SCALE,
        NO_TEXT,
        *rows,
        marks=(*shape, Mark("window_size", None), Mark("qk_layernorm", False, absent=False), *marks),
        fixed={"causal": False, **fixed},
        attention=BIDIRECTIONAL,
    )


def of_huggingface(model_type: str, architecture: str, *rows: Row, marks: Marks = ()) -> Dialect:
    """transformers 5 takes `is_causal` for its own Llama too."""
    written = (Mark("architectures", [architecture]), Mark("hidden_act", "silu", absent="silu"), *marks)
    sizes = without(huggingface_sizes(RMS_EPS), (NO_TEXT,))
    biases = (*biased("attention_bias", "qkv_bias", "out_bias"), *biased("mlp_bias", "ffn_bias"))
    return huggingface(
        model_type,
        architecture,
        *sizes,
        NO_TEXT,
        *HUGGINGFACE_ROPE,
        *biases,
        *rows,
        marks=written,
        fixed={"causal": False},
        constants={"is_causal": False},
    )


_EMBEDDING = embedding(normalized=True)  # as NeMo's own `encode` and exporters do
NO_OUTPUT = {"output_layer.weight": "output matrix of a model that writes no text"}
LOADS = ("vLLM", "NeMo AutoModel", "transformers with NVIDIA's llama_bidirectional_model.py")

COLUMNS = {
    "megatron": Column(
        rules=naming.MEGATRON_GATED,
        dialects=(of_megatron(marks=(Mark("pool_type", None),), fixed={"pooling": "avg", "normalized": True}),),
        buffers=NO_OUTPUT,
    ),
    "huggingface": Column(
        rules=(*naming.bare(naming.HUGGINGFACE), *naming.HUGGINGFACE),
        dialects=(
            of_huggingface("llama_bidirec", "LlamaBidirectionalModel", *_EMBEDDING),
            of_huggingface("llama", "LlamaModel", *_EMBEDDING, marks=(Mark("is_causal", False, absent=True),)),
        ),
        loads=LOADS,
    ),
}
