"""What an adapter's files say beyond lora_A and lora_B, and whether norm scales in a file hold for the served base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_serve.errors import AdapterError, CheckpointError
from dora_serve.formats.files import CONFIG_NAME, read_config
from dora_serve.norm_scale_file import NormScales, fingerprint
from dora_serve.vllm_plugin.placing import Trained

_MAGNITUDE = re.compile(r"^(.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$")
_PREFIX = "base_model.model."


def split_magnitudes(
    tensors: Mapping[str, Tensor], use_dora: bool, weights_mapper: Any
) -> tuple[dict[str, Tensor], Trained | None]:
    """An adapter's tensors by name -> those that vLLM knows, and the magnitudes by vLLM's names of their modules.

    Raises AdapterError where the configuration and the tensors disagree on whether this is a DoRA.
    """
    from vllm.lora.utils import parse_fine_tuned_lora_name

    factors, magnitudes, names = {}, {}, {}
    for name, tensor in tensors.items():
        match = _MAGNITUDE.match(name)
        if match is None:
            factors[name] = tensor
            continue
        module, _ = parse_fine_tuned_lora_name(f"{match[1]}.lora_A.weight", weights_mapper)
        magnitudes[module], names[module] = tensor, match[1].removeprefix(_PREFIX)
    if use_dora and not magnitudes:
        raise AdapterError(
            "The adapter's configuration says use_dora, and its file has no magnitude.",
            remedy="Save it again with its trainer: without them it is another adapter.",
        )
    if magnitudes and not use_dora:
        raise AdapterError(
            f"The adapter has {len(magnitudes)} magnitudes, and its configuration does not say use_dora.",
            remedy='Set "use_dora": true in adapter_config.json if it was trained as a DoRA.',
        )
    return factors, Trained(magnitudes, names) if magnitudes else None


def require_adapter(folder: Path) -> None:
    """Raises AdapterError for what is there, and is not the folder of a PEFT adapter with numbers where vLLM takes them
    for numbers. What is not there vLLM answers by itself."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise AdapterError(
            f"{str(folder)!r} is a file, and vLLM takes the folder of a PEFT adapter.",
            remedy="Give its folder, or write one from another format: `dora-export convert ADAPTER --to vllm ...`.",
            path=str(folder),
        )
    config = read_config(folder)
    numbers = {"r": int, "lora_alpha": (int, float)}
    wrong = [f"{key} = {config.get(key)!r}" for key, kind in numbers.items() if not _is(config.get(key), kind)]
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    wrong += [f"{key} = {one!r}" for key, one in patterns.items() if not _is_pattern(one)]
    if wrong:
        raise AdapterError(
            f"{str(folder / CONFIG_NAME)!r} says {', '.join(wrong)}, where vLLM wants numbers.",
            remedy="Restore the file from the trainer's output.",
            path=str(folder),
        )
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise AdapterError(
            f"{str(folder)!r} holds no {_WEIGHTS[0]}.",
            remedy="Copy the whole folder that the trainer wrote; of another format, convert it: "
            "`dora-export convert ADAPTER --to vllm --base BASE -o OUT`.",
            path=str(folder),
        )


_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


def _is(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_pattern(value: object) -> bool:
    return isinstance(value, dict) and all(_is(one, (int, float)) for one in value.values())


def in_words(error: Exception, folder: str) -> Exception | None:
    """What is wrong with the weights where vLLM, or what reads for it, says what it ran into; else None."""
    said = str(error)
    if "embedding LoRA size" in said:
        return AdapterError(said, remedy="Serve it on the base that it was trained on, with its tokens.", path=folder)
    # torch raises whatever it stumbles over in a pickle; vLLM's own words are ValueErrors.
    pickled = not (Path(folder) / _WEIGHTS[0]).is_file()
    if type(error).__name__ == "SafetensorError" or (pickled and not isinstance(error, (ValueError, OSError))):
        return AdapterError(
            f"{folder!r} cannot be read: its weights are corrupt or cut off ({said}).",
            remedy="Fetch or save the adapter again, and load it again.",
            path=folder,
        )
    return None


class ServedBase:
    """The base of a server: what its layers' norms are, and which files it was read from.

    squares: `||w_i||^2` of layers by name, filled as they are needed.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.squares: dict[str, Tensor] = {}
        self._model, self._revision = vllm_config.model_config.model, vllm_config.model_config.revision
        self._is_from_files = vllm_config.load_config.load_format in ("auto", "hf", "safetensors")
        self._fingerprint: str | None = None

    def weights_were_replaced(self) -> None:
        """From here on the base is not what its files say."""
        self.squares.clear()
        self._is_from_files = False

    def with_known_scales(self, trained: Trained, stored: NormScales | None) -> Trained:
        """`trained` with the norm scales from its file, where that was made for this base."""
        if stored is None or stored.base != self._own_fingerprint():
            return trained
        return replace(trained, precomputed=stored.scales)

    def _own_fingerprint(self) -> str | None:
        if not self._is_from_files:
            return None
        if self._fingerprint is None:
            folder = _local_folder(self._model, self._revision)
            try:
                self._fingerprint = None if folder is None else fingerprint(folder)
            except CheckpointError:  # in another format
                self._is_from_files = False
        return self._fingerprint


def _local_folder(model: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
