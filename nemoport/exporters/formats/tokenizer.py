"""Tokenizer files: which they are, how many ids they know, and the special ones. Nothing is tokenized here."""

from __future__ import annotations

from typing import Any

from nemoport.errors import DamagedInput
from nemoport.exporters.formats.structured import LARGEST, stored_mapping
from nemoport.exporters.formats.tree import Tree, content

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "tokenizer.model.v3"),
    *("sentencepiece.bpe.model", "sentence_bert_config.json", "config_sentence_transformers.json"),
)
"""The names under which Hugging Face tokenizers are stored, and what sentence-transformers says beside them of length
and prompts."""
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def find(*candidates: Tree) -> Tree | None:
    """The first directory that holds a tokenizer."""
    return next((tree for tree in candidates if any(tree.file(name) for name in _VOCABULARIES)), None)


def files(tree: Tree) -> dict[str, bytes]:
    found = {name: tree.file(name) for name in FILES}
    return {name: content(store, LARGEST) for name, store in found.items() if store}


def ids(tree: Tree) -> dict[str, int]:
    """Token -> id as `tokenizer.json` or `vocab.json` lists them; empty where neither is there."""
    if store := tree.file("tokenizer.json"):
        data = stored_mapping(store)
        model = data.get("model")
        vocabulary = model.get("vocab", {}) if isinstance(model, dict) else {}
        return _listed(vocabulary) | _added(data.get("added_tokens") or ())
    if store := tree.file("vocab.json"):
        return _listed(stored_mapping(store))
    return {}


def size(tree: Tree) -> int | None:
    """One more than the largest id, or None where the files do not say."""
    if known := ids(tree):
        return max(known.values()) + 1
    store = tree.file("tokenizer.model")
    return _pieces(content(store, LARGEST)) if store else None


def longest(tree: Tree, positions: int) -> int:
    """Tokens of the longest text, as sentence-transformers cuts it: what is said for it, else for the tokenizer, and no
    more than the model has positions."""
    rows = (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length"))
    said = [stored_mapping(store).get(key) for name, key in rows if (store := tree.file(name))]
    known = [int(number) for number in said if isinstance(number, int | float) and number >= 1]
    return min([positions, *known[:1]])


def lowers(tree: Tree) -> bool:
    """Whether texts are written small before the tokenizer sees them, which may do so once more by itself."""
    store = tree.file("sentence_bert_config.json")
    return bool(stored_mapping(store).get("do_lower_case")) if store else False


def special_ids(tree: Tree) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, as far as the files name them."""
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if store := tree.file(name):
            named |= stored_mapping(store)
    known = ids(tree)
    found = {}
    for role in ("bos_token", "eos_token", "pad_token"):
        token = named.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in known:
            found[f"{role}_id"] = known[content]
    return found


def _pieces(model: bytes) -> int | None:
    """How many pieces a SentencePiece model has, or None if it is none: tiktoken's files have the same name. A protobuf
    of which only field 1, repeated, is a piece (sentencepiece_model.proto)."""
    count = at = 0
    while at < len(model):
        key, at = _varint(model, at)
        match key & 7:
            case 0:
                _, at = _varint(model, at)
            case 1 | 5:
                at += 8 if key & 7 == 1 else 4
            case 2:
                length, at = _varint(model, at)
                at, count = at + length, count + (key == 0x0A)
            case _:
                return None
    return count if at == len(model) and count else None


def _varint(model: bytes, at: int) -> tuple[int, int]:
    """A protobuf number and where it ends; beyond the end of the model if it is cut."""
    value = shift = 0
    while at < len(model) and shift < 64:
        value |= (model[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if model[at - 1] < 0x80:
            return value, at
    return 0, len(model) + 1


def _listed(vocab: Any) -> dict[str, int]:
    """BPE and WordPiece list token: id; Unigram lists [token, score] in the order of ids."""
    if isinstance(vocab, list):
        named = ((index, row[0]) for index, row in enumerate(vocab) if isinstance(row, list) and row)
        vocab = {token: index for index, token in named if isinstance(token, str)}
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        raise DamagedInput("the tokenizer's vocabulary is no table of ids; copy the tokenizer again")
    return vocab


def _added(rows: Any) -> dict[str, int]:
    if not isinstance(rows, list | tuple):
        raise DamagedInput("the tokenizer's added tokens are no list; copy the tokenizer again")
    named = [row for row in rows if isinstance(row, dict) and isinstance(row.get("content"), str)]
    return {row["content"]: row["id"] for row in named if type(row.get("id")) is int}
