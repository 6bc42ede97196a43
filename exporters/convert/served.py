"""An adapter of any format as a folder that vLLM can be given, kept in the cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dora_serve.cache_folder import cache_folder
from dora_serve.formats import ReadOptions
from dora_serve.progress import OnProgress, ignore_progress
from exporters.convert.run import VLLM, ConvertRequest, convert, write_conversion


def converted(adapter: str, base: str, read: ReadOptions, on_progress: OnProgress = ignore_progress) -> Path:
    """The folder, written anew: the files that it was made from may be others now. Raises what `convert` raises."""
    conversion = convert(ConvertRequest(adapter, VLLM, base=base, read=read), on_progress)
    name = hashlib.sha256(repr((os.path.abspath(adapter), base, read.format)).encode()).hexdigest()[:16]
    return write_conversion(conversion, cache_folder() / "vllm" / name, overwrite=True)
