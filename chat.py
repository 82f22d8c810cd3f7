"""Talk to a model or an adapter in the terminal, through the chat template it was trained with.

python chat.py --model_name_or_path output/demo
"""

import argparse

from recipe import console
from recipe.console import UserError
from recipe.dataset.encoding import ChatEncoder
from recipe.model import loading
from recipe.training import answers


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", required=True, help="Model folder, adapter folder or hub name.")
    parser.add_argument("--system", help="System message. Default: the template's own.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer in tokens. Default 512.")
    args = parser.parse_args()
    console.quiet()
    try:
        model, tokenizer = loading.load(args.model_name_or_path)
        stop_id = ChatEncoder(tokenizer).stop_id
    except (UserError, ValueError) as error:  # or a tokenizer without a chat template
        console.fail(error)
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    print("Your turn. An empty line starts a new conversation, Ctrl-D ends.")
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        if not text.strip():
            messages = list(start)
            print("(new conversation)")
            continue
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        asked = answers.Question(prompt, [], "", messages)
        (reply,) = answers.answer(model, tokenizer, [asked], stop_id, args.max_new_tokens)
        print(reply)
        messages.append({"role": "assistant", "content": reply})


if __name__ == "__main__":
    main()
