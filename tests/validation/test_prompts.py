"""Prompts fit any model, and reach all of it that they can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nemoport.spec import Attention, Block, Dense, LanguageModel, ModelSpec, Norm, Rope
from nemoport.validation.prompts import Prompt, prompts


def spec(vocab_size: int = 300, max_positions: int = 4096, window: int | None = None) -> ModelSpec:
    mixer = Attention(heads=2, kv_heads=1, head_dim=4, rope=Rope(dims=4), window=window)
    return ModelSpec(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=8,
        max_positions=max_positions,
        norm=Norm(),
        head=LanguageModel(),
        blocks=(Block(mixer=mixer, ffn=Dense(intermediate=16)),) * 2,
    )


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("max_positions", [1, 2, 8, 100, 131072])
@pytest.mark.parametrize("vocab_size", [1, 11, 128256])
def test_prompts_fit_the_model(vocab_size: int, max_positions: int, batch: int) -> None:
    for prompt in prompts(spec(vocab_size, max_positions), batch):
        assert prompt.tokens.shape == prompt.mask.shape == prompt.positions.shape
        assert 1 <= len(prompt.tokens) <= batch
        assert prompt.real.any(axis=1).all()
        assert 0 <= prompt.tokens.min() <= prompt.tokens.max() < vocab_size
        assert 0 <= prompt.positions.min() <= prompt.positions.max() < max_positions
        for mask, positions in zip(prompt.real, prompt.positions, strict=True):
            assert (np.diff(positions[mask]) > 0).all()


def test_prompts_are_the_same_every_time() -> None:
    for one, other in zip(prompts(spec(), 8), prompts(spec(), 8), strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.positions, other.positions)


def test_some_rows_are_padded_even_one_at_a_time() -> None:
    assert any(not prompt.real.all() for prompt in prompts(spec(), 1))


def test_the_last_position_is_met() -> None:
    for model in (spec(), spec(window=16)):
        assert max(prompt.positions.max() for prompt in prompts(model, 8)) == model.max_positions - 1


def test_windows_see_neighbours_only() -> None:
    """A cache counts keys and a mask of positions counts positions: with gaps the two would differ."""
    far = prompts(spec(window=16), 8)[-1]
    assert (np.diff(far.positions) == 1).all()


def test_turned_rows_are_the_same_rows() -> None:
    prompt = prompts(spec(), 8)[2]
    assert isinstance(prompt.turned, Prompt)
    assert np.array_equal(prompt.turned.tokens[::-1], prompt.tokens)
    assert np.array_equal(prompt.turned.turned.positions, prompt.positions)


def test_another_model_gets_its_own_tokens() -> None:
    small = replace(spec(), vocab_size=11)
    assert all(prompt.tokens.max() < 11 for prompt in prompts(small, 8))
