"""chat.py in a terminal and in a pipe: answers, commands, two models side by side, conversations to train on."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch

import chat
import finetune
from helpers import ROOT, ROWS, argv, template, write
from recipe.console import UserError


@pytest.fixture(scope="module")
def thinker(tiny_model, tmp_path_factory):
    """A tiny model with a template that has a switch for thoughts, trained for a step."""
    folder = tmp_path_factory.mktemp("thinker")
    (folder / "qwen3.jinja").write_text(template("qwen3"))
    rows = write(folder / "rows.jsonl", ROWS)
    options = ["--chat_template", folder / "qwen3.jinja", "--max_steps", 1]
    finetune.train(argv(tiny_model, rows, folder / "model", *options))
    return folder / "model"


@pytest.fixture
def typed(monkeypatch, capsys):
    """Function from lines and flags to what chat.py prints and the Chats that answered."""

    def run(lines, model, *flags):
        made = []
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        kept = chat.Chat.__init__

        def keeping(self, *args):
            kept(self, *args)
            made.append(self)

        monkeypatch.setattr(chat.Chat, "__init__", keeping)
        capsys.readouterr()
        chat.talk(chat.parse(["--model_name_or_path", str(model), "--max_new_tokens", "3", *map(str, flags)]))
        monkeypatch.setattr(chat.Chat, "__init__", kept)
        return capsys.readouterr().out, made

    return run


def test_a_conversation_grows_and_starts_anew(tiny_model, typed):
    _, (one,) = typed(["Hi", "And?"], tiny_model)
    assert [message["role"] for message in one.messages] == ["user", "assistant"] * 2
    for again in ("", "/reset"):
        said, (one,) = typed(["Hi", again, "Ho"], tiny_model, "--system", "Sing.")
        assert [message["content"] for message in one.messages[:2]] == ["Sing.", "Ho"] and "(new conversation)" in said


def test_an_answer_is_printed_as_it_is_kept(tiny_model, typed):
    said, (one,) = typed(["Hi"], tiny_model, "--max_new_tokens", 40)
    assert len(one.messages[-1]["content"]) > 20 and one.messages[-1]["content"] in said


def test_the_system_message_can_be_changed(tiny_model, typed):
    _, (one,) = typed(["Hi", "/system Be brief.", "Ho"], tiny_model)
    assert [message["content"] for message in one.messages[:2]] == ["Be brief.", "Ho"]
    said, (one,) = typed(["/system", "Ho"], tiny_model, "--system", "Sing.")
    assert one.messages[0]["role"] == "user" and "without a system message" in said


def test_thoughts_are_switched_on_and_off_where_the_template_can(tiny_model, thinker, typed):
    prompts = {}
    for switch in ("on", "off"):
        said, (one,) = typed([f"/think {switch}"], thinker)
        assert f"(thoughts are {switch})" in said
        prompts[switch] = one.encoder.prompt_variables(one.mode.to_be_answered([{"role": "user", "content": "q"}]))
    assert prompts == {"on": {"enable_thinking": True}, "off": {"enable_thinking": False}}
    assert "no switch for thoughts" in typed(["/think on"], tiny_model)[0]


def test_what_is_saved_can_be_trained_on(tiny_model, typed, tmp_path):
    path = tmp_path / "talks.jsonl"
    said, _ = typed(["Hi", f"/save {path}", "/reset", "Ho", f"/save {path}"], tiny_model, "--system", "Sing.")
    assert " ".join(said.split()).count("(1 conversation added to") == 2
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [row[1]["content"] for row in rows] == ["Hi", "Ho"]
    assert finetune.train(argv(tiny_model, path, tmp_path / "out", "--max_steps", 1))["train_loss"] > 0
    assert "cannot be written" in typed(["Hi", "/save /no/such/folder/x"], tiny_model)[0]


def test_two_models_answer_side_by_side(tiny_model, thinker, typed):
    said, chats = typed(["Hi"], tiny_model, "--compare", thinker)
    assert [one.name for one in chats] == [str(tiny_model), str(thinker)] and "┃" in said
    for one in chats:
        assert one.messages[-1]["role"] == "assistant"


def test_a_turn_that_one_model_cannot_answer_is_forgotten_by_both(tiny_model, thinker, typed, monkeypatch):
    answer = chat.Chat.answer

    def stopped(self, text, streamer=None):
        if self.name == str(thinker) and text == "stop":
            raise KeyboardInterrupt
        return None if self.name == str(thinker) and text == "long" else answer(self, text, streamer)

    monkeypatch.setattr(chat.Chat, "answer", stopped)
    said, chats = typed(["Hi", "stop", "long"], tiny_model, "--compare", thinker)
    assert "(stopped; the turn is forgotten)" in said and "reaches --model_max_length" in said
    for one in chats:
        assert [message["content"] for message in one.messages if message["role"] == "user"] == ["Hi"]


def test_a_command_that_is_not_known_lists_those_that_are(tiny_model, typed):
    for text in ("/help", "/think maybe", "/save"):
        said, (one,) = typed([text], tiny_model)
        assert all(command.split()[0] in said for command in chat.COMMANDS) and not one.messages


def test_a_line_of_a_pipe_that_is_no_command_is_a_turn(tiny_model, typed):
    _, (one,) = typed(["/etc/passwd is what?"], tiny_model)
    assert one.messages[0]["content"] == "/etc/passwd is what?"


def test_an_answer_is_printed_as_it_is_whatever_is_in_it(tiny_model, monkeypatch, capsys):
    args = chat.parse(["--model_name_or_path", str(tiny_model)])
    one = chat.Chat(str(tiny_model), args)
    text = "10:100:5\ta[:b:] [bold]x[/bold] <|object_ref_start|>"
    streamer = chat._streamer(one)
    capsys.readouterr()
    for tokens in ([1, 2], *([i] for i in one.tokenizer.encode(f"{text}<|im_end|>"))):  # the prompt comes first
        streamer.put(torch.tensor(tokens))
    streamer.end()
    assert capsys.readouterr().out == text


def test_a_conversation_that_is_too_long_is_told_and_goes_on(tiny_model, typed):
    said, (one,) = typed(["Hi", "long " * 200, "Ho"], tiny_model, "--model_max_length", 80)
    assert said.count("reaches --model_max_length") == 1
    assert [message["content"] for message in one.messages if message["role"] == "user"] == ["Hi", "Ho"]


def test_a_model_without_a_template_is_one_sentence(tiny_copy, typed):
    (tiny_copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        typed(["Hi"], tiny_copy)


@pytest.mark.slow
def test_a_terminal_shows_a_prompt_and_edits_lines(tiny_model):
    ours, theirs = pty.openpty()
    command = [sys.executable, "chat.py", "--model_name_or_path", str(tiny_model), "--max_new_tokens", "3"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    seen, typed, end = b"", [b"/systemX\x7f Sing.\r", b"Hi\r", b"/save /dev/stdout\r", b"\x04"], time.time() + 120
    while time.time() < end and process.poll() is None:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                seen += os.read(ours, 4096)
            except OSError:
                break
        if len(typed) > 1 and seen.count(b"> ") >= 5 - len(typed):
            os.write(ours, typed.pop(0))
        elif len(typed) == 1 and seen.count(b"> ") >= 4:
            time.sleep(0.5)  # what comes while the terminal changes its mode is lost
            os.write(ours, typed[0])
    assert process.wait(timeout=30) == 0, process.stderr.read().decode()[-2000:]
    assert b'"content": "Sing."' in seen and b"\x1b[" in seen  # the key was undone; there are colours
