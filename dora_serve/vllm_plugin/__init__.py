"""DoRA for vLLM, as a plugin: `pip install` is all there is to do, and `vllm serve BASE --enable-lora` takes DoRAs.

vLLM calls `register` in every one of its processes (the entry point is in pyproject.toml). It costs nothing there: the
patches are made when vLLM imports what they patch, and in a process that never does so they are never made.
"""

from __future__ import annotations

import logging
import re

TESTED_VERSIONS = "0.32.*"
"""What the patches were written for and tested with. They reach into vLLM's inside, which other versions change."""

# vLLM shows what is logged below its own name.
_log = logging.getLogger("vllm.plugins.dora_serve")


def register() -> None:
    """The entry point: patch this process's vLLM, or leave it as it is and say so in one line."""
    from vllm.version import __version__ as version

    if not is_tested(version):
        _log.warning(
            "dora-serve patches vLLM %s only, and this is %s: vLLM stays as it is, and refuses DoRA.",
            TESTED_VERSIONS,
            version,
        )
        return
    from dora_serve.vllm_plugin import patches
    from dora_serve.vllm_plugin.on_import import on_import

    on_import(patches.WORKER_MODULE, patches.patch_worker)
    on_import(patches.RUNNER_MODULE, patches.patch_runner)
    on_import(patches.SERVER_MODULE, patches.patch_server)


def is_tested(version: str) -> bool:
    """Whether `version` of vLLM is one that the patches were tested with, whatever it was built for."""
    return re.match(r"0\.32\.\d+(\+|$)", version) is not None
