"""`torchscript`: `model.pt` for rerankers, classifiers and other encoders, on Triton's pytorch backend and LibTorch.

    inputs     input_ids, attention_mask [batch, sequence]: the arguments of `forward`, which Triton binds by name
               token_type_ids [batch, sequence] where the model knows more than one type
               dimensions [batch, 1] of a Matryoshka model: how much of each vector is asked for
    outputs    embeddings [batch, hidden] or logits [batch, labels], float32

The same as `onnx` has, and the same arithmetic. The archive holds readable source (`unzip -p model.pt
model/code/__torch__.py`), nothing of nemoport, and of canonical tensors the canonical names. torch is not needed to
write it: the weights are streamed into their places, whatever their size.

PyTorch has deprecated TorchScript: 2.13 warns in `torch.jit.load` and `torch.jit.script`, and still runs both; Triton's
backend loads archives through LibTorch, which does not warn.
"""

from __future__ import annotations

from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters import signatures
from nemoport.exporters.checkpoint import Model, Output, Slot
from nemoport.exporters.formats import torchscript
from nemoport.exporters.rope import frequencies
from nemoport.exporters.targets.torchscript.modules import modules
from nemoport.exporters.targets.torchscript.program import program, ropes
from nemoport.exporters.tensor import Held, LazyTensor, cast
from nemoport.spec import Attention, Block, Dense, LanguageModel, ModelSpec, Plan, tensors

FILE = "model.pt"
DTYPES = ("float32", "float16", "bfloat16")
LOADS = ("Triton's pytorch backend 23.10 or later", "torch.jit.load and LibTorch 2.1 or later")
"""PyTorch 2.1 gave `scaled_dot_product_attention` its scale."""


def output(model: Model, plan: Plan) -> Output:
    spec, dtype = model.spec, plan.dtype or model.dtype
    if isinstance(spec.head, LanguageModel):
        raise UnsupportedInput(
            f"--to torchscript writes what answers a text at once, and {spec.family} writes text, one token after "
            "another; use --to onnx, vllm, llmapi or trtllm"
        )
    _check(spec, dtype, plan)
    slots = [_slot(name, model.tensors[name], dtype) for name in tensors(spec)]
    turns = [
        Slot(f"frequencies{number}", Held(frequencies(rope), "float32"), (), "computed from the model's rope")
        for number, rope in enumerate(ropes(spec))
    ]
    root, signature = modules(spec, [slot.name for slot in turns]), signatures.of_encoder(spec, spec.head)
    return Output(
        files=(torchscript.file(FILE, root, program(spec, root, signature, dtype), [*slots, *turns]),),
        sidecars={},
        loads=LOADS,
        dtype=dtype,
        signature=signature,
    )


def _check(spec: ModelSpec, dtype: str, plan: Plan) -> None:
    if plan.world > 1 or plan.ep > 1:
        raise UsageError(
            f"tp={plan.tp} pp={plan.pp} ep={plan.ep} do not exist for TorchScript, which comes as one module; leave "
            "them out"
        )
    if dtype not in DTYPES:
        raise UnsupportedInput(f"the model is in {dtype}, which no encoder runs in; use --dtype {' or '.join(DTYPES)}")
    if strange := [block for block in dict.fromkeys(spec.blocks) if not _plain(block)]:
        raise UnsupportedInput(f"--to torchscript has no words for a block {strange[0]}; use --to onnx")


def _plain(block: Block) -> bool:
    """What the program says: attention that sees all of a text, with a softmax and no more; a dense feed-forward."""
    match block:
        case Block(
            mixer=Attention(causal=False, window=None, softcap=None, sinks=False), ffn=Dense(limit=None, up_offset=0.0)
        ):
            return True
    return False


def _slot(name: str, tensor: LazyTensor, dtype: str) -> Slot:
    return Slot(name, cast(tensor, dtype), (name,), "" if tensor.dtype == dtype else f"cast to {dtype}")
