"""Chat templates, and conversations for them, that are refused: their output would not match the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

Message = dict[str, Any]

# Keys under which transformers passes a message's reasoning to a template, for any of them in the data.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Conversation:
    """The input of a template, and the weight of each message in the loss."""

    messages: Sequence[Message]
    weights: Sequence[float] = ()  # one for each message; 0: not trained on
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def refuse_template(source: str) -> None:
    """Raises ValueError for an invalid template, and for one that does not write the same text each time."""
    environment = Environment(extensions=[_Generation, loopcontrols])
    try:
        found = environment.parse(source)
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"it is no Jinja template: {error}") from error
    calls = {node.node.name for node in found.find_all(nodes.Call) if isinstance(node.node, nodes.Name)}
    if "lipsum" in calls or any(node.name == "random" for node in found.find_all(nodes.Filter)):
        raise ValueError("it writes another text each time (lipsum, random): tokens must be a function of the data")
    for kind in (nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock):
        if any(node.find(nodes.Scope) for node in found.find_all(kind)):
            raise ValueError(
                "it marks the assistant's text ({% generation %}) inside a macro, a call, a set or a filter block, "
                "where transformers computes a wrong position in the text: mark it outside"
            )
    if next(found.find_all(nodes.Pow), None) is not None:
        raise ValueError("it raises numbers to powers (**), which no limit of time can interrupt")


class _Generation(Extension):
    """Parses `{% generation %} ... {% endgeneration %}` to a `Scope`, a node that nothing else is parsed to."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def refuse_what_is_left_out(template: str, chat: Conversation) -> None:
    """Raises TemplateError where the conversation has keys that the template does not use."""
    for what, given in (("tools", chat.tools), ("documents", chat.documents)):
        if given and what not in template:
            raise TemplateError(f"the conversation has {what}, and the template does not write them")
    for number, message in enumerate(chat.messages, 1):
        for name in ("tool_calls", "function_call", *_THOUGHTS):
            known = _THOUGHTS if name in _THOUGHTS else (name,)
            if message.get(name) and not any(other in template for other in known):
                raise TemplateError(f"message {number} has {name}, and the template does not write it")


def refuse_what_is_misread(text: str, chat: Conversation) -> None:
    """Raises TemplateError where the `text` of the conversation holds a list of parts as Python prints it."""
    for number, message in enumerate(chat.messages, 1):
        content = message.get("content")
        if content == []:
            raise TemplateError(f"the content of message {number} is an empty list")
        if isinstance(content, list) and str(content) in text:
            raise TemplateError(f"the content of message {number} is a list of parts, which the template cannot write")
