"""From a request to token ids, and from a token to its text, for whatever decodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_serve.engine.requests import Request
from dora_serve.engine.sound import token_ids
from dora_serve.errors import EngineError


@dataclass(frozen=True)
class PromptTokens:
    """tokenizer: None for a model that is given token ids. vocabulary: how many tokens there are. context: how many a
    text can have, None where nothing says."""

    tokenizer: Any
    vocabulary: int
    context: int | None

    def tokenize(self, request: Request, *, special: bool = True) -> list[int]:
        """The token ids of a request's prompt, with the tokenizer's special tokens or without.

        Raises EngineError where it has none, or no sound ones.
        """
        request.require_sound()
        if request.messages is not None:
            tokens = self._chat_tokens(request.messages)
        elif isinstance(request.prompt, str):
            if not request.prompt:
                raise EngineError("The prompt is empty.", remedy="Give at least one character.")
            tokens = self._encode(request.prompt, special=special)
        else:
            tokens = token_ids(request.prompt) or []
        if not tokens:
            raise EngineError("The prompt has no tokens.", remedy="Give at least one.")
        wrong = [token for token in tokens if not 0 <= token < self.vocabulary]
        if wrong:
            raise EngineError(
                f"The prompt has the token id {wrong[0]}, and the vocabulary {self.vocabulary} tokens.",
                remedy="Use this base's own tokenizer.",
            )
        return tokens

    def room_for(self, request: Request, prompt_tokens: int) -> int:
        """How many tokens may follow. Raises EngineError where there is none."""
        context = self.context
        left = None if context is None else context - prompt_tokens
        if left is not None and left < 1:
            raise EngineError(
                f"The prompt has {prompt_tokens} tokens, and the context has room for {context}, with at least one to "
                "follow.",
                remedy="Shorten the prompt.",
                prompt_tokens=prompt_tokens,
                context=context,
            )
        wanted = [room for room in (request.max_tokens, left) if room is not None]
        return min(wanted) if wanted else 1 << 20

    def token_text(self, token: int) -> str:
        """A token by itself, special tokens by name."""
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def _chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if not messages:
            raise EngineError("The request has no messages.", remedy="Give at least one.")
        tokenizer = self._tokenizer_or_raise()
        if not getattr(tokenizer, "chat_template", None):
            raise EngineError(
                "This base's tokenizer has no chat template, so messages cannot be put into one prompt.",
                remedy="Give a plain prompt.",
            )
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template of somebody else's raises
            raise EngineError(
                f"The chat template does not take these messages: {error}",
                remedy='Each message is {"role": "system" | "user" | "assistant", "content": text}.',
            ) from error
        return self._encode(text, special=False)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        try:
            return list(self._tokenizer_or_raise()(text, add_special_tokens=special, verbose=False)["input_ids"])
        except (TypeError, ValueError) as error:  # bytes that are no text come from a shell as lone surrogates
            raise EngineError(
                f"The tokenizer does not take this text: {error}", remedy="Give valid Unicode text."
            ) from error

    def _tokenizer_or_raise(self) -> Any:
        if self.tokenizer is None:
            raise EngineError("This engine has no tokenizer.", remedy="Give the prompt as token ids.")
        return self.tokenizer


def context_of(config: Any) -> int | None:
    """How many tokens a text can have, None where a configuration (an object or a mapping) does not say.

    Of a longrope (Phi-3's, arXiv 2402.13753) no more than its original context: one longer text would turn the
    positions of all rows of its batch, and no longer fit the keys that are in its own cache.
    """
    known = [_positive(_get(config, key)) for key in _CONTEXT_KEYS]
    context = next((value for value in known if value is not None), None)
    given = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    for rope in (given, *given.values()) if isinstance(given, Mapping) else ():  # one for all layers, or by their type
        if isinstance(rope, Mapping) and "long_factor" in rope:
            original = _positive(rope.get(_ORIGINAL)) or _positive(_get(config, _ORIGINAL))
            if original is not None:
                context = min(original, context or original)
    return context


_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_ORIGINAL = "original_max_position_embeddings"


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def end_tokens(owners: Sequence[Any]) -> frozenset[int]:
    """The ids that end a text: those of the first of the owners (objects or mappings) that names any."""
    for owner in owners:
        value = _get(owner, "eos_token_id")
        found = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if found:
            return frozenset(found)
    return frozenset()
