"""Turn a merged model into a GGUF file for llama.cpp and Ollama, with llama.cpp's own converter.

The converter is a program of llama.cpp's source (convert_hf_to_gguf.py); nothing of it has to be compiled.
"""

import importlib.util
import os
import subprocess
import sys
from typing import Any

from jinja2 import TemplateError

from recipe.console import UserError
from recipe.dataset.control_text import ControlText
from recipe.dataset.encoding import ChatEncoder
from recipe.model.loading import Pretrained, one_line
from recipe.model.prompt_mode import PromptMode

CONVERTER = "convert_hf_to_gguf.py"
_SYSTEM, _USER, _ANSWER = "kqzvsystem", "kqzvuser", "kqzvanswer"  # words that no template contains


def converter(llama_cpp: str) -> str:
    """Return the path of the converter in a folder with llama.cpp's source.

    Raises:
        UserError: it is not there, or a package that it needs.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        raise UserError("--gguf: llama.cpp's converter needs the package sentencepiece; pip install sentencepiece.")
    path = os.path.join(llama_cpp, CONVERTER)
    if not os.path.exists(path):
        raise UserError(f"--llama_cpp {llama_cpp}: holds no {CONVERTER}; name a folder with the source of llama.cpp.")
    return path


def convert(folder: str, file: str, program: str, trust_remote_code: bool = False) -> None:
    """Convert the model in a folder into a GGUF file, and write Ollama's Modelfile beside it.

    Args:
        folder: folder of a whole model.
        file: GGUF file to write.
        program: path of the converter.
        trust_remote_code: whether to run code that comes with the tokenizer.

    Raises:
        UserError: the converter fails.
    """
    found = [os.path.join(os.path.dirname(program), "gguf-py"), os.environ.get("PYTHONPATH")]  # its own gguf first
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))}
    words = [sys.executable, program, folder, "--outfile", file]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise UserError(f"{program}: cannot convert {folder}: {reason.rstrip('.'):.300}. The merged model is complete.")
    try:
        text = modelfile(folder, os.path.basename(file), trust_remote_code)
        with open(modelfile_of(file), "w", encoding="utf-8") as target:
            target.write(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{modelfile_of(file)}: cannot be written: {one_line(error)} {file} is complete.") from None


def modelfile_of(file: str) -> str:
    """Return the path of the Modelfile beside a GGUF file."""
    return f"{os.path.splitext(file)[0]}.Modelfile"


def modelfile(folder: str, file: str, trust_remote_code: bool = False) -> str:
    """Return Ollama's Modelfile: the weights, the chat template as Go template, the stop tokens, the system message.

    Args:
        folder: folder of the model, with its tokenizer and prompt mode.
        file: name of the GGUF file beside the Modelfile.
    """
    mode = PromptMode.read(folder)
    encoder = mode.encoder(Pretrained(folder, trust_remote_code).tokenizer())
    lines = [f"FROM ./{file}"]
    template = go_template(encoder, mode.variables(encoder))
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# Ollama has to read the chat template in the file: it has no form of its own for this one.")
    lines += [f'PARAMETER stop "{token}"' for token in encoder.stop_tokens]
    if mode.system:
        lines.append(f'SYSTEM """{mode.system}"""')
    return "\n".join(lines) + "\n"


def go_template(encoder: ChatEncoder, variables: dict[str, Any]) -> str | None:
    """Return a Go template that renders messages of text as the chat template does; None if it has no simple form.

    Args:
        encoder: the encoder of the model's prompt mode.
        variables: variables of the chat template.
    """
    pieces = _pieces(encoder, variables)
    if pieces is None or any("{{" in text or '"""' in text for text in pieces.values()):
        return None
    user = '{{ if eq .Role "user" }}' + pieces["user"] + "{{ .Content }}" + pieces["after user"]
    answer = '{{ else if eq .Role "assistant" }}' + pieces["answer"] + "{{ .Content }}" + pieces["after answer"]
    system = "{{ if .System }}" + pieces["system"] + "{{ .System }}" + pieces["after system"]
    system += "{{ else }}" + pieces["opening"] + "{{ end }}"
    return system + "{{ range .Messages }}" + user + answer + "{{ end }}{{ end }}" + pieces["header"]


def _pieces(encoder, variables):
    """What the template writes before and after the text of each role; None if that depends on the other messages."""

    def render(*roles, prompt=False):
        messages = [{"role": role, "content": word} for role, word in roles]
        return encoder.template.render(messages, prompt=prompt, kwargs=variables)

    system, user, answer = ("system", _SYSTEM), ("user", _USER), ("assistant", _ANSWER)
    try:
        talk = render(system, user, answer, user)
        first, rest = talk.split(_SYSTEM)
        to_user, rest = rest.split(_USER, 1)
        to_answer, rest = rest.split(_ANSWER)
        to_next, end = rest.split(_USER)
        stop = ControlText(encoder.tokenizer).special
        cuts = [_after_stop(stop, text) for text in (to_user, to_answer, to_next)]
    except (ValueError, TemplateError):  # a word is missing or there twice, or no token ends a turn
        return None
    (after_system, before_user), (after_user, before_answer), (after_answer, again) = cuts
    header = render(user, prompt=True).removeprefix(render(user))
    opening = render(user).partition(_USER)[0].removesuffix(before_user)
    alone = opening + before_user + _USER + after_user == render(user)
    if not alone or again != before_user or end != after_user:
        return None
    # Ollama begins with it, too, where the tokenizer adds it by itself.
    begin = (
        encoder.tokenizer.bos_token if encoder.tokenizer("x")["input_ids"][0] == encoder.tokenizer.bos_token_id else ""
    )
    first, opening = first.removeprefix(begin), opening.removeprefix(begin)
    return {
        "system": first, "after system": after_system, "opening": opening, "user": before_user,
        "after user": after_user, "answer": before_answer, "after answer": after_answer, "header": header,
    }  # fmt: skip


def _after_stop(special, text):
    """Cut what lies between two texts behind the token that ends the first, and the white space that follows it."""
    found = special.search(text)
    if not found:
        raise ValueError("no control token")
    end = found.end() + len(text[found.end() :]) - len(text[found.end() :].lstrip())
    return text[:end], text[end:]
