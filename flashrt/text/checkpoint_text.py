"""What a checkpoint says about text: its tokenizer, its chat template, which tokens begin and end.

IS: one noun for directories and GGUF files. IS NOT: the parts themselves (tokenizer, template,
config, gguf_tokenizer).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashrt.text.config import end_of_turn, first_token
from flashrt.text.template import ChatTemplate, chat_template_of
from flashrt.text.tokenizer import Tokenizer, tokenizer_of


@dataclass(frozen=True, slots=True)
class CheckpointText:
    """`stop_tokens` end a turn or a text. `first_token` begins a text that no template renders;
    None where the model wants none.
    """

    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    stop_tokens: tuple[int, ...] = ()
    first_token: int | None = None

    @property
    def can_talk(self) -> bool:
        """Whether a conversation can be had: there is a tokenizer and a chat template."""
        return self.tokenizer is not None and self.template is not None


def text_of_directory(path: Path, vocab_size: int | None) -> CheckpointText:
    """Of a Hugging Face directory; `vocab_size` is None where it is not known yet.

    Raises CheckpointError for files that cannot be used.
    """
    tokenizer = tokenizer_of(path)
    if tokenizer is None:
        return CheckpointText()
    return CheckpointText(
        tokenizer,
        chat_template_of(path),
        end_of_turn(path, tokenizer, vocab_size),
        first_token(path, tokenizer),
    )
