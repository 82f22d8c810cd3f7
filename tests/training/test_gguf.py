"""merge.py --gguf: what is written for Ollama renders as the chat template does; the converter is llama.cpp's own."""

import copy
import re
import sys

import pytest
from tokenizers.processors import TemplateProcessing

from helpers import template
from recipe.console import UserError
from recipe.dataset.encoding import ChatEncoder
from recipe.model.prompt_mode import PromptMode
from recipe.training import gguf

TALKS = [
    [("user", "Q")],
    [("system", "S"), ("user", "Q")],
    [("user", "Q"), ("assistant", "A"), ("user", "R")],
    [("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B"), ("user", "T")],
]


def rendered(form, talk):
    """What Go makes of a template of our form."""
    pattern = (
        r"{{ if .System }}(.*?){{ .System }}(.*?){{ else }}(.*?){{ end }}{{ range .Messages }}"
        r'{{ if eq .Role "user" }}(.*?){{ .Content }}(.*?){{ else if eq .Role "assistant" }}(.*?){{ .Content }}(.*?)'
        r"{{ end }}{{ end }}(.*)"
    )
    before, after, opening, user, after_user, answer, after_answer, header = re.fullmatch(pattern, form, re.S).groups()
    system = next((text for role, text in talk if role == "system"), None)
    text = before + system + after if system else opening
    for role, content in talk:
        if role != "system":
            text += user + content + after_user if role == "user" else answer + content + after_answer
    return text + header


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "qwen3_5_nothink", "smollm2", "llama3"])
def test_ollamas_template_renders_as_the_chat_template(tokenizer_of, name):
    encoder = ChatEncoder(tokenizer_of(name))
    form = gguf.go_template(encoder, {})
    for talk in TALKS:
        messages = [{"role": role, "content": text} for role, text in talk]
        assert rendered(form, talk) == encoder.template.render(messages, prompt=True), talk


def test_the_token_that_begins_texts_is_left_to_ollama_where_the_tokenizer_adds_it(tokenizer_of):
    tokenizer = copy.deepcopy(tokenizer_of("llama3"))
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    encoder = ChatEncoder(tokenizer)
    for talk in TALKS:
        messages = [{"role": role, "content": text} for role, text in talk]
        assert begin + rendered(gguf.go_template(encoder, {}), talk) == encoder.template.render(messages, prompt=True)


def test_a_token_that_begins_turns_stays_although_it_is_called_that_of_texts(tokenizer_of):
    """As in SmolLM2, whose bos_token is <|im_start|>."""
    tokenizer = copy.deepcopy(tokenizer_of("smollm2"))
    tokenizer.bos_token = "<|im_start|>"
    assert "{{ if .System }}<|im_start|>system" in gguf.go_template(ChatEncoder(tokenizer), {})


def test_a_template_that_depends_on_other_messages_is_left_to_ollama(tokenizer_of):
    assert gguf.go_template(ChatEncoder(tokenizer_of("gemma")), {}) is None  # a system message is part of the question


def test_the_modelfile_has_the_stop_token_and_the_system_message_of_training(tiny_copy):
    PromptMode(system="Be brief.").save(str(tiny_copy))
    text = gguf.modelfile(str(tiny_copy), "model.gguf")
    assert text.startswith("FROM ./model.gguf\nTEMPLATE") and text.endswith('SYSTEM """Be brief."""\n')
    assert 'PARAMETER stop "<|im_end|>"' in text
    (tiny_copy / "chat_template.jinja").write_text(template("gemma3").replace("<end_of_turn>", "<|im_end|>"))
    assert "# Ollama has to read" in gguf.modelfile(str(tiny_copy), "model.gguf")


def test_a_converter_that_is_not_there_or_fails_is_one_sentence(tiny_copy, tmp_path, monkeypatch):
    import merge

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="needs the package sentencepiece; pip install sentencepiece"):
        gguf.converter(str(tmp_path))
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: name)  # whether it is there or not
    with pytest.raises(UserError, match="holds no convert_hf_to_gguf.py"):
        gguf.converter(str(tmp_path))
    (tmp_path / gguf.CONVERTER).write_text("import sys; sys.exit('unknown architecture')")
    with pytest.raises(UserError, match="cannot convert .*: unknown architecture. The merged model is complete"):
        gguf.convert(str(tiny_copy), str(tmp_path / "x.gguf"), gguf.converter(str(tmp_path)))
    (tmp_path / "of_the_user.py").write_text("found = 'a module of the user'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / gguf.CONVERTER).write_text("import sys, of_the_user; sys.exit(of_the_user.found)")
    with pytest.raises(UserError, match="cannot convert .*: a module of the user. The merged"):
        gguf.convert(str(tiny_copy), str(tmp_path / "x.gguf"), gguf.converter(str(tmp_path)))
    words = ["merge.py", "--adapter", "no", "--output", str(tmp_path / "out"), "--gguf", "x.gguf"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="belong together"):
        merge.run(merge.parse())
    monkeypatch.setattr(sys, "argv", [*words[:-1], str(tmp_path / "out" / "x.gguf"), "--llama_cpp", str(tmp_path)])
    with pytest.raises(UserError, match="lies in the folder of --output"):
        merge.run(merge.parse())
