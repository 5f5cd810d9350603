"""A whole model, and its canonical tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nemoport.spec.axes import Axis, Tensors, TensorSpec
from nemoport.spec.feed_forward import FeedForward
from nemoport.spec.heads import Head, LanguageModel
from nemoport.spec.mixers import Mixer
from nemoport.spec.norm import Norm
from nemoport.spec.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Block:
    """x += mixer(attn_norm(x)); x += ffn(ffn_norm(x)). Where a half is None, its norm is not there either.
    `post_norms`: what each half adds is normed once more, by `attn_post_norm` and `ffn_post_norm`.
    `norm_after`: x = attn_norm(x + mixer(x)), x = ffn_norm(x + ffn(x)), as in the first transformers."""

    mixer: Mixer | None
    ffn: FeedForward | None
    post_norms: bool = False
    norm_after: bool = False

    def parts(self, norm: Norm, hidden: Axis) -> dict[str, Tensors]:
        named: dict[str, Tensors] = {}
        for name, half in (("attn", self.mixer), ("ffn", self.ffn)):
            if half:
                named |= {f"{name}_norm": norm.tensors(hidden), name: half.tensors(hidden)}
                named |= {f"{name}_post_norm": norm.tensors(hidden)} if self.post_norms else {}
        return named


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    family: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    norm: Norm
    head: Head
    blocks: tuple[Block, ...]
    embedding_scale: float | None = None
    """What embeddings are multiplied with, in the dtype that is computed in."""
    learned_positions: bool = False
    """A row of `positions.weight` is added to each embedding."""
    first_position: int = 0
    """The row of a text's first token."""
    token_types: int = 0
    """Rows of `token_types.weight`, of which one is added to each embedding: question and answer, for example."""
    embedding_norm: bool = False
    """Embeddings are normed before the first block."""
    final_norm: bool = True
    """What the last block gives is normed."""

    @property
    def language_model(self) -> LanguageModel:
        """The head of a model that writes text; who asks knows that it does."""
        assert isinstance(self.head, LanguageModel), self.head
        return self.head

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.max_positions - self.first_position

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Of the blocks that have one."""
        return tuple(block.mixer for block in self.blocks if block.mixer)

    def shard(self, plan: Plan, rank: int) -> ModelSpec:
        """The model as one rank sees it: its stage's blocks, its share of heads and of the feed-forward.

        Ranks count tensor parallelism first: rank = stage * tp + position. The vocabulary stays global, since
        whether it is cut is the target's choice. `check_divisible` must hold.
        """
        layers = len(self.blocks) // plan.pp
        stage, position = divmod(rank, plan.tp)
        mine = self.blocks[stage * layers : (stage + 1) * layers]
        return replace(self, blocks=tuple(_share(block, plan, position) for block in mine))


def tensors(spec: ModelSpec) -> dict[str, TensorSpec]:
    """Every canonical tensor of the model, by name, in reading order."""
    return {tensor.name: tensor for tensor in _tensors(spec)}


def parameter_count(spec: ModelSpec) -> int:
    total = 0
    for tensor in tensors(spec).values():
        count = 1
        for size in tensor.shape:
            count *= size
        total += count
    return total


def attention_windows(spec: ModelSpec) -> tuple[int, ...]:
    """How far each layer looks back, taken in turns until the layers are through; where a layer has no window, all
    positions. Nothing where no layer has one."""
    if not any(mixer.window for mixer in spec.mixers):
        return ()
    each = [mixer.window or spec.max_positions for mixer in spec.mixers]
    turns = range(1, len(each) + 1)
    return tuple(each[: next(turn for turn in turns if all(each[i] == each[i % turn] for i in range(len(each))))])


def _tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    vocab = Axis("vocab", spec.vocab_size, spec.vocab_size)
    hidden = Axis("hidden", spec.hidden_size, spec.hidden_size)
    yield TensorSpec("embed.weight", (vocab, hidden))
    if spec.learned_positions:
        yield TensorSpec("positions.weight", (Axis("positions", spec.max_positions, spec.max_positions), hidden))
    if spec.token_types:
        yield TensorSpec("token_types.weight", (Axis("types", spec.token_types, spec.token_types), hidden))
    for name, axes in spec.norm.tensors(hidden).items() if spec.embedding_norm else ():
        yield TensorSpec(f"embed_norm.{name}", axes)
    for i, block in enumerate(spec.blocks):
        for part, named in block.parts(spec.norm, hidden).items():
            for name, axes in named.items():
                yield TensorSpec(f"layers.{i}.{part}.{name}", axes)
    for name, axes in spec.norm.tensors(hidden).items() if spec.final_norm else ():
        yield TensorSpec(f"norm.{name}", axes)
    for name, axes in spec.head.tensors(vocab, hidden).items():
        yield TensorSpec(name, axes)


def _share(block: Block, plan: Plan, position: int) -> Block:
    mixer, ffn = block.mixer, block.ffn
    return replace(
        block,
        mixer=mixer and mixer.share(plan.tp),
        ffn=ffn and ffn.share(plan, position),
    )
