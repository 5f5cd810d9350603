"""`tokenizer`: the checkpoint's own tokenizer as a python model for Triton, the step before an encoder.

    model.py             the same for every checkpoint
    tokenizer.json       the checkpoint's, and what else it has of a tokenizer's files
    tokenization.json    where texts are cut, what fills up a batch

    inputs     TEXT [batch, 1], strings; of a classifier [batch, texts]
    outputs    input_ids, attention_mask [batch, sequence]; token_type_ids where the model knows more than one type

A classifier may be given one text or a pair, a question and a passage.
"""

from __future__ import annotations

from importlib.resources import files

from nemoport.artifact import Signature, Tensor, json_bytes
from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters.checkpoint import Model, Output
from nemoport.exporters.formats import tokenizer
from nemoport.spec import Classifier, LanguageModel, Plan

TEXT = "TEXT"
SETTINGS = "tokenization.json"
LOADS = ("Triton's python backend with tokenizers 0.21 or later",)


def output(model: Model, plan: Plan) -> Output:
    if isinstance(model.spec.head, LanguageModel):
        raise UnsupportedInput(
            f"--to tokenizer writes the step before an encoder, and {model.spec.family} writes text; "
            "its tokenizer goes with it, convert with --to onnx or hf"
        )
    if plan.world > 1 or plan.ep > 1 or plan.dtype:
        raise UsageError("--to tokenizer writes no weights; leave --tp, --pp, --ep and --dtype out")
    tree = model.checkpoint.tokenizer
    if tree is None or not tree.file("tokenizer.json"):
        raise UnsupportedInput(
            f"{model.checkpoint.path} has no tokenizer.json; load its tokenizer with transformers' AutoTokenizer "
            "and save it there with save_pretrained"
        )
    settings = {
        "longest": tokenizer.longest(tree, model.spec.longest),
        "lowercase": tokenizer.lowers(tree),
        "padding": tokenizer.special_ids(tree).get("pad_token_id", 0),
    }
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if model.spec.token_types > 1 else [])]
    return Output(
        files=(),
        sidecars={
            "model.py": files("nemoport").joinpath("templates", "tokenizer.py.txt").read_bytes(),
            SETTINGS: json_bytes(settings),
            **tokenizer.files(tree),
        },
        loads=LOADS,
        dtype="int64",
        signature=Signature(
            inputs=(Tensor(TEXT, "string", ("batch", "texts" if isinstance(model.spec.head, Classifier) else 1)),),
            outputs=tuple(Tensor(name, "int64", ("batch", "sequence")) for name in names),
        ),
    )
