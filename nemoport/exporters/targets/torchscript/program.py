"""The source code of a model, in TorchScript's own form of Python: its classes, and what each computes."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from nemoport.artifact import Signature
from nemoport.exporters.formats.torchscript import Module
from nemoport.exporters.targets.torchscript.modules import layers
from nemoport.spec import Activation, Attention, Dense, ModelSpec, Rope

NUMBERS = {"float32": 6, "float16": 5, "bfloat16": 15}
"""Of dtypes, which the code calls by number (c10/core/ScalarType.h)."""
LEAST = 1e-12
"""The length by which shorter vectors are divided, as torch's `normalize` has it."""
ACTIVATIONS: dict[Activation, str] = {
    "silu": "torch.silu({0})",
    "gelu": "torch.gelu({0})",
    "gelu_tanh": 'torch.gelu({0}, approximate="tanh")',
    "quick_gelu": "{0} * torch.sigmoid({0} * 1.702)",
    "relu2": "torch.square(torch.relu({0}))",
}


def program(spec: ModelSpec, root: Module, signature: Signature, dtype: str) -> str:
    environment = Environment(  # noqa: S701  what is written is no page
        loader=PackageLoader("nemoport"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("torchscript.py.txt").render(
        spec=spec,
        norm=spec.norm,
        family=spec.family,
        modules={module.type: module for module in root}.values(),
        layers=layers(spec),
        signature=signature,
        answers=signature.outputs[0].name,
        ropes=ropes(spec),
        turns={"pairs" if rope.interleaved else "halves" for rope in ropes(spec)},
        qk_norm=any(isinstance(mixer, Attention) and mixer.qk_norm for mixer in spec.mixers),
        activation=_activation,
        least=LEAST,
        float32=NUMBERS["float32"],
        dtype=NUMBERS[dtype],
        dtypes=", ".join(f"{number} {name}" for name, number in NUMBERS.items()),
    )


def ropes(spec: ModelSpec) -> list[Rope]:
    """Each distinct rope once: most models have one, or none."""
    return [rope for rope in dict.fromkeys(mixer.rope for mixer in spec.mixers) if rope]


def _activation(ffn: Dense, x: str) -> str:
    return ACTIVATIONS[ffn.activation].format(x)
