"""A model that answers each text at once, with a vector or with logits over labels.

x = norm(embed[tokens] + token_types + positions);  the blocks of any model;  pooled over a text's tokens;  the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemoport.errors import UsageError
from nemoport.reference.decoder import enter, leave, run_block
from nemoport.reference.generate import prompt
from nemoport.reference.steps import Memory, Places, places
from nemoport.reference.weights import Weights
from nemoport.spec import Classifier, Embedding, ModelSpec, Pooling

LEAST = 1e-12
"""The length by which shorter vectors are divided, as torch's `normalize` has it."""


@dataclass(frozen=True)
class Encoder:
    spec: ModelSpec
    weights: Weights

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @torch.inference_mode()
    def answers(
        self,
        tokens: NDArray[Any],
        mask: NDArray[Any] | None = None,
        token_types: NDArray[Any] | None = None,
        dimensions: NDArray[Any] | None = None,
    ) -> NDArray[np.float32]:
        ids, real = prompt(self.device, self.spec.vocab_size, tokens, mask)
        where = places(real)
        pooled = pool(self.hidden(ids, self._types(token_types, tokens), where), where, self._head.pooling)
        answer: NDArray[np.float32] = self._answer(pooled, dimensions).float().cpu().numpy()
        return answer

    def hidden(self, tokens: Tensor, types: Tensor, where: Places) -> Tensor:
        """[batch, length, hidden] after the last norm."""
        spec, weights = self.spec, self.weights
        x = weights.gather("embed.weight", tokens)
        x = x + weights.gather("token_types.weight", types) if spec.token_types else x
        x = enter(spec, weights, x, where)
        for layer, block in enumerate(spec.blocks):
            x = run_block(block, spec.norm, weights, f"layers.{layer}", x, where, Memory(None, layer))
        return leave(spec, weights, x)

    @property
    def _head(self) -> Embedding | Classifier:
        assert isinstance(self.spec.head, Embedding | Classifier), self.spec.head
        return self.spec.head

    def _types(self, token_types: NDArray[Any] | None, tokens: NDArray[Any]) -> Tensor:
        types = np.zeros(tokens.shape, np.int64) if token_types is None else token_types.astype(np.int64)
        if types.shape != tokens.shape:
            raise UsageError(f"token types have shape {list(types.shape)}, the tokens {list(tokens.shape)}")
        if types.size and not 0 <= types.min() <= types.max() < max(1, self.spec.token_types):
            raise UsageError(f"token type {types.max()} is outside of the {self.spec.token_types} that the model has")
        return torch.from_numpy(types).to(self.device)

    def _answer(self, pooled: Tensor, dimensions: NDArray[Any] | None) -> Tensor:
        match head := self._head:
            case Embedding():
                if dimensions is not None:
                    kept = torch.from_numpy(dimensions.astype(np.int64)).to(pooled.device)
                    pooled = pooled * (torch.arange(pooled.shape[-1], device=pooled.device) < kept[:, None])
                return pooled / pooled.norm(dim=-1, keepdim=True).clamp(min=LEAST) if head.normalized else pooled
            case Classifier():
                x = pooled.to(self.weights.dtype)
                x = torch.tanh(self.weights.linear("pooler", x)) if head.pooler else x
                return self.weights.linear("head", x).float() / head.temperature


def pool(hidden: Tensor, where: Places, pooling: Pooling) -> Tensor:
    """[batch, length, hidden] to float32 [batch, hidden], over the real tokens of each row, counted from 0."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    real = where.real
    count = real.sum(1, keepdim=True).clamp(min=1)
    match pooling:
        case "avg":
            chosen = real / count
        case "cls":
            chosen = real & (where.keys == 0)
        case "last":
            chosen = real & (where.keys == count - 1)
    return (chosen[:, None].to(wide.dtype) @ wide)[:, 0]
