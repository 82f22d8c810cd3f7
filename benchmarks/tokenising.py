"""From conversations to ids and labels, beside the tokenizer's own `encode_batch` of the same texts.

    python benchmarks/tokenising.py                        # SmolLM2's tokenizer, in Markdown
    python benchmarks/tokenising.py Qwen/Qwen2.5-0.5B-Instruct Qwen/Qwen3-0.6B

Chats have two turns and about 400 tokens. Processor time is that of one thread in one process, the fastest of --repeat
rounds in which both take turns. With Qwen3's template a chat becomes two documents, as serving sees no thoughts of
earlier turns. Rows a second: a whole dataset into the cache on disk, by one process and by those that
`tokenised.cached_rows` starts on this machine.
"""

import argparse
import json
import os
import pathlib
import random
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from bench import model_folder  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from recipe.dataset import tokenised  # noqa: E402  bench has put it on the path
from recipe.dataset.conversations import Conversations  # noqa: E402
from recipe.dataset.encoding import ChatEncoder  # noqa: E402

WORDS = "a model reads every prompt as serving sends it and learns the answers 12 7,5 of each turn: (nothing else) so".split()


def chats(count):
    chance = random.Random(0)

    def said(role):
        return {"role": role, "content": " ".join(chance.choices(WORDS, k=70))}

    return [{"messages": [said(role) for role in ("user", "assistant") * 2]} for _ in range(count)]


def processor_time(encoder, rows, repeat):
    """Microseconds a chat of encode_batch of the rendered texts, and of ChatEncoder; documents a chat."""
    texts = [encoder.tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    alone, whole = [], []
    for _ in range(repeat):
        start = time.process_time()
        encoder.backend.encode_batch(texts)
        between = time.process_time()
        encoded = encoder.encode_batch(rows)
        alone.append(between - start)
        whole.append(time.process_time() - between)
    documents = sum(len(conversation.documents) for conversation in encoded) / len(rows)
    return *(1e6 * min(seconds) / len(rows) for seconds in (alone, whole)), documents


def rows_a_second(encoder, path, share):
    tokenised.SHARE = share
    tokeniser = tokenised.Tokeniser(Conversations([str(path)]), encoder, 4096 + share)  # not the rows of the cache
    start = time.perf_counter()
    return len(tokenised.cached_rows(tokeniser)) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders or names of models")
    parser.add_argument("--chats", type=int, default=12_000)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    rows = chats(args.chats)
    print("| template | documents a chat | encode_batch, us | ids and labels, us | rate | rows/s, one process | all |")
    print("|" + "---|" * 7)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        path = pathlib.Path(folder) / "chats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for model in args.models or [model_folder("smollm2", None)]:
            encoder = ChatEncoder(AutoTokenizer.from_pretrained(model))
            alone, whole, documents = processor_time(encoder, rows[:1500], args.repeat)
            speeds = (rows_a_second(encoder, path, share) for share in (10**9, max(1, args.chats // 64)))
            cells = [f"{documents:.0f}", f"{alone:.0f}", f"{whole:.0f}", f"{alone / whole:.2f}"]
            print(
                f"| {pathlib.Path(model).name} | {' | '.join([*cells, *(f'{speed:,.0f}' for speed in speeds)])} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
