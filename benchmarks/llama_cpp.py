"""Answer held-out prompts with llama.cpp: an adapter merged and converted by merge.py, beside the answers of the data.

    make demo
    VENV=.venv-llama ./setup.sh benchmarks/llama_cpp.txt
    python benchmarks/llama_cpp.py --llama_cpp LLAMA_CPP_FOLDER

The folder holds the source of llama.cpp. A line with the result is appended to benchmarks/llama_cpp.jsonl.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = """
import importlib.metadata, json, sys
from xllamacpp import CommonParams, Server

model, data, found = sys.argv[1:]
parameters = CommonParams()
parameters.model.path, parameters.n_ctx = model, 1024
server, exact = Server(parameters), 0
with open(data, encoding="utf-8") as file:
    rows = [json.loads(line)["messages"] for line in file]
for *messages, wanted in rows:
    asked = {"messages": messages, "temperature": 0, "max_tokens": 96}
    answer = server.handle_chat_completions(asked)["choices"][0]["message"]["content"]
    exact += answer.strip() == wanted["content"].strip()
result = {"prompts": len(rows), "exact": exact, "xllamacpp": importlib.metadata.version("xllamacpp")}
with open(found, "w") as file:
    json.dump(result, file)
"""


def main() -> None:
    """Merge, convert, serve and ask; append the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama_cpp", required=True, help="folder with the source of llama.cpp")
    parser.add_argument(
        "--adapter", default=str(ROOT / "output" / "demo"), help="adapter; that of make demo by default"
    )
    parser.add_argument("--data", default=str(ROOT / "data" / "validation.jsonl"), help="held-out conversations")
    parser.add_argument("--python", default=str(ROOT / ".venv-llama" / "bin" / "python"), help="Python with xllamacpp")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        merged, file, found = (pathlib.Path(folder) / name for name in ("merged", "model.gguf", "found.json"))
        words = ["--adapter", args.adapter, "--output", merged, "--dtype", "bfloat16"]
        words += ["--gguf", file, "--llama_cpp", args.llama_cpp]
        subprocess.run([sys.executable, ROOT / "merge.py", *words], check=True)
        subprocess.run([args.python, "-c", SERVER, file, args.data, found], check=True, stderr=subprocess.DEVNULL)
        result = {
            **json.loads(found.read_text()),
            "transformers": importlib.metadata.version("transformers"),
            "date": datetime.date.today().isoformat(),
        }
    with open(ROOT / "benchmarks" / "llama_cpp.jsonl", "a", encoding="utf-8") as results:
        results.write(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
