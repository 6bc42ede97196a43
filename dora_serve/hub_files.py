"""Which of a Hub repository's files a merge needs. Pure functions of their names; nothing is fetched here.

A repository may hold the same weights many times over: as pickles, for other frameworks, in other precisions, as the
vendor's own file beside the shards. One of them is wanted, the one that transformers would load, and no pickle ever.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from dora_serve.errors import CheckpointError, HubError

What: TypeAlias = Literal["base", "adapter"]

PIPELINE_INDEX = "model_index.json"
INDEX_SUFFIX = ".safetensors.index.json"
# In the order in which transformers and diffusers look for them.
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Of PEFT and NVlabs, of mlx-lm, of diffusers' scripts; what others write has any name.
_ADAPTER_NAMES = (_ADAPTER_WEIGHTS, "adapters.safetensors", "pytorch_lora_weights.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "*.md")
_TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*.model", "*.tiktoken"),
)
_SIDE_FILES: Mapping[What, tuple[str, ...]] = {
    "base": ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", *_LICENCES),
    "adapter": ("adapter_config.json", *_TOKENIZER, *_LICENCES),
}
# The one folder below a model that belongs to it; what else lies deeper is another model's.
_TEMPLATES = "additional_chat_templates/"


def require_plain_names(names: Iterable[str], repo_id: str) -> None:
    """Raises HubError where a name would lead out of the folder it is put in, here or on Windows."""
    for name in names:
        climbs = ".." in re.split(r"[/\\]", name)
        if climbs or name.startswith(("/", "\\")) or re.match("[A-Za-z]:", name) or "\0" in name:
            raise HubError(
                f"The Hub's {repo_id!r} holds a file named {name!r}, which would lie outside its folder.",
                remedy="Do not use this repository; report it to the Hub.",
                repo_id=repo_id,
                name=name,
            )


def choose_weights(names: Sequence[str], what: What, repo_id: str) -> str:
    """The file that holds the weights, or the index that names those that do.

    names: relative to the folder of the model, which need not be the repository's top. Raises HubError where there is
    none, or more than one and no telling which.
    """
    top = sorted(name for name in names if "/" not in name)
    if what == "adapter":
        candidates = [name for name in _ADAPTER_NAMES if name in top][:1]
        candidates = candidates or [name for name in top if name.endswith(".safetensors") and not _is_model(name)]
        wanted = f"{_ADAPTER_WEIGHTS} or one other .safetensors"
    else:
        preferred = [name for stem in _STEMS for name in (f"{stem}.safetensors", f"{stem}{INDEX_SUFFIX}")]
        candidates = [name for name in preferred if name in top][:1]
        candidates = candidates or [name for name in top if name.endswith(INDEX_SUFFIX)]
        candidates = candidates or [name for name in top if name.endswith(".safetensors") and name != _ADAPTER_WEIGHTS]
        wanted = "model.safetensors or model.safetensors.index.json"
    if len(candidates) == 1:
        return candidates[0]
    got = ", ".join(top[:12]) + (", ..." if len(top) > 12 else "")
    pickles = [name for name in top if name.endswith(_PICKLES)]
    if what == "base" and _ADAPTER_WEIGHTS in top:
        remedy = "This is an adapter, not a base model: give the model that it was trained on."
    elif what == "adapter" and len(candidates) > 1:
        remedy = f"Name one of them: {repo_id}:{candidates[0]}"
    elif pickles and not candidates:
        got = f"pickles only ({', '.join(pickles[:4])})"
        remedy = (
            "A pickle can run code as it is loaded, so none is fetched. Load it with a library that you trust it to, "
            "save it as safetensors (save_pretrained does), and give that folder."
        )
    else:
        remedy = "Check the name. A folder within a repository is written user/name@revision:folder."
    raise HubError(
        f"The Hub's {repo_id!r} holds no {what} that can be read: got {got or 'nothing'}, wanted {wanted}.",
        remedy=remedy,
        repo_id=repo_id,
        names=top,
    )


def choose_files(
    names: Sequence[str], read: Callable[[str], str], what: What, repo_id: str, *, file: str | None = None
) -> list[str]:
    """All that a merge needs: weights, configuration, tokenizer, licence; of a diffusers pipeline, all its components.

    names: as for `choose_weights`. read: gives the text of a file, for an index. file: the weights, where the user
    named them. Raises what `choose_weights` and `choose_shards` raise.
    """
    if file is not None and file not in names:
        raise HubError(
            f"The Hub's {repo_id!r} lacks {file}.",
            remedy="Check the name and the revision.",
            repo_id=repo_id,
            name=file,
        )
    if what == "base" and file is None and PIPELINE_INDEX in names:
        return _choose_pipeline(names, read, repo_id)
    weights = file or choose_weights(names, what, repo_id)
    chosen = [weights, *choose_side_files(names, what)]
    return chosen + (choose_shards(read(weights), names, repo_id) if weights.endswith(INDEX_SUFFIX) else [])


def _choose_pipeline(names: Sequence[str], read: Callable[[str], str], repo_id: str) -> list[str]:
    """The components that the index names, each as a model by itself. What lies beside them is left: vendors put the
    whole pipeline there once more, as one file."""
    chosen = choose_side_files(names, "base")
    for component in _components(read(PIPELINE_INDEX), repo_id):
        within = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
        files = choose_side_files(within, "base")
        if any(name.endswith((".safetensors", *_PICKLES)) for name in within if "/" not in name):
            place = f"{component}/"

            def read_here(name: str, place: str = place) -> str:
                return read(place + name)

            files = choose_files(within, read_here, "base", f"{repo_id}:{component}")
        chosen += [f"{component}/{name}" for name in files]
    return chosen


def _components(index: str, repo_id: str) -> list[str]:
    """What model_index.json gives a library and a class. Raises CheckpointError where it is corrupt."""
    try:
        table = dict(json.loads(index))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{PIPELINE_INDEX} of the Hub's {repo_id!r} is corrupt: wanted a JSON object of components.",
            remedy="Tell the repository's owner, or give another revision.",
            repo_id=repo_id,
        ) from error
    return [name for name, value in table.items() if isinstance(value, list) and "/" not in name]


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _is_model(name: str) -> bool:
    """Whether it is a whole model's, or a shard of one's."""
    return name.startswith(tuple(f"{stem}{mark}" for stem in _STEMS for mark in (".", "-")))


def choose_shards(index: str, names: Sequence[str], repo_id: str) -> list[str]:
    """The files that an index (its text) names. Raises CheckpointError where it is corrupt or `names` lack one."""
    try:
        shards = sorted(set(json.loads(index)["weight_map"].values()))
        absent = [str(name) for name in shards if name not in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"The index of the Hub's {repo_id!r} is corrupt: wanted JSON with a weight_map from tensors to files.",
            remedy="Tell the repository's owner, or give another revision.",
            repo_id=repo_id,
        ) from error
    if absent:
        raise CheckpointError(
            f"The index of the Hub's {repo_id!r} names files that are not beside it: "
            f"{', '.join(absent[:4])}{', ...' if len(absent) > 4 else ''}.",
            remedy="Tell the repository's owner, or give another revision.",
            repo_id=repo_id,
            names=absent,
        )
    return shards


def choose_side_files(names: Sequence[str], what: What) -> list[str]:
    """Configuration, tokenizer, processor, code (never run) and licence."""
    return [
        name
        for name in names
        if not name.startswith(".")
        and not name.endswith(".index.json")
        and ("/" not in name or name.startswith(_TEMPLATES))
        and any(fnmatch.fnmatchcase(name.removeprefix(_TEMPLATES), pattern) for pattern in _SIDE_FILES[what])
    ]
