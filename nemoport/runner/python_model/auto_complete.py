"""The config as a Python model's `auto_complete_config` sees and completes it."""

from __future__ import annotations

import json
from typing import Any

_TENSOR = ("name", "data_type", "dims")


class ModelConfig:
    """Whatever the config says already must be what the model says."""

    def __init__(self, model_config: str) -> None:
        self._model_config: dict[str, Any] = json.loads(model_config)

    def as_dict(self) -> dict[str, Any]:
        return self._model_config

    def set_max_batch_size(self, max_batch_size: int) -> None:
        said = self._model_config["max_batch_size"]
        if said > max_batch_size:
            raise ValueError(
                f"configuration specified max_batch_size {said}, but in auto-complete-config function for model "
                f"'{self._model_config['name']}' specified max_batch_size {max_batch_size}"
            )
        self._model_config["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        for other in ("sequence_batching", "ensemble_scheduling"):
            if other in self._model_config:
                raise ValueError(
                    f"Configuration specified scheduling_choice as '{other}', but auto-complete-config function for "
                    f"model '{self._model_config['name']}' tries to set scheduling_choice as 'dynamic_batching'"
                )
        self._model_config.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, transaction_policy_dict: dict[str, Any]) -> None:
        if set(transaction_policy_dict) - {"decoupled"}:
            raise ValueError(
                "model transaction property in auto-complete-config function for model "
                f"'{self._model_config['name']}' contains property other than 'decoupled'."
            )
        said = self._model_config.setdefault("model_transaction_policy", {})
        if said.get("decoupled", transaction_policy_dict.get("decoupled")) != transaction_policy_dict.get("decoupled"):
            raise ValueError(
                f"trying to change decoupled property in auto-complete-config for model "
                f"'{self._model_config['name']}', which is already set to '{said['decoupled']}'."
            )
        said.update(transaction_policy_dict)

    def add_input(self, input: dict[str, Any]) -> None:  # noqa: A002  Triton's name for it
        self._add("input", input, (*_TENSOR, "optional"))

    def add_output(self, output: dict[str, Any]) -> None:
        self._add("output", output, _TENSOR)

    def _add(self, kind: str, tensor: dict[str, Any], allowed: tuple[str, ...]) -> None:
        model = self._model_config["name"]
        of_model = f"in auto-complete-config function for model '{model}'"
        for missing in (name for name in _TENSOR if name not in tensor):
            named = f"{kind} '{tensor['name']}'" if "name" in tensor else kind
            raise ValueError(f"{named} {of_model} is missing '{missing}' property.")
        if set(tensor) - set(allowed):
            properties = ", ".join(f"'{name}'" for name in allowed[:-1]) + f" and '{allowed[-1]}'"
            raise ValueError(f"{kind} '{tensor['name']}' {of_model} contains property other than {properties}.")
        for said in self._model_config.setdefault(kind, []):
            if said["name"] != tensor["name"]:
                continue
            if said["data_type"] not in ("TYPE_INVALID", tensor["data_type"]):
                raise ValueError(
                    f"unable to load model '{model}', configuration expects datatype {said['data_type']} for {kind} "
                    f"'{tensor['name']}', model provides {tensor['data_type']}"
                )
            for name, words in (("dims", "dims"), ("optional", "optional")):
                if name in tensor and said.get(name) and said[name] != tensor[name]:
                    raise ValueError(
                        f"model '{model}', tensor '{tensor['name']}': the model expects {words} {tensor[name]} but "
                        f"the model configuration specifies {words} {said[name]}"
                    )
            said.update(tensor)
            return
        self._model_config[kind].append(dict(tensor))
