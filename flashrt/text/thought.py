"""What a reasoning model writes between <think> and </think>, apart from its answer.

IS: whether a prompt opens a thought, and a thought put back into content for templates that read it
there. IS NOT: a parser of replies (reply). Exists because a thought that was cut off must not come
back as the answer, and templates drop old thoughts by themselves if they see which they are.
"""

from __future__ import annotations

from flashrt.text.template import Message

OPEN, CLOSE = "<think>", "</think>"
FIELD = "reasoning_content"


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends inside a thought: templates of such models write the opening."""
    return prompt.rstrip().endswith(OPEN)


def readable(message: Message, template_source: str) -> Message:
    """A message for a template: a thought becomes part of the content if the template looks for it
    there and knows no field for it.
    """
    thought, content = message.get(FIELD), message.get("content") or ""
    reads_content = CLOSE in template_source and FIELD not in template_source
    if not thought or not reads_content or not isinstance(content, str):
        return message
    others = {name: value for name, value in message.items() if name != FIELD}
    return {**others, "content": f"{OPEN}\n{thought}\n{CLOSE}\n\n{content}"}
