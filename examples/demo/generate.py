"""Ask a served decoder for a continuation, byte by byte, with NVIDIA's own client: the cache goes back and forth."""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import tritonclient.http as triton


def continuation(client: triton.InferenceServerClient, model: str, prompt: bytes, length: int) -> bytes:
    """The likeliest next bytes: the prompt at once, then a token a request, each with the cache of the last answer."""
    metadata = client.get_model_metadata(model)
    cache = {
        tensor["name"]: np.zeros((1, tensor["shape"][1], 0, tensor["shape"][3]), np.float32)
        for tensor in metadata["inputs"]
        if tensor["name"].startswith("past_key_values.")
    }
    tokens, seen, text = np.frombuffer(prompt, np.uint8).astype(np.int64)[np.newaxis], 0, b""
    for _ in range(length):
        total = seen + tokens.shape[1]
        arrays = {
            "input_ids": tokens,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(seen, total, dtype=np.int64)[np.newaxis],
            **cache,
        }
        answer = client.infer(model, [_input(name, array) for name, array in arrays.items()])
        token = int(answer.as_numpy("logits")[0, -1].argmax())
        if token > 255:  # <s>, </s>, <pad>
            break
        text += bytes([token])
        sys.stdout.write(chr(token))
        sys.stdout.flush()
        cache = {name: answer.as_numpy(name.replace("past_key_values", "present")) for name in cache}
        tokens, seen = np.array([[token]], np.int64), total
        if text.endswith(b"\n\n"):
            break
    return text


def _input(name: str, array: np.ndarray) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), "INT64" if array.dtype == np.int64 else "FP32")
    tensor.set_data_from_numpy(array)
    return tensor


def _wait(client: triton.InferenceServerClient, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            if client.is_server_ready():
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise SystemExit(f"no server is ready after {seconds:.0f} seconds")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--address", default="127.0.0.1:8000")
    parser.add_argument("--model", default="fables")
    parser.add_argument("--length", type=int, default=240)
    arguments = parser.parse_args()
    with triton.InferenceServerClient(arguments.address) as client:
        _wait(client, 30)
        sys.stdout.write(arguments.prompt)
        start = time.monotonic()
        text = continuation(client, arguments.model, arguments.prompt.encode(), arguments.length)
        print(f"\n[{len(text)} bytes, {len(text) / (time.monotonic() - start):.0f} a second]")


if __name__ == "__main__":
    main()
