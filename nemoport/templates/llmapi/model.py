"""Text through TensorRT-LLM's LLM API, for Triton's python backend.

Settings are in model.yaml beside this file: arguments of `tensorrt_llm.LLM`, with `model` relative to this directory,
and `triton_config`. A request is answered by one response, or with `stream` by one for each piece of text. Inputs have
the names of Triton's generate endpoint; what stands under `parameters` there is taken too.
"""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
import yaml

HERE = Path(__file__).resolve().parent
SAMPLING = {  # of tensorrt_llm.SamplingParams
    "max_tokens": "TYPE_INT32",
    "temperature": "TYPE_FP32",
    "top_p": "TYPE_FP32",
    "top_k": "TYPE_INT32",
    "seed": "TYPE_UINT64",
}
INPUTS: list[dict[str, Any]] = [
    {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]},
    *({"name": name, "data_type": kind, "dims": [1], "optional": True} for name, kind in SAMPLING.items()),
    {"name": "stop", "data_type": "TYPE_STRING", "dims": [-1], "optional": True},
    {"name": "stream", "data_type": "TYPE_BOOL", "dims": [1], "optional": True},
    {"name": "exclude_input_in_output", "data_type": "TYPE_BOOL", "dims": [1], "optional": True},
]
OUTPUTS: list[dict[str, Any]] = [
    {"name": "text_output", "data_type": "TYPE_STRING", "dims": [1]},
    {"name": "finish_reason", "data_type": "TYPE_STRING", "dims": [1]},
]
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def settings() -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the LLM, the model's path made absolute, and `triton_config`."""
    said = yaml.safe_load((HERE / "model.yaml").read_text())
    triton = said.pop("triton_config")
    if (beside := HERE / said["model"]).is_dir():
        said["model"] = str(beside)
    return said, triton


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        _, triton = settings()
        said = config.as_dict()
        for tensors, add in ((INPUTS, config.add_input), (OUTPUTS, config.add_output)):
            known = {tensor["name"] for tensor in said["input" if tensors is INPUTS else "output"]}
            for tensor in tensors:
                if tensor["name"] not in known:
                    add(tensor)
        config.set_max_batch_size(int(triton["max_batch_size"]))
        config.set_model_transaction_policy({"decoupled": bool(triton["decoupled"])})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        if not pb_utils.using_decoupled_model_transaction_policy(json.loads(args["model_config"])):
            raise pb_utils.TritonModelException(
                f"model '{args['model_name']}' answers in pieces; set decoupled: true in {HERE / 'model.yaml'}"
            )
        try:
            from tensorrt_llm import LLM, SamplingParams
        except ModuleNotFoundError as error:
            if error.name != "tensorrt_llm":
                raise
            raise ModuleNotFoundError(
                f"model '{args['model_name']}' needs the package tensorrt_llm (1.0 or later), which this Python has "
                "not; serve it in a container tritonserver:YY.MM-trtllm-python-py3",
                name=error.name,
            ) from error
        arguments, triton = settings()
        self.check = float(triton.get("cancellation_check_period_ms", 100)) / 1000
        self.sampling = SamplingParams
        self.llm = LLM(**arguments)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            asyncio.run_coroutine_threadsafe(self.answer(request), self.loop)

    async def answer(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            said = fields(request)
            stream, prompt = bool(said.get("stream", False)), said["text_input"]
            before = "" if said.get("exclude_input_in_output", True) else prompt
            sampling = {name: said[name] for name in (*SAMPLING, "stop") if name in said}
            running = self.llm.generate_async(prompt, self.sampling(**sampling), streaming=True)
            watching = asyncio.create_task(self.watch(sender, running))
            try:
                sent, text, reason = 0, "", None
                async for step in running:
                    text, reason = step.outputs[0].text, step.outputs[0].finish_reason
                    if stream and len(text) > sent:
                        sender.send(response(before + text[sent:], reason))
                        before, sent = "", len(text)
            finally:
                watching.cancel()
            if stream and sent:
                sender.send(flags=FINAL)
            else:
                sender.send(response(before + text, reason), flags=FINAL)
        except Exception as error:  # whatever it is, the client must not wait for ever
            told = pb_utils.TritonError(f"{type(error).__name__}: {error}")
            sender.send(pb_utils.InferenceResponse(error=told), flags=FINAL)

    async def watch(self, sender: Any, running: Any) -> None:
        """Free the engine of what nobody waits for."""
        while not sender.is_cancelled():
            await asyncio.sleep(self.check)
        running.abort()

    def finalize(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.llm.shutdown()


def fields(request: Any) -> dict[str, Any]:
    """The inputs of a request, and its parameters for those that it has not."""
    said = dict(json.loads(request.parameters() or "{}"))
    for name in (tensor["name"] for tensor in INPUTS):
        if (tensor := pb_utils.get_input_tensor_by_name(request, name)) is not None:
            values = [each.decode() if isinstance(each, bytes) else each for each in tensor.as_numpy().ravel().tolist()]
            said[name] = values if name == "stop" else values[0]
    return said


def response(text: str, reason: str | None) -> Any:
    named = (("text_output", text), ("finish_reason", reason or ""))
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, np.array([value.encode()], np.object_)) for name, value in named]
    )
