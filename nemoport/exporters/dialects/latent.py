"""Latent attention in Megatron-core's words (`MLATransformerConfig`) and in Hugging Face's, as rows."""

from __future__ import annotations

from typing import Any

from nemoport.errors import UnsupportedInput
from nemoport.exporters.configs import Config, Key, Keys, Mark, Row, flag, number, whole_number
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ROPE
from nemoport.exporters.dialects.kinds import or_none
from nemoport.exporters.dialects.rows import Scaling
from nemoport.spec import YarnScaling

FIXED = {"mixer": "latent", "rope_interleaved": True}
"""Pairs lie side by side: Megatron-core and DeepSeek take them apart before they rotate halves."""


def _rank(key: str, absent: int) -> Keys:
    """Null is none; a key that is not there is what the config's class takes."""
    return Keys("q_rank", lambda config: or_none(whole_number, config.get(key, absent)), lambda rank: {key: rank})


_YARN: dict[str, tuple[str, float]] = {
    "factor": ("rotary_scaling_factor", 40),
    "beta_fast": ("beta_fast", 32),
    "beta_slow": ("beta_slow", 1),
}
_YARN |= {"mscale": ("mscale", 1.0), "mscale_all_dim": ("mscale_all_dim", 0.0)}
"""Our word, Megatron-core's, and what it takes an absent one for."""


def _megatron_scaling(config: Config) -> Scaling:
    """YaRN by 1 is none, and with rope of the plain type only its mscale is looked at, which then scales scores."""

    def said(word: str) -> float:
        key, absent = _YARN[word]
        return float(absent if config.get(key) is None else config[key])

    factor, all_dim = number(said("factor")), said("mscale_all_dim")
    if factor <= 1:
        return None
    if (config.get("rope_type") or "yarn") == "rope":
        if all_dim:
            raise UnsupportedInput(
                f"the config has mscale_all_dim {all_dim:g} and rope_type 'rope', which scales scores alone; "
                "nemoport knows it with 'yarn'"
            )
        return None
    original = config.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 4096
    made = YarnScaling(
        factor=factor,
        original_max_positions=whole_number(original),
        beta_fast=number(said("beta_fast")),
        beta_slow=number(said("beta_slow")),
        mscale=said("mscale") if all_dim else 1.0,
        mscale_all_dim=all_dim,
    )
    if all_dim or said("mscale") == 1.0:
        return made
    return YarnScaling(**{**vars(made), "attention_factor": made.temperature(said("mscale"))})


def _to_megatron_scaling(scaling: Scaling) -> dict[str, Any]:
    if not isinstance(scaling, YarnScaling):
        return {"rope_type": "rope"}
    numbers = {key: getattr(scaling, word) for word, (key, _) in _YARN.items()}
    return {"rope_type": "yarn", "original_max_position_embeddings": scaling.original_max_positions} | numbers


MEGATRON_LATENT: tuple[Row, ...] = (
    _rank("q_lora_rank", 512),
    Key("kv_rank", "kv_lora_rank", 512, whole_number),
    Key("nope_dims", "qk_head_dim", 128, whole_number),
    Key("rope_dims", "qk_pos_emb_head_dim", 64, whole_number),
    Key("v_dims", "v_head_dim", 128, whole_number),
    # Megatron-core has one eps. The key is nemoport's, for those who know that the model began with another.
    Key("latent_eps", "latent_layernorm_epsilon", lambda words: words["eps"], number),
    Key("rope_base", "rotary_base", 10000.0, number),
    Keys("rope_scaling", _megatron_scaling, _to_megatron_scaling),
)
OF_LATENT = (
    Mark("multi_latent_attention", True, absent=False),
    Mark("qk_layernorm", True, absent=False),  # without it latents are not normed
    Mark("experimental_attention_variant", None),
    Mark("window_size", None),
)
INTERLEAVED = Key("rope_interleaved", "rope_interleave", True, flag)
_LATENT_EPS = 1e-6

HUGGINGFACE_LATENT: tuple[Row, ...] = (
    Keys(
        "heads",
        lambda config: whole_number(config["num_attention_heads"]),
        lambda heads: {"num_attention_heads": heads, "num_key_value_heads": heads},
    ),
    _rank("q_lora_rank", 1536),
    Key("kv_rank", "kv_lora_rank", 512, whole_number),
    Key("nope_dims", "qk_nope_head_dim", 128, whole_number),
    Key("rope_dims", "qk_rope_head_dim", 64, whole_number),
    Key("v_dims", "v_head_dim", 128, whole_number),
    # The class of the norm has it, and no key: DeepSeek's own code and transformers give the norms of latents no eps.
    Keys("latent_eps", lambda config: _LATENT_EPS, lambda eps: {}),
    *HUGGINGFACE_ROPE,
)
