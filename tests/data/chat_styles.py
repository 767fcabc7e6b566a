"""Chat templates in the styles that are in use, each with what makes it hard, and conversations to try them on.

`[[` and `]]` in a template stand for `{% generation %}` and `{% endgeneration %}`, or for nothing.
"""

from __future__ import annotations

import random
from typing import Any

# Every turn alike.
CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' %}[[{{ m['content'] }}<|im_end|>]]{% else %}{{ m['content'] }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Beginning of text, trimmed contents, the date unless it is given, tools in the system message, calls as JSON.
LLAMA3 = """{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|header|>system<|/header|>\\n\\nToday: ' + date_string + '\\n' }}
{%- if tools is not none and tools is defined %}{{- 'Tools: ' + (tools | tojson(indent=2)) }}{%- endif %}
{{- system + '<|eot|>' }}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|header|>ipython<|/header|>\\n\\n' + (m.content | tojson) + '<|eot|>' }}
    {%- elif m.tool_calls is defined %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {{- '<|header|>assistant<|/header|>\\n\\n' -}}
        [[{{- m.tool_calls[0].function | tojson -}}<|eot|>]]
    {%- else %}
        {{- '<|header|>' + m.role + '<|/header|>\\n\\n' }}
        {%- if m.role == 'assistant' %}[[{{- m.content | trim }}<|eot|>]]
        {%- else %}{{- m.content | trim + '<|eot|>' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}"""

# A default system message, a line for each tool, tool answers grouped into one turn.
QWEN25 = """{%- if tools %}
{{- '<|im_start|>system\\n' }}{%- for t in tools %}{{- t | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
{{- '<|im_start|>system\\nBe blue.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}[[
        {%- if m.content %}{{- m.content }}{%- endif %}
        {%- for c in m.tool_calls or [] %}
            {{- '<tool_call>\\n' + (c.function | tojson) + '\\n</tool_call>\\n' }}
        {%- endfor %}
        {{- '<|im_end|>' }}]]{{- '\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>' + m.content + '</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Reasoning, kept only behind the last question: earlier turns are rewritten.
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content or '' %}{%- set thought = m.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}[[
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for c in m.tool_calls or [] %}{{- '\\n<tool_call>' + (c.function | tojson) }}{%- endfor %}
        {{- '<|im_end|>' }}]]{{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- '' }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# Another name for the assistant, the system message inside the first question, contents in parts, roles that alternate.
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for m in loop_messages -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + (first if loop.first else '') }}
    {%- if m['content'] is string -%}{%- set content = m['content'] | trim -%}
    {%- else -%}{%- set content = m['content'] | map(attribute='text') | map('trim') | join -%}{%- endif -%}
    {%- if m['role'] == 'assistant' -%}[[{{ content + '</turn>' }}]]{%- else -%}{{ content + '</turn>' }}{%- endif -%}
    {{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<turn>model\\n' }}{%- endif -%}"""

# No opening of a reply; tools before the last question only, so that earlier text changes.
MISTRAL = """{{- bos_token }}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m['role'] == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}
        {%- if tools and loop.index0 == ns.last %}{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{%- endif %}
        {{- '[INST] ' + m['content'] + '[/INST]' }}
    {%- elif m['role'] == 'tool' %}{{- '[RESULT]' + m['content'] + '[/RESULT]' }}
    {%- elif m['tool_calls'] %}[[{{- '[TOOL_CALLS]' + (m['tool_calls'] | tojson) + eos_token }}]]
    {%- elif m['role'] == 'assistant' %}[[{{- ' ' + m['content'] + eos_token }}]]
    {%- else %}{{- m['content'] + '\\n\\n' }}{%- endif %}
{%- endfor %}"""

# Marks around roles, all in one expression.
PHI4 = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' }}
{%- set text = m['content'] + '<|im_end|>' %}
{%- if m['role'] == 'assistant' %}[[{{ text }}]]{% else %}{{ text }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

# Nothing ends a turn but the beginning of the next.
GLM4 = """[gMASK]<sop>
{%- if tools %}<|system|>
{% for t in tools %}{{ t | tojson(ensure_ascii=False) }}
{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|assistant|>
[[{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson(ensure_ascii=True) }}{% endfor %}]]
{%- elif m.role == 'tool' %}<|observation|>
{{ m.content }}{% else %}<|{{ m.role }}|>
{{ m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}"""

# The date, channels, thoughts of the last turn only, and another end for the last turn.
GPT_OSS = """{%- macro system() %}
    {{- '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- endmacro %}
{{- system() }}
{%- if tools %}{{- '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|start|>assistant' }}[[
        {%- if loop.last and m.thinking %}
            {{- '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}
        {%- endif %}
        {%- if m.tool_calls %}
            {{- '<|channel|>commentary to=' + m.tool_calls[0].function.name + '<|message|>' }}
            {{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
        {%- else %}
            {{- '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
        {%- endif %}]]
    {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# A system prompt gathered from all messages, thoughts cut out of earlier answers, end of text behind each answer.
DEEPSEEK = """{%- set ns = namespace(system='') %}
{%- for m in messages if m['role'] == 'system' %}{%- set ns.system = ns.system + m['content'] %}{%- endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{{- '<|user|>' + m['content'] }}
    {%- elif m['role'] == 'tool' %}{{- '<|observation|>' + m['content'] }}
    {%- elif m['role'] == 'assistant' %}
        {%- set content = m['content'] or '' %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
        {{- '<|assistant|>' }}[[{{- content }}
        {%- for c in m['tool_calls'] or [] %}{{- '```' + c['function']['name'] + '```' }}{%- endfor %}
        {{- eos_token }}]]
    {%- endif %}
{%- endfor %}
{%- if tools %}{%- endif %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

# A macro, loop controls, and filters over lists.
MACROS = """{%- macro heading(m) -%}<|header|>{{ m.role | upper }}<|/header|>{%- endmacro -%}
{{ bos_token }}{{ tools | default([], true) | map(attribute='function') | map(attribute='name') | join(',') }}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{%- continue -%}{%- endif -%}
{{ heading(m) }}
{%- if m.role == 'assistant' -%}[[{{ m.content | default('', true) }}
{{- m.tool_calls | length if m.tool_calls }}<|eot|>]]
{%- else -%}{{ m.content | default('', true) }}<|eot|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ heading({'role': 'assistant'}) }}{%- endif -%}"""

# Plain words: no special token but the one at the very end.
PLAIN = """{% for m in messages %}
{{- m.role | capitalize }}: {% if m.role == 'assistant' %}[[{{ m.content }}]]{% else %}{{ m.content }}{% endif %}
{{- '\\n' }}{% endfor %}
{%- if add_generation_prompt %}Assistant: {% elif messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}"""

STYLES = {
    "chatml": CHATML,
    "llama-3": LLAMA3,
    "qwen-2.5": QWEN25,
    "qwen-3": QWEN3,
    "gemma-3": GEMMA3,
    "mistral": MISTRAL,
    "phi-4": PHI4,
    "glm-4": GLM4,
    "gpt-oss": GPT_OSS,
    "deepseek": DEEPSEEK,
    "macros": MACROS,
    "plain": PLAIN,
}


def template(style: str, marked: bool) -> str:
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return STYLES[style].replace("[[", begin).replace("]]", end)


_WORDS = (
    *(
        "what is",
        " the colour",
        "\n\n",
        "of the sea",
        " ",
        "\n",
        "blue",
        "grey",
        "it is",
        "north",
        "\t",
        "",
        "!",
        "12345",
    ),
    *(
        "é",
        "日本",
        "\U0001f682",
        "\ue000\ue000",
        "\ue001\ue001",
        "\U000f0000",
        "\u200b",
        "e\u0301",
        "\u2028",
        "<",
        "&",
        '"',
    ),
    *("<|im_end|>", "<|eos|>", "<think>a</think>", "</think>", "{{ x }}", "{% if %}", "[/INST]", "assistant\n", "\\n"),
)


def a_conversation(chance: random.Random) -> dict[str, Any]:
    """A line of data: most are well-formed, some have what templates stumble over."""

    def text() -> str:
        return "".join(chance.choices(_WORDS, k=chance.choice((0, 1, 2, 3, 8, 20))))

    def content() -> Any:
        kind = chance.random()
        if kind < 0.06:
            return [{"type": "text", "text": text()} for _ in range(chance.randrange(3))]
        return None if kind < 0.08 else text()

    def call() -> dict[str, Any]:
        function = {
            "name": chance.choice(("weather", "météo")),
            "arguments": {"place": text(), "n": chance.randrange(9)},
        }
        return {"type": "function", "function": function}

    messages: list[dict[str, Any]] = []
    if chance.random() < 0.4:
        messages.append({"role": "system", "content": text()})
    uses_tools = chance.random() < 0.35
    for _ in range(chance.choice((1, 1, 2, 2, 3, 5))):
        if chance.random() < 0.95:
            messages.append({"role": "user", "content": content()})
        reply: dict[str, Any] = {"role": "assistant", "content": content()}
        if chance.random() < 0.15:
            reply[chance.choice(("reasoning_content", "thinking", "reasoning"))] = text()
        if uses_tools and chance.random() < 0.5:
            calls = [call() for _ in range(chance.choice((1, 1, 2)))]
            messages.append(reply | {"content": chance.choice((None, "", text())), "tool_calls": calls})
            messages += [{"role": "tool", "content": text(), "name": "weather"} for _ in calls]
        if chance.random() < 0.93:
            messages.append(reply)
    line: dict[str, Any] = {"messages": messages or [{"role": "user", "content": "it"}]}
    if uses_tools:
        about = {"name": "weather", "description": text(), "parameters": {"type": "object", "properties": {}}}
        line["tools"] = [{"type": "function", "function": about}] * chance.choice((1, 2))
    if chance.random() < 0.1:
        line["chat_template_kwargs"] = {"enable_thinking": chance.random() < 0.5}
    return line
