"""What models are run on when a merge is checked: text where there is a tokenizer, else seeded inputs of every kind.

Everything is deterministic and made once, so that every model sees the same numbers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_serve.errors import DoraServeError, no_such_path
from dora_serve.pictures import picture_inputs

BUILT_IN_PROMPTS: tuple[str, ...] = (
    "The river rises in the hills above the town and reaches the sea after ninety kilometres.",
    "Write the date in ISO form: the third of May 2031, a quarter past nine in the evening.",
    "def median(values: list[float]) -> float:\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n",
    "Why does ice float on water? Answer in one sentence.",
    "Der Zug nach Leipzig fährt um 7:42 Uhr von Gleis 11 ab. Le prochain part à midi.",
    "Give me three names for a small grey cat.",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "alive": false}',
    "Is 1,024 divided by 16 equal to 64? Explain each step.",
)
"""Short, and unlike each other: prose, a date, code, questions, other languages, JSON, numbers."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
_RANDOM_LENGTHS = (9, 12, 16, 20, 24, 11, 17, 32)
_SEED = 2402_09353
_PICTURES = 2


@dataclass(frozen=True)
class Sample:
    """One forward pass: keyword arguments of `forward`, each with a batch of one, on the CPU.

    grows: the input that a greedy continuation makes longer, None where the model generates nothing. prompt_length:
    how much of it was there before.
    """

    inputs: Mapping[str, Tensor]
    grows: str | None = None
    prompt_length: int = 0

    @property
    def token_ids(self) -> Tensor:
        """(positions,) of what grows, else of input_ids; empty for a model of no tokens."""
        ids = self.inputs.get(self.grows or "input_ids")
        return torch.empty(0, dtype=torch.long) if ids is None else ids[0]

    def continued(self, tokens: Sequence[int]) -> Sample:
        """The same with tokens appended to what grows."""
        if self.grows is None or not tokens:
            return self
        inputs = dict(self.inputs)
        inputs[self.grows] = torch.cat([inputs[self.grows], torch.tensor([list(tokens)])], dim=1)
        mask = inputs.get("attention_mask")
        if mask is not None and self.grows == "input_ids":
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return Sample(inputs, self.grows, self.prompt_length)


@dataclass(frozen=True)
class Samples:
    """samples, what they are in words, and what a user should know about them."""

    samples: tuple[Sample, ...]
    description: str
    notes: tuple[str, ...] = field(default=())


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a file: one a line, or of a `.jsonl` the "prompt" of each line; empty lines are skipped.

    Raises DoraServeError for a file that is not there, is not text, holds none, or has a line without a prompt.
    """
    if not path.is_file():
        raise DoraServeError(no_such_path("The prompts file", path), remedy="Check the path.", path=str(path))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DoraServeError(f"{str(path)!r} cannot be read as text: {error}.", path=str(path)) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = tuple(_jsonl(path, number, line) if path.suffix == ".jsonl" else line for number, line in numbered)
    if not prompts:
        raise DoraServeError(
            f"{str(path)!r} holds no prompts.", remedy="Write one a line, or a .jsonl file.", path=str(path)
        )
    return prompts


def _jsonl(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DoraServeError(f"{str(path)!r}, line {number}, is not JSON: {error}.", path=str(path)) from error
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise DoraServeError(
            f'{str(path)!r}, line {number}: got {line[:80]!r}, wanted an object with a string "prompt".',
            path=str(path),
        )
    return prompt


def make_samples(model: Any, folder: Path, prompts: tuple[str, ...] | None, token_rows: Sequence[int]) -> Samples:
    """Inputs for `model`, a transformers model, whose tokenizer, if there is one, lies in `folder`.

    prompts: None for the built-in ones; of those every second one goes through the chat template where there is one,
    a user's own all do. token_rows: tokens that the adapter trained one by one, which get a sample of their own.
    Raises DoraServeError for prompts that no tokenizer can read, ValueError where the inputs cannot be guessed.
    """
    main = str(getattr(model, "main_input_name", "input_ids"))
    accepted = set(inspect.signature(model.forward).parameters)
    generates = bool(model.can_generate()) if hasattr(model, "can_generate") else False
    notes: list[str] = []
    if main != "input_ids":
        if prompts is not None:
            raise DoraServeError(
                f"{type(model).__name__} takes {main}, and no prompts.", remedy="Leave out --prompts for this model."
            )
        samples = [_made_up(model, main, number, accepted) for number in range(2 if main == "input_features" else 4)]
        description = f"{len(samples)} seeded random {main}"
    else:
        ids, description = _token_ids(model, folder, prompts, notes)
        if token_rows:
            ids.append([int(index) for index in token_rows[:64]])
            description += " and the trained tokens"
        samples = [_text_sample(model, one, accepted, generates) for one in ids]
    if generates and main == "input_ids":
        # Of these no continuation is asked for: the picture would have to be left out of the later steps.
        words = [sample.token_ids.tolist()[:12] for sample in samples[:_PICTURES]]
        seen = [picture_inputs(model, one, number) for number, one in enumerate(words)]
        found = [Sample(inputs) for inputs in seen if inputs is not None]
        if found:
            samples += found
            description += f" and {len(found)} with a seeded random picture"
    elif main == "input_ids" and hasattr(model.config, "vision_config") and "pixel_values" in accepted:
        pictures = [_pixels(model.config.vision_config, number) for number in range(len(samples))]
        samples = [
            Sample({**sample.inputs, "pixel_values": picture}, sample.grows, sample.prompt_length)
            for sample, picture in zip(samples, pictures, strict=True)
        ]
    return Samples(tuple(samples), description, tuple(notes))


def _token_ids(
    model: Any, folder: Path, prompts: tuple[str, ...] | None, notes: list[str]
) -> tuple[list[list[int]], str]:
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if not has_tokenizer:
        if prompts is not None:
            raise DoraServeError(
                f"{str(folder)!r} has no tokenizer, so the prompts cannot be read.",
                remedy="Copy the tokenizer's files there, or leave out --prompts.",
                path=str(folder),
            )
        notes.append("The base folder has no tokenizer: random token ids were used.")
        return _random_ids(model), f"{len(_RANDOM_LENGTHS)} seeded random sequences"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        texts = BUILT_IN_PROMPTS if prompts is None else prompts
        chat = bool(getattr(tokenizer, "chat_template", None)) and bool(model.can_generate())
        ids = [
            _encode(tokenizer, text, chat=chat and (prompts is not None or number % 2 == 1))
            for number, text in enumerate(texts)
        ]
    except Exception as error:  # whatever a broken tokenizer, or one that needs a package, raises
        if prompts is not None:
            raise DoraServeError(
                f"The tokenizer of {str(folder)!r} cannot be used: {type(error).__name__}: {error}", path=str(folder)
            ) from error
        notes.append(f"The base's tokenizer cannot be used ({type(error).__name__}): random token ids were used.")
        return _random_ids(model), f"{len(_RANDOM_LENGTHS)} seeded random sequences"
    kind = "built-in prompts" if prompts is None else "prompts"
    return _within(model, ids), f"{len(ids)} {kind}{', through the chat template' if chat and prompts else ''}"


def _encode(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    if chat:
        messages = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    else:
        encoded = tokenizer(text)
    return [int(token) for token in encoded["input_ids"]]


def _within(model: Any, ids: list[list[int]]) -> list[list[int]]:
    """Cut to what the model has room for, its continuation included.

    A tokenizer of a resized vocabulary may know more tokens than the base has rows: those wrap around.
    """
    room = _text_config(model, "max_position_embeddings")
    rows = _vocabulary(model)
    limit = max(2, room - 32, room // 2) if isinstance(room, int) and room > 0 else 2048
    return [[token % rows for token in sequence[:limit]] for sequence in ids]


def room_for(model: Any, sample: Sample) -> int | None:
    """How many tokens more the model has positions for, None where it does not say."""
    for name in ("max_target_positions", "max_position_embeddings"):
        room = _text_config(model, name)
        if isinstance(room, int) and room > 0:
            return max(0, room - sample.prompt_length)
    return None


def _random_ids(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(_SEED)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    special: set[int] = set()
    for owner in (config, model.config):
        for name, value in owner.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
    allowed = torch.tensor([token for token in range(_vocabulary(model)) if token not in special] or [0])
    sequences = []
    for length in _RANDOM_LENGTHS:
        chosen = allowed[torch.randint(len(allowed), (length,), generator=generator)].tolist()
        eos = getattr(config, "eos_token_id", None)
        if not model.can_generate() and isinstance(eos, int) and 0 <= eos < _vocabulary(model):
            chosen[-1] = eos  # classifiers of BART's kind and CLIP read the state at the end token
        sequences.append(chosen)
    return _within(model, sequences)


def _vocabulary(model: Any) -> int:
    size = _text_config(model, "vocab_size")
    return size if isinstance(size, int) else int(model.get_input_embeddings().weight.shape[0])


def _text_config(model: Any, name: str) -> Any:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(config, name, None)


def _text_sample(model: Any, ids: list[int], accepted: set[str], generates: bool) -> Sample:
    inputs = {"input_ids": torch.tensor([ids])}
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if not getattr(model.config, "is_encoder_decoder", False):
        return Sample(inputs, "input_ids" if generates else None, len(ids))
    if "decoder_input_ids" not in accepted:
        return Sample(inputs)
    if not generates:
        return Sample(inputs)  # a classifier shifts its input for the decoder itself
    inputs["decoder_input_ids"] = _decoder_start(model, ids[:8])
    return Sample(inputs, "decoder_input_ids", inputs["decoder_input_ids"].shape[1])


def _decoder_start(model: Any, ids: list[int]) -> Tensor:
    config = model.config
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        start = getattr(config, name, None)
        if isinstance(start, int):
            return torch.tensor([[start, *ids]])
    return torch.tensor([[0, *ids]])


def _made_up(model: Any, main: str, number: int, accepted: set[str]) -> Sample:
    config = model.config
    if main == "pixel_values":
        inputs = {main: _pixels(getattr(config, "vision_config", None) or getattr(config, "encoder", config), number)}
    elif main == "input_features":
        inputs = {main: _noise(_feature_shape(config), number)}
    elif main == "input_values":
        bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
        spectrogram = (frames, bins) if isinstance(bins, int) and isinstance(frames, int) else None
        inputs = {main: _noise(spectrogram or (8000,), number)}
    else:
        raise ValueError(f"{type(model).__name__} takes {main}, for which no input can be made up")
    if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" not in accepted:
        return Sample(inputs)
    vocabulary = max(2, _vocabulary(model))
    inputs["decoder_input_ids"] = _decoder_start(model, [(7 * number + 3 * step + 5) % vocabulary for step in range(7)])
    return Sample(inputs, "decoder_input_ids" if model.can_generate() else None, inputs["decoder_input_ids"].shape[1])


def _pixels(config: Any, number: int) -> Tensor:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    return _noise((channels, height, width), number)


def _feature_shape(config: Any) -> tuple[int, ...]:
    """(features, frames) for Whisper, (frames, features) for the other speech models."""
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if isinstance(bins, int) and isinstance(frames, int):
        return (bins, 2 * frames)
    for name in ("input_feat_per_channel", "feature_projection_input_dim"):
        width = getattr(config, name, None)
        if isinstance(width, int):
            return (100, width)
    raise ValueError("the shape of its input_features is not known")


def _noise(shape: tuple[int, ...], number: int) -> Tensor:
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(_SEED + number))
