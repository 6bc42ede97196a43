"""The base model and its tokenizer, from a folder or the Hub, through transformers: whole, and no code of theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dora_serve.devices import require_device
from dora_serve.errors import CheckpointError, UnavailableError, in_a_line
from dora_serve.hub import locate
from dora_serve.progress import OnProgress, Progress, ignore_progress
from dora_serve.quiet import quiet_transformers

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


@dataclass(frozen=True)
class LoadedBase:
    """tokenizer: None where the base has no files of one. label: what errors call it. path: where its files are."""

    model: Any
    tokenizer: Any
    label: str
    path: Path


def load_base(
    base: str | Path, dtype: torch.dtype | None, device: str | None, on_progress: OnProgress = ignore_progress
) -> LoadedBase:
    """dtype: None for the checkpoint's own. device: None for the GPU where there is one.

    Raises CheckpointError for a base that is no causal language model, is damaged, or lacks tensors; HubError;
    UnavailableError without transformers or the device.
    """
    require_device(device or "auto")
    try:
        import transformers
    except ImportError as error:
        raise UnavailableError(
            "The engine needs transformers, which is not installed.",
            remedy="Run `pip install 'transformers>=5.23' accelerate`, or install dora-serve with the extra [serve].",
        ) from error
    located = locate(str(base), what="base", on_progress=on_progress)
    _require_model_folder(str(base), located.path)
    on_progress(Progress("loading the base", 0, None, ""))
    where = device if device not in (None, "auto") else "cuda" if torch.cuda.is_available() else "cpu"
    kwargs: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": False, "output_loading_info": True}
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(located.path, trust_remote_code=False)
            if getattr(config, "quantization_config", None) is not None or where != "cpu":
                kwargs["device_map"] = where
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(located.path, **kwargs)
            model, report = loaded
            tokenizer = load_tokenizer(located.path)
    except ImportError as error:  # of a quantized base, by transformers' quantizer
        raise UnavailableError(
            f"The base {str(base)!r} cannot be loaded here: {in_a_line(error)}",
            remedy="Install what it names, or give a dense base: `dora-export merge` makes one of this base and an "
            "adapter, and needs no such library.",
            path=str(located.path),
        ) from error
    except Exception as error:  # transformers, safetensors and tokenizers raise a dozen kinds for what is damaged
        raise CheckpointError(
            f"The base {str(base)!r} cannot be loaded as a causal language model: {in_a_line(error)}",
            remedy="Give a folder or Hub id, whole, of a causal language model that transformers knows without code of "
            "its own.",
            path=str(located.path),
        ) from error
    missing = sorted(map(str, report.get("missing_keys", ())))
    if missing:
        shown = f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        raise CheckpointError(
            f"The base {str(base)!r} lacks {len(missing)} tensors of a {type(model).__name__}: {shown}.",
            remedy="Fetch or save it again: transformers would fill them with random numbers.",
            path=str(located.path),
            missing=missing,
        )
    return LoadedBase(model, tokenizer, f"the base {str(base)!r}", located.path)


def _require_model_folder(base: str, path: Path) -> None:
    """Raise CheckpointError for what transformers would speak of as a Hub id, or as a model without a type."""
    if path.is_file():
        raise CheckpointError(
            f"The base {base!r} is a file.",
            remedy=f"Give the folder with its config.json and tokenizer: {str(path.parent)!r}.",
            path=str(path),
        )
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"The base {base!r} is an adapter.",
            remedy="Give the base that it was trained on, and this one as an adapter of it: --adapter NAME=PATH.",
            path=str(path),
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies in a folder, None where there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
