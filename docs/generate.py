"""Writes the tables of the documents that follow from the code, between their markers. `make docs` runs it, and a test
fails when they are stale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from inspect import signature
from itertools import groupby
from pathlib import Path

from nemoport import plugins
from nemoport.check.table import TABLE
from nemoport.compatibility import ALONE, NAMES, Outcome, Verdict, claims, judge, rows, runtime
from nemoport.compilers.builders import onnxruntime
from nemoport.compilers.compile import BUILDERS, options
from nemoport.exporters import methods
from nemoport.exporters.rules import Column
from nemoport.exporters.targets import hf
from nemoport.repository.inflight.settings import PARAMETERS
from nemoport.validation import fidelity, likeness

DOCS = Path(__file__).parent
WITH_TABLES = ("check", "compatibility", "compile", "onnx", "quantization")
PAGES = (DOCS.parent / "README.md", *(DOCS / f"{each}.md" for each in WITH_TABLES))
ROOM = "nemoport.exporters"


def tables() -> dict[str, str]:
    return {
        "readers": _table("reader | what it opens", _described("readers")),
        "adapters": _table("adapter | what it opens", _described("adapters")),
        "families": _table("family | what it covers | read from | written as | quantized as", _families()),
        "targets": _table("`--to` | what it writes", _described("targets")),
        "levels": _table("`--level` | what is left of the graph's portability", _levels()),
        "providers": _table("`--provider` | weights in | comes with", _providers()),
        "rules": _table("code | level | what must hold", _rules()),
        "methods": _table(
            "`--quantize` | `--to` | `--dialect` | ModelOpt's word | takes from calibration | divides | loaded by",
            _methods(),
        ),
        "likeness": _table("of an encoder's | measure | bound", _likeness()),
        "builders": _table("`--to` | what it builds | of", _builders()),
        "builder_options": _table("option | of | what it says", _builder_options()),
        "backend_parameters": _table("parameter | value | what it is | needs an engine with", _backend_parameters()),
        "containers": _table(
            "Triton | ONNX Runtime in `-py3` | TensorRT-LLM | its TensorRT and CUDA | vLLM | its CUDA | GPUs",
            _containers(),
        ),
        "nims": _table("NIM | engines", _nims()),
        "loaded": _table("artifact | runtime | release | verdict | because", _loaded()),
        "sources": _table("of | source", _sources()),
        "gates": _table("weights of | methods | divergence | perplexity | another likeliest token", _gates()),
    }


def inserted(text: str) -> str:
    """A page with its tables new."""
    made = tables()
    return _PLACE.sub(lambda match: match[1] + made[match[2]] + match[3], text)


def placed() -> set[str]:
    """The tables that stand on a page."""
    return {match[2] for page in PAGES for match in _PLACE.finditer(page.read_text())}


_PLACE = re.compile(r"(<!-- (\w+): generated -->\n).*?(<!-- end -->)", re.DOTALL)


def _described(room: str) -> Iterator[str]:
    """The first sentence of each plug-in's docstring."""
    for name, module in plugins.load_all(f"{ROOM}.{room}").items():
        yield f"`{name}` | {_first_sentence(module.__doc__ or '')}"


def _families() -> Iterator[str]:
    for name, module in plugins.load_all(f"{ROOM}.families").items():
        columns = module.COLUMNS
        sources = [word for word in ("megatron", "huggingface") if word in columns]
        encodes = any(methods.is_encoder(column) for column in columns.values())
        targets = [*_whole(columns), *(["trtllm"] if "trtllm" in columns else []), "onnx"]
        targets += ["torchscript"] * encodes
        quantized = [target for naming, target in _QUANTIZED.items() if _quantizes(columns, naming)]
        quantized.append("onnx")
        words = ", ".join(sources), _code(targets), _code(quantized) or "-"
        yield f"`{name}` | {_first_sentence(module.__doc__ or '')} | {' | '.join(words)}"


def _whole(columns: Mapping[str, Column]) -> Iterator[str]:
    """The targets that are a Hugging Face directory, of those whose engine loads the family."""
    if (column := columns.get("huggingface")) is not None:
        yield "hf"
        loads = () if methods.is_encoder(column) else column.loads or hf.LOADS
        yield from (to for to, engine in methods.ENGINES.items() if any(each.startswith(engine) for each in loads))


_QUANTIZED = {"huggingface": "hf", "trtllm": "trtllm"}
"""The names of a family, and the target that writes quantized weights under them."""


def _quantizes(columns: Mapping[str, Column], naming: str) -> bool:
    return naming in columns and methods.storable(columns[naming])


def _levels() -> Iterator[str]:
    for level, left in onnxruntime.LEVELS.items():
        yield f"`{level}` | {left.format(provider='the provider')}"


def _providers() -> Iterator[str]:
    for name, provider in onnxruntime.PROVIDERS.items():
        yield f"`{name}` | {', '.join(provider.dtypes)} | `pip install '{provider.package}'`"


def _rules() -> Iterator[str]:
    for code, rule in TABLE.items():
        yield f"`{code}` | {rule.severity} | {rule.sentence.rstrip('.')}"


def _methods() -> Iterator[str]:
    for row in methods.rows():
        targets = methods.targets(row)
        dialect = "" if row.dialect in targets else f"`{row.dialect}`"
        found = f"`{row.method}` | {_code(targets)} | {dialect} | {row.algorithm}"
        if row.refused:
            yield f"{found} | | | refused: {row.refused}"
        else:
            needs = ", ".join(f"`{each}`" for each in row.needs) or "nothing"
            yield f"{found} | {needs} | {row.alignment} | {'; '.join(row.loads)}"


def _containers() -> Iterator[str]:
    least = {row.release: f"SM {row.sm} or later" for row in rows.LEAST_SM}
    for row in rows.TRITON:
        of_trtllm, gpus = f"{row.tensorrt}, {row.cuda}", least.get(row.release, "-")
        words = row.release, row.onnxruntime, row.tensorrt_llm, of_trtllm, row.vllm, row.vllm_cuda, gpus
        yield " | ".join(str(word) for word in words)


def _nims() -> Iterator[str]:
    for row in rows.NIM:
        engines = [f"{NAMES[engine][0]} {found or 'of a version not seen'}" for engine, found in row.engines.items()]
        yield f"{row.release} | {', '.join(engines)}"


BUILT_WITH = {"tensorrt_llm": "1.1.0", "tensorrt": "10.13.3", "onnxruntime": "1.27.0", "portability": "any provider"}
"""An engine to judge: what is built has no row of its own, it is stamped."""


def _loaded() -> Iterator[str]:
    """Every artifact in every place, releases that fare alike in one line."""
    for kind, module in plugins.load_all(f"{ROOM}.targets").items():
        yield from _fares(kind, f"`{kind}`", module.LOADS)
    for to, module in plugins.load_all("nemoport.compilers.builders").items():
        said = {"compatible": False} if "compatible" in signature(module.loads).parameters else {}
        loads = module.loads({**BUILT_WITH, **({} if to == "onnxruntime" else {"sm": 90})}, **said)
        yield from _fares(module.KIND, f"`compile --to {to}` of {', '.join(loads)}", loads)


def _fares(kind: str, what: str, loads: tuple[str, ...]) -> Iterator[str]:
    released = {"tritonserver": rows.TRITON, "nim": rows.NIM}
    for name, table in released.items():
        judged = [(row.release, judge(kind, loads, runtime(f"{name}:{row.release}"))) for row in table]
        for _, alike in groupby(judged, key=lambda each: (each[1].outcome, each[1].first, _container(each[1].place))):
            group = list(alike)
            (newest, verdict), (oldest, _) = group[0], group[-1]
            releases = newest if newest == oldest else f"{oldest} to {newest}"
            yield f"{what} | `{name}` | {releases} | {_verdict(verdict)}"
    for word, engine in ALONE.items():
        for way in rows.WAYS:
            for claim in claims(loads) if (way.kind, way.place, way.engine) == (kind, "alone", engine) else ():
                if claim.engine == engine:
                    verdict = "needs" if way.first else "loads"
                    yield f"{what} | `{word}` | {claim.releases or 'any'} | {verdict} | {way.first or str(claim)}"


def _container(place: str) -> str:
    return re.sub(r":[\d.]+", "", place)


def _verdict(verdict: Verdict) -> str:
    first = f"; first {verdict.first}" if verdict.outcome is Outcome.NEEDS else ""
    instead = f"; {verdict.first}" if verdict.refused and verdict.first else ""
    return f"{verdict.outcome.name.lower()} | `{verdict.place}`: {verdict.reason}{first}{instead}"


def _sources() -> Iterator[str]:
    tables = {
        "Triton's containers": rows.TRITON,
        "the oldest GPUs of Triton": rows.LEAST_SM,
        "opsets of ONNX Runtime": rows.OPSETS,
        "NIM": rows.NIM,
        "how an artifact gets to an engine": (*rows.WAYS, *rows.NO_WAYS),
        "the SM of a GPU": rows.GPUS,
    }
    for what, table in tables.items():
        for source in dict.fromkeys(row.source for row in table):
            yield f"{what} | <{source}>"


def _gates() -> Iterator[str]:
    encodings = {name: module.encoding(None) for name, module in plugins.load_all(f"{ROOM}.quantizers").items()}
    for bits, gate in fidelity.GATES.items():
        of = ", ".join(f"`{name}`" for name, encoding in encodings.items() if encoding.bits == bits)
        other = f"at most {gate.disagree:.0%}" if gate.disagree is not None else "not bounded"
        yield f"{bits} bits | {of} | KL at most {gate.kl_mean} | at most {gate.perplexity:+.0%} | {other}"


def _likeness() -> Iterator[str]:
    yield f"vectors | one less the mean cosine with the source's | at most {likeness.TURNED}"
    yield f"vectors | of each text's {likeness.NEAREST} nearest, those that are others | at most {likeness.LOST:.0%}"
    yield f"labels | mean divergence | KL at most {likeness.DIVERGED}"
    yield f"labels | pairs of texts that change places | at most {likeness.MOVED:.0%}"


def _builders() -> Iterator[str]:
    for name, module in plugins.load_all(BUILDERS).items():
        yield f"`{name}` | {_first_sentence(module.__doc__ or '')} | `{module.TAKES}`"


def _builder_options() -> Iterator[str]:
    for option, takers in options().items():
        values = f" One of {_code(option.kind)}." if isinstance(option.kind, tuple) else ""
        yield f"`--{option.name.replace('_', '-')}` | {_code(takers)} | {option.help}{values}"


def _backend_parameters() -> Iterator[str]:
    for each in PARAMETERS:
        yield f"`{each.name}` | {each.kind.what} | {each.help} | {f'`{each.needs.what}`' if each.needs else ''}"


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _first_sentence(text: str) -> str:
    sentence = " ".join(text.split("\n\n")[0].split())
    sentence = re.sub(r"^`\w+`: ", "", sentence)
    return re.split(r"(?<=\w\w)\. ", sentence)[0].rstrip(".")


def _table(header: str, rows: Iterator[str]) -> str:
    rule = "|".join("---" for _ in header.split("|"))
    return "\n".join([f"| {header} |", f"|{rule}|", *(f"| {row} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(inserted(page.read_text()))
