"""What a model is (`ModelSpec`), how a target wants it (`Plan`), and the canonical tensors that follow from both.

A spec is read from any config and written to any config. Canonical tensors are unfused, unsharded and finest-grained,
and are named by place: `embed.weight`, `positions.weight`, `layers.0.attn.q.weight`, `layers.0.ffn.gate.weight`,
`norm.weight`, `head.weight`. Every axis says what it counts (`heads`, `ffn`, `vocab`...), which is all that sharding
needs to know.
"""

from nemoport.spec.as_json import plan_from_json, spec_from_json, to_json
from nemoport.spec.axes import Axis, TensorSpec
from nemoport.spec.dividing import check_divisible
from nemoport.spec.feed_forward import Activation, Dense, FeedForward, Groups, Mixture, Router, Score
from nemoport.spec.heads import Classifier, Embedding, Head, LanguageModel, Pooling
from nemoport.spec.mixers import Attention, LatentAttention, Mamba, Mixer, State
from nemoport.spec.model import Block, ModelSpec, attention_windows, parameter_count, tensors
from nemoport.spec.norm import Norm, NormKind
from nemoport.spec.plan import DTYPES, Plan, Profile, Recipe, VocabPolicy, Weights
from nemoport.spec.rope import LinearScaling, Llama3Scaling, Rope, RopeScaling, YarnScaling

__all__ = [
    "DTYPES",
    "Activation",
    "Attention",
    "Axis",
    "Block",
    "Classifier",
    "Dense",
    "Embedding",
    "FeedForward",
    "Groups",
    "Head",
    "LanguageModel",
    "LatentAttention",
    "LinearScaling",
    "Llama3Scaling",
    "Mamba",
    "Mixer",
    "Mixture",
    "ModelSpec",
    "Norm",
    "NormKind",
    "Plan",
    "Pooling",
    "Profile",
    "Recipe",
    "Rope",
    "RopeScaling",
    "Router",
    "Score",
    "State",
    "TensorSpec",
    "VocabPolicy",
    "Weights",
    "YarnScaling",
    "attention_windows",
    "check_divisible",
    "parameter_count",
    "plan_from_json",
    "spec_from_json",
    "tensors",
    "to_json",
]
