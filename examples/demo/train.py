"""Train a byte-level llama on little fables with megatron-core on a CPU and leave it as Megatron-LM would.

    python examples/demo/train.py --output DIR --steps 1000 --seed 1234

    1. text.py tells the fables; every 16th is held out.
    2. One process (TP 1, PP 1) trains in fp32; the weights are rounded to bf16 and saved as torch_dist.
    3. Four processes (TP 2 x PP 2) load that, as any Megatron job of another shape would, and save it again.
    4. One process loads the result, compares every weight, and writes reference logits and a sample.

DIR gets `checkpoint/` (a Megatron run directory with its tokenizer) and `reference.npz`. Needs megatron-core, torch,
psutil, tokenizers and numpy; no GPU and no Transformer Engine.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil  # noqa: F401 - megatron-core's writer processes need it, and without it the save waits for ever
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer import TransformerConfig
from text import LONGEST, tell_fables
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TENSOR_PARALLEL, PIPELINE_PARALLEL = 2, 2  # of the checkpoint that is shipped
BEGIN, END, PAD = 256, 257, 258  # the ids after the 256 bytes
SPECIAL_TOKENS = {BEGIN: "<s>", END: "</s>", PAD: "<pad>"}
HELD_OUT_EVERY = 16  # fables
RUN = Path("checkpoint")  # in the output directory
PROMPTS = ("The fox Rufus lived in a den", "Once a wise owl named Olive")  # of the reference logits
SAMPLES = ("The fox ", "There was once a ", "One snowy evening ", *PROMPTS)  # continued at the end

# The architecture, in the words of Megatron-LM's arguments: what the model is built from and what common.pt records.
ARCHITECTURE = {
    "num_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 256,
    "swiglu": True,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "norm_epsilon": 1e-5,  # what releases before 0.16 call it
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "seq_length": 256,
    "max_position_embeddings": 256,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 256 + len(SPECIAL_TOKENS),
    "make_vocab_size_divisible_by": 128,
    "padded_vocab_size": 512,  # vocab_size, rounded up to 128 rows on each of TP 2 ranks
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the weights are learned; the rest of the arguments."""

    steps: int
    seed: int
    batch: int = 12
    peak_rate: float = 3e-3
    final_rate: float = 3e-4
    warmup: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    report_every: int = 100


# Text


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < BEGIN).decode(errors="replace")


def make_streams() -> tuple[torch.Tensor, torch.Tensor]:
    """The fables to train on and those held out, each as one stream `<s> fable, blank line </s> <s> fable ...`."""
    fables = tell_fables()
    held_out = fables[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    trained = [fable for index, fable in enumerate(fables, start=1) if index % HELD_OUT_EVERY]
    return join_fables(trained), join_fables(held_out)


def join_fables(fables: list[str]) -> torch.Tensor:
    return torch.tensor([token for fable in fables for token in (BEGIN, *encode(fable + "\n\n"), END)])


def draw_batch(stream: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Windows [size, seq_length + 1] of the stream: inputs, and the same moved by one as targets.

    Half of them begin where a fable does, at its `<s>` or behind it, as prompts do; the others anywhere.
    """
    window = ARCHITECTURE["seq_length"] + 1
    starts = torch.randint(len(stream) - window + 1, (size,), generator=generator)
    begins = (stream[:-window] == BEGIN).nonzero().flatten()
    half = size // 2
    starts[:half] = begins[torch.randint(len(begins), (half,), generator=generator)]
    starts[: half // 2] += 1
    return torch.stack([stream[start : start + window] for start in starts.tolist()])


def cut_windows(stream: torch.Tensor) -> torch.Tensor:
    """All of the stream in windows [n, seq_length + 1] whose targets do not overlap; the rest at the end is dropped."""
    return stream.unfold(0, ARCHITECTURE["seq_length"] + 1, ARCHITECTURE["seq_length"])


def write_tokenizer(directory: Path) -> None:
    """A tokenizer in the Hugging Face layout whose ids are the bytes: 65 is `A`."""
    directory.mkdir(parents=True)
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SPECIAL_TOKENS[token], special=True) for token in sorted(SPECIAL_TOKENS)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BEGIN],
        "eos_token": SPECIAL_TOKENS[END],
        "pad_token": SPECIAL_TOKENS[PAD],
        "clean_up_tokenization_spaces": False,
        "model_max_length": ARCHITECTURE["max_position_embeddings"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


# Model


@contextmanager
def model_parallel(rank: int, tensor: int, pipeline: int, rendezvous: Path) -> Iterator[None]:
    """This process as one rank of tensor x pipeline processes that talk over gloo."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=tensor * pipeline
    )
    parallel_state.initialize_model_parallel(tensor, pipeline)
    torch.cuda.current_device = lambda: "cpu"  # megatron-core asks for it wherever it allocates or moves a tensor,
    torch.cuda.synchronize = lambda: None  # and waits for it before it writes one
    initialize_rng_tracker(inference_rng_tracker=True)  # the one for training keeps CUDA states; no dropout, no need
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build_model() -> GPTModel:
    """This rank's part of the model, in fp32, from whatever TP and PP the process is in."""
    words = ARCHITECTURE
    config = TransformerConfig(
        num_layers=words["num_layers"],
        hidden_size=words["hidden_size"],
        num_attention_heads=words["num_attention_heads"],
        num_query_groups=words["num_query_groups"],
        kv_channels=words["kv_channels"],
        ffn_hidden_size=words["ffn_hidden_size"],
        gated_linear_unit=words["swiglu"],
        activation_func=F.silu,
        normalization=words["normalization"],
        layernorm_epsilon=words["layernorm_epsilon"],
        add_bias_linear=words["add_bias_linear"],
        add_qkv_bias=words["add_qkv_bias"],
        qk_layernorm=words["qk_layernorm"],
        rotary_interleaved=words["rotary_interleaved"],
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        # what follows are CUDA kernels
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=words["normalization"]),
        vocab_size=words["padded_vocab_size"],
        max_sequence_length=words["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not words["untie_embeddings_and_output_weights"],
        position_embedding_type=words["position_embedding_type"],
        rotary_percent=words["rotary_percent"],
        rotary_base=words["rotary_base"],
        parallel_output=False,
    )


def logits_of(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, padded_vocab_size] of tokens [b, s]."""
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    hidden_from = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)  # True: may not be seen
    return model(tokens, positions, hidden_from)


def loss_of(model: GPTModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats per byte."""
    logits = logits_of(model, windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def continue_greedily(model: GPTModel, prompt: str, limit: int) -> str:
    """The most likely continuation, up to `</s>` or `limit` bytes."""
    tokens = encode(prompt)
    start = len(tokens)
    while len(tokens) < start + limit:
        window = torch.tensor([tokens[-ARCHITECTURE["seq_length"] :]])
        token = int(logits_of(model, window)[0, -1, : ARCHITECTURE["vocab_size"]].argmax())
        if token == END:
            break
        tokens.append(token)
    return decode(tokens[start:])


# Training


def rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine from the peak rate to the final one."""
    if step < recipe.warmup:
        return recipe.peak_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.final_rate + (recipe.peak_rate - recipe.final_rate) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def held_out_loss(model: GPTModel, windows: torch.Tensor, batch: int) -> float:
    parts = windows.split(batch)
    return sum(loss_of(model, part).item() * len(part) for part in parts) / len(windows)


def train(model: GPTModel, trained: torch.Tensor, held_out: torch.Tensor, recipe: Recipe) -> None:
    """Change the model's weights in place; print the loss since the last line and on the held-out fables."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        betas=recipe.betas,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    windows = cut_windows(held_out)
    started, losses = time.monotonic(), []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, recipe)
        loss = loss_of(model, draw_batch(trained, recipe.batch, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % recipe.report_every == 0 or step + 1 == recipe.steps:
            print(
                f"step {step + 1:5d}  train {sum(losses) / len(losses):.3f}  "
                f"held out {held_out_loss(model, windows, recipe.batch):.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
            losses.clear()


# Checkpoint


def save(model: GPTModel, directory: Path, common: dict[str, object]) -> None:
    """Write this rank's shards; rank 0 also writes what is common to all."""
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save({**model.sharded_state_dict(), **common}, str(directory))


def load(directory: Path) -> GPTModel:
    """This rank's part of a checkpoint, in bf16, whatever TP and PP it was saved with."""
    model = build_model().bfloat16()
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(directory)), strict=False)
    return model.eval()


def reshape_checkpoint(rank: int, source: Path, target: Path, common: dict[str, object], rendezvous: Path) -> None:
    """One of TP 2 x PP 2 processes: load its part of `source` and save it to `target`."""
    with model_parallel(rank, TENSOR_PARALLEL, PIPELINE_PARALLEL, rendezvous):
        save(load(source), target, common)


def common_state(recipe: Recipe) -> dict[str, object]:
    """What Megatron-LM stores beside the weights, reduced to what describes this model and its training."""
    arguments = argparse.Namespace(
        **ARCHITECTURE,
        params_dtype=torch.bfloat16,
        bf16=True,
        fp16=False,
        tensor_model_parallel_size=TENSOR_PARALLEL,
        pipeline_model_parallel_size=PIPELINE_PARALLEL,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        sequence_parallel=False,
        world_size=TENSOR_PARALLEL * PIPELINE_PARALLEL,
        num_experts=None,
        multi_latent_attention=False,
        squared_relu=False,
        openai_gelu=False,
        quick_geglu=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        transformer_impl="local",
        ckpt_format="torch_dist",
        use_dist_ckpt=True,
        no_save_optim=True,
        no_save_rng=True,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model="tokenizer",
        train_iters=recipe.steps,
        iteration=recipe.steps,
        micro_batch_size=recipe.batch,
        global_batch_size=recipe.batch,
        consumed_train_samples=recipe.steps * recipe.batch,
        consumed_valid_samples=0,
        skipped_train_samples=0,
        optimizer="adam",
        lr=recipe.peak_rate,
        min_lr=recipe.final_rate,
        lr_decay_style="cosine",
        lr_warmup_iters=recipe.warmup,
        weight_decay=recipe.weight_decay,
        clip_grad=recipe.clip,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        seed=recipe.seed,
    )
    return {"args": arguments, "checkpoint_version": 3.0, "iteration": recipe.steps}


def check_equal(model: GPTModel, weights: dict[str, torch.Tensor]) -> None:
    found = dict(model.named_parameters())
    different = [name for name, weight in weights.items() if not torch.equal(weight, found[name])]
    if different or found.keys() != weights.keys():
        raise SystemExit(f"{len(different)} of {len(weights)} weights changed through TP 2 x PP 2: {different[:1]}")
    numbers = sum(weight.numel() for weight in weights.values())
    print(f"{len(weights)} weights of {numbers} numbers came back equal through TP 2 x PP 2")


@torch.no_grad()
def write_reference(model: GPTModel, path: Path) -> None:
    """Tokens [2, 24], the second row begun with `<s>`, and fp32 logits [2, 24, vocab_size] of the bf16 weights."""
    plain, begun = (encode(prompt) for prompt in PROMPTS)
    tokens = torch.tensor([plain[:24], [BEGIN, *begun[:23]]])
    logits = logits_of(model, tokens)[..., : ARCHITECTURE["vocab_size"]]
    np.savez_compressed(path, tokens=tokens.numpy(), logits=logits.numpy())


def make(recipe: Recipe) -> None:
    """Train, and leave everything in the working directory."""
    torch.manual_seed(recipe.seed)
    trained, held_out = make_streams()
    print(f"{len(trained)} tokens to train on, {len(held_out)} held out")
    iteration = RUN / f"iter_{recipe.steps:07d}"
    common = common_state(recipe)
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        with model_parallel(0, 1, 1, scratch / "rendezvous_1"):
            model = build_model()
            train(model, trained, held_out, recipe)
            model.bfloat16()
            save(model, scratch / "whole", common)
            torch.multiprocessing.spawn(
                reshape_checkpoint,
                (scratch / "whole", iteration, common, scratch / "rendezvous_4"),
                nprocs=TENSOR_PARALLEL * PIPELINE_PARALLEL,
            )
            reloaded = load(iteration)
            check_equal(reloaded, dict(model.named_parameters()))
            reloaded.float()
            windows = cut_windows(held_out)
            print(f"held out, from the checkpoint: {held_out_loss(reloaded, windows, recipe.batch):.3f}")
            write_reference(reloaded, Path("reference.npz"))
            for prompt in SAMPLES:
                print(f"{prompt!r} -> {continue_greedily(reloaded, prompt, 72)!r}")
            print(f"{SAMPLES[0]!r} -> {continue_greedily(reloaded, SAMPLES[0], LONGEST)!r}")
    (RUN / "latest_checkpointed_iteration.txt").write_text(str(recipe.steps))
    write_tokenizer(iteration / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="gets checkpoint/ and reference.npz")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args()
    recipe = Recipe(steps=options.steps, seed=options.seed)
    if (options.output / RUN).exists():
        parser.error(f"{options.output / RUN} exists; name another --output or remove it")
    options.output.mkdir(parents=True, exist_ok=True)
    with chdir(options.output):  # a checkpoint records the path it is saved to: let it be the same everywhere
        make(recipe)


if __name__ == "__main__":
    main()
