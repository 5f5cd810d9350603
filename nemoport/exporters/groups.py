"""Groups: linears of a layer that read one input. Runtimes fuse them into one, and a norm may feed them alone.

layers.0.attn.{q,k,v}   fed by layers.0.attn_norm
layers.0.ffn.{gate,up}  fed by layers.0.ffn_norm
layers.0.attn.o         alone
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nemoport.spec import TensorSpec

FUSED = (("q", "k", "v"), ("gate", "up"))
"""The last words of linears that a runtime may fuse, below one prefix."""
FEEDS = {"attn": "attn_norm", "ffn": "ffn_norm"}
"""A half of a layer, and the norm before it: where all that the half reads is one group, the norm feeds it alone."""
ROUTING = ("router", "shared_gate")
"""What decides which experts see a token: never quantized."""
_LINEAR = re.compile(r"(?P<half>layers\.\d+\.\w+)\.(?P<within>.*\.)?(?P<last>\w+)\.weight")


@dataclass(frozen=True)
class Group:
    linears: tuple[str, ...]
    """Canonical names without `.weight`, in the order of the model."""
    norm: str | None
    """The norm whose output nothing else reads, without `.weight`."""

    @property
    def name(self) -> str:
        """That of the first, which stands for all: they read the same."""
        return self.linears[0]


def groups(specs: Mapping[str, TensorSpec]) -> Iterator[Group]:
    """Every linear of every layer, each in one group, in the order of the model."""
    linears = [name for name, spec in specs.items() if is_linear(name, spec)]
    seen: set[str] = set()
    for name in linears:
        if name in seen:
            continue
        match = _LINEAR.fullmatch(name)
        prefix, last = name.removesuffix(".weight").rpartition(".")[::2]
        together = next((words for words in FUSED if last in words), (last,))
        members = [each for word in together if (each := f"{prefix}.{word}.weight") in specs]
        seen |= set(members)
        norm = _norm(match["half"], members, specs) if match and not match["within"] else None
        yield Group(tuple(each.removesuffix(".weight") for each in members), norm)


def is_linear(name: str, spec: TensorSpec) -> bool:
    """Of a layer: embeddings, output matrix and routing are never quantized."""
    match = _LINEAR.fullmatch(name)
    return match is not None and len(spec.axes) == 2 and match["last"] not in ROUTING


def _norm(half: str, members: list[str], specs: Mapping[str, TensorSpec]) -> str | None:
    layer, _, kind = half.rpartition(".")
    norm = f"{layer}.{FEEDS.get(kind, '')}"
    if f"{norm}.weight" not in specs:
        return None
    width = specs[f"{norm}.weight"].axes[0]
    readers = {name for name, spec in specs.items() if name.startswith(f"{half}.") and spec.axes[-1] == width}
    readers = {name for name in readers if len(specs[name].axes) > 1}
    return norm if readers == set(members) else None
