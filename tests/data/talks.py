"""Conversations, and how a chat template writes them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from stoker.conf.schema import DataConfig
from stoker.data.chat import ChatEncoder, settings_of
from stoker.data.chat_shapes import text_of
from stoker.data.tokenizer import ByteTokenizer, Tokenizer

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }};{% endgeneration %}"
    "{% else %}{{ m['role'][0] | upper }}:{{ m['content'] }};{% endif %}{% endfor %}"
)
SYSTEM, HELLO, HI = [
    {"role": role, "content": content}
    for role, content in (("system", "be brief"), ("user", "hello"), ("assistant", "hi"))
]
MORE, NO = {"role": "user", "content": "more?"}, {"role": "assistant", "content": "no"}
TALK = [SYSTEM, HELLO, HI, MORE, NO]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "é"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of é", "parameters": {}}}


def encoded(tokenizer: Tokenizer, line: Any, **args: Any) -> tuple[list[int], list[int]]:
    """Ids and learned marks of a line of data; `args` are `data.args`."""
    line = line if isinstance(line, dict) else {"messages": line}
    encoder = ChatEncoder(settings_of(DataConfig(args=args), tokenizer), tokenizer)
    ((ids, learned),) = encoder.encode(tokenizer, "line 1", text_of(line, "messages"))
    return ids.tolist(), learned.tolist()


def learned_text(line: Any, source: str) -> str:
    ids, learned = encoded(ByteTokenizer(), line, template=source)
    return ByteTokenizer().decode([number for number, mark in zip(ids, learned, strict=True) if mark])


def theirs(folder: Path, line: dict[str, Any]) -> tuple[list[int], list[int]]:
    hub = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = hub.apply_chat_template(
        line["messages"], tools=line.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]
