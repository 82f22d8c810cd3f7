"""Answer held-out prompts with a server: an adapter merged by merge.py, beside the answers of the data.

    make demo
    VENV=.venv-transformers ./setup.sh benchmarks/transformers_serve.txt
    python benchmarks/answered.py transformers
    VENV=.venv-llama ./setup.sh benchmarks/llama_cpp.txt
    python benchmarks/answered.py llama.cpp --llama_cpp LLAMA_CPP_FOLDER

The folder holds the source of llama.cpp, whose converter is used. A line with the result is appended to
benchmarks/answered.jsonl.
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
ASK = """
import importlib.metadata, json, os, subprocess, sys, time, urllib.error, urllib.request
model, data, limit, found = sys.argv[1:]

def count(server, chat):
    with open(data, encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file][: int(limit)]
    asked = [{"messages": messages, "temperature": 0, "max_tokens": 96} for *messages, _ in rows]
    answers = [chat(request)["choices"][0]["message"]["content"].strip() for request in asked]
    exact = sum(answer == row[-1]["content"].strip() for answer, row in zip(answers, rows))
    with open(found, "w") as file:
        json.dump({"answers": answers, "exact": exact, server: importlib.metadata.version(server)}, file)
"""
LLAMA_CPP = """
from xllamacpp import CommonParams, Server
parameters = CommonParams()
parameters.model.path, parameters.n_ctx = model, 1024
count("xllamacpp", Server(parameters).handle_chat_completions)
"""
TRANSFORMERS = """
PORT = 8765
words = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", "--port", str(PORT), "--device", "cpu"]
server = subprocess.Popen(words)

def chat(asked):
    body = json.dumps({"model": model, "stream": False, **asked}).encode()
    address, head = f"http://127.0.0.1:{PORT}/v1/chat/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, body, head)) as answer:
        return json.load(answer)

try:
    for attempt in range(120):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health")
            break
        except urllib.error.URLError:
            time.sleep(1)
    count("transformers", chat)
finally:
    server.terminate()
"""


def main() -> None:
    """Merge, convert, serve and ask; append the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", choices=["transformers", "llama.cpp"])
    parser.add_argument("--llama_cpp", help="folder with the source of llama.cpp")
    parser.add_argument("--adapter", default=str(ROOT / "output" / "demo"), help="that of make demo by default")
    parser.add_argument("--data", default=str(ROOT / "data" / "validation.jsonl"), help="held-out conversations")
    parser.add_argument("--limit", type=int, default=60, help="prompts that are asked, of the first ones")
    parser.add_argument("--python", help="Python of the server's environment")
    args = parser.parse_args()
    by_llama = args.server == "llama.cpp"
    if by_llama and not args.llama_cpp:
        parser.error("llama.cpp needs --llama_cpp")
    python = args.python or ROOT / (".venv-llama" if by_llama else ".venv-transformers") / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        merged, file, found = (pathlib.Path(folder) / name for name in ("merged", "model.gguf", "found.json"))
        words = ["--adapter", args.adapter, "--output", merged, "--dtype", "bfloat16"]
        if by_llama:
            words += ["--gguf", file, "--llama_cpp", args.llama_cpp]
        subprocess.run([sys.executable, ROOT / "merge.py", *words], check=True)
        program, model = ASK + (LLAMA_CPP if by_llama else TRANSFORMERS), file if by_llama else merged
        subprocess.run(
            [python, "-c", program, model, args.data, str(args.limit), found], check=True, stderr=subprocess.DEVNULL
        )
        counted = json.loads(found.read_text())
        result = {
            "server": args.server,
            "prompts": len(counted.pop("answers")),
            **counted,
            "merged_with_transformers": importlib.metadata.version("transformers"),
            "date": datetime.date.today().isoformat(),
        }
    with open(ROOT / "benchmarks" / "answered.jsonl", "a", encoding="utf-8") as results:
        results.write(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
