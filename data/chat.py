"""Conversations: JSON lines of messages, written out by a chat template; only the assistant's tokens are learned.

Which tokens those are is known in one of two ways. A template that marks them with `{% generation %}` says it itself
(as in transformers). Any other is rendered message by message: what the text grows by where the assistant speaks,
without the opening that the template gives to a reply (`add_generation_prompt`), is the assistant's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stoker.conf.schema import DataConfig
from stoker.data.documents import Source
from stoker.data.jsonl import field
from stoker.data.text import json_documents, known_args
from stoker.data.tokenizer import Tokenizer

_OPEN, _CLOSE = "\ue000\ue000", "\ue001\ue001"  # of Unicode's private use: they mark what is generated

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def open_source(config: DataConfig) -> Source:
    """The conversations under `data.path`: files of JSON lines, in the key `data.args.messages` (default `messages`).

    `data.args.template` is a Jinja template, or a file with one; default: the one in the folder of `data.tokenizer`,
    else ChatML. Raises ValueError for a path without such files and a template that is none.
    """
    args = known_args(config, "data=chat", messages="messages", pattern="*", template=None)
    take, what = field(args["messages"], list), f"{args['messages']} as messages"

    def text_of(values: dict[str, Any]) -> str:
        return json.dumps(take(values), ensure_ascii=False)

    collections = json_documents(config, "data=chat", args["pattern"], args["messages"], text_of, what)
    folder = config.tokenizer if config.tokenizer not in ("byte", "bpe", None) else None
    source, names = _template_of(args["template"], Path(folder).expanduser() if folder else None)
    return Source(collections, ChatEncoder(source, tuple(sorted(names.items()))))


@dataclass(frozen=True)
class ChatEncoder:
    """See `stoker.data.documents.Encoder`."""

    template: str
    names: tuple[tuple[str, str], ...] = ()  # what a template may call on, such as bos_token

    @property
    def fingerprint(self) -> str:
        return "chat " + hashlib.sha256(repr((self.template, self.names)).encode()).hexdigest()[:16]

    def encode(self, tokenizer: Tokenizer, name: str, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the conversation `text` (JSON), closed by the end of a document, and which the assistant said."""
        messages = json.loads(text)
        if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
            raise ValueError(f"{name}: messages are objects with a 'role' and a 'content'")
        try:
            rendered, spoken = self.render(messages)
        except TemplateError as error:
            raise ValueError(f"{name}: the chat template refuses it: {error}") from error
        ids, ends = tokenizer.encode_template(rendered)
        said = np.zeros(len(rendered) + 1, np.uint8)
        for begin, end in spoken:
            said[begin:end] = 1
        learned = said[np.array(ends, np.int64) - 1] if ids else np.empty(0, np.uint8)
        return np.array([*ids, tokenizer.end_of_document], np.uint32), np.append(
            learned, np.uint8(self._learns_end(messages))
        )

    def render(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and which stretches of it (begin, end) the assistant said.

        Raises jinja2.TemplateError for messages that the template refuses.
        """
        if "generation %}" in self.template or "generation -%}" in self.template:
            return _unmarked(self._text(messages, False))
        whole = self._text(messages, False)
        spoken = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:number], True) if number else ""
            after = self._text(messages[: number + 1], False) if number + 1 < len(messages) else whole
            if not whole.startswith(after) or not after.startswith(before):
                raise TemplateError(
                    "what it writes for a message changes when more follow: mark what the assistant says with "
                    "{% generation %} ... {% endgeneration %}"
                )
            spoken.append((len(before), len(after)))
        return whole, spoken

    def _learns_end(self, messages: Sequence[dict[str, Any]]) -> bool:
        return bool(messages) and messages[-1]["role"] == "assistant"

    def _text(self, messages: Sequence[dict[str, Any]], opening: bool) -> str:
        return self._compiled.render(messages=messages, add_generation_prompt=opening, **dict(self.names))

    @cached_property
    def _compiled(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json
        return environment.from_string(self.template)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, as in transformers: what stands between is marked."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    rendered, spoken = "", []
    for number, piece in enumerate(text.split(_OPEN)):
        said, _, rest = piece.partition(_CLOSE) if number else ("", "", piece)
        if said:
            spoken.append((len(rendered), len(rendered) + len(said)))
        rendered += said + rest
    return rendered, spoken


def _template_of(given: str | None, folder: Path | None) -> tuple[str, dict[str, str]]:
    """The template's text, and the special tokens that it may call by name."""
    names: dict[str, str] = {}
    found = None
    if folder is not None and folder.is_dir():
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = {}
        for key, value in config.items():
            if key.endswith("_token") and value:
                names[key] = value["content"] if isinstance(value, dict) else str(value)
        found = config.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if (folder / "chat_template.jinja").exists():
            found = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if given is not None:
        found = given if "{" in given else _read(Path(given).expanduser())
    source = found or CHATML
    try:
        ChatEncoder(source)._compiled  # noqa: B018 (it compiles)
    except TemplateError as error:
        raise ValueError(f"data.args.template is no Jinja template: {error}") from error
    return source, {"bos_token": "", "eos_token": ""} | names


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read data.args.template={path}: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **settings)
