#!/usr/bin/env bash
# The main job, as one engineer does it on day one. `make demo` runs it; everything it writes goes to ./demo.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
checkpoint=$here/checkpoint
out=${1:-demo}
port=${PORT:-8080}

step() { printf '\n\033[1m$ nemoport %s\033[0m\n' "$*"; nemoport "$@"; }

rm -rf "$out" && mkdir -p "$out"

step inspect "$checkpoint"

step convert "$checkpoint" --to onnx --dtype float32 -o "$out/fables-onnx"
step publish "$out/fables-onnx" --model-repository "$out/repository" --name fables
step validate "$out/repository" --model fables
step repo promote "$out/repository" fables
step repo list "$out/repository"
step check "$out/repository"

printf '\n\033[1m$ nemoport serve %s --http-port %s &\033[0m\n' "$out/repository" "$port"
nemoport serve "$out/repository" --http-address 127.0.0.1 --http-port "$port" \
  --allow-grpc false --allow-metrics false 2>"$out/serve.log" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
python "$here/generate.py" --address "127.0.0.1:$port" --model fables "${PROMPT:-The clever fox }"

# The same model answers in text: the ONNX artifact carries the checkpoint's tokenizer.
python - "127.0.0.1:$port" <<'END'
import json, sys, urllib.request
asked = {"text_input": "One snowy evening ", "max_tokens": 60, "temperature": 0}
address = f"http://{sys.argv[1]}/v2/models/fables/generate"
print(json.load(urllib.request.urlopen(address, json.dumps(asked).encode()))["text_output"])
END
kill "$server" && wait "$server" || true
trap - EXIT

step convert "$checkpoint" --to trtllm --tp 2 -o "$out/fables-trtllm"
step validate "$out/fables-trtllm"

printf '\nEverything is in %s; the repository is ready for tritonserver.\n' "$out"
