"""Small tokenizers made with the `tokenizers` library, for engines whose models are tiny."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3
CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message.role }}:{{ message.content }}\n{% endfor %}assistant:"


def byte_tokenizer() -> Any:
    """Every byte is a token of its own, so that any character beyond ASCII takes several: 259 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


def word_tokenizer(words: tuple[str, ...]) -> Any:
    """A token for each word, and as SentencePiece does a space before it, but for the first of a text."""
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _fast(tokenizer)


def _fast(tokenizer: Any) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast
