"""vLLM's own server, started as a user starts it, with the unmodified openai client."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vllm.cases import ADAPTERS, ROOT
from tests.vllm.generate import SETTINGS

PROMPT = "Dear Sir,"
TOKENS = 24
FLAGS = "--dtype float32 --max-model-len 256 --max-num-seqs 8 --no-enable-prefix-caching --served-model-name base"


@dataclass(frozen=True)
class Server:
    client: Any
    log: Path

    def say(self, model: str, *, prompt: str = PROMPT, tokens: int = TOKENS) -> str:
        answer = self.client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0)
        return str(answer.choices[0].text)

    def stream(self, model: str) -> str:
        pieces = self.client.completions.create(
            model=model, prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
        )
        return "".join(piece.choices[0].text for piece in pieces)

    def load(self, name: str, path: Path, **more: Any) -> Any:
        body = {"lora_name": name, "lora_path": str(path), **more}
        return self.client.post("/load_lora_adapter", body=body, cast_to=object)

    def unload(self, name: str) -> Any:
        return self.client.post("/unload_lora_adapter", body={"lora_name": name}, cast_to=object)

    @property
    def models(self) -> set[str]:
        return {model.id for model in self.client.models.list()}


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    import openai

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    # What vLLM's own resolver looks for when a model is asked for that it does not know.
    resolved = shutil.copytree(ADAPTERS / "style-dora", folder / "resolver" / "resolved")
    config = json.loads((resolved / "adapter_config.json").read_text())
    (resolved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(smollm2)}))
    environment = {**os.environ, **SETTINGS, "VLLM_LORA_RESOLVER_CACHE_DIR": str(folder / "resolver")}
    command = [sys.executable, "-m", "dora_serve.cli", "vllm", str(smollm2), "--runtime-loading", "--max-rank", "8"]
    for name in ("dates-dora", "dates-lora"):
        command += ["--adapter", f"{name}={ADAPTERS / name}"]
    command += ["--", "--host", "127.0.0.1", "--port", str(port), *FLAGS.split()]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        _wait_for(lambda: bool(list(client.models.list())), process, log)
        yield Server(client, log)
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(answers: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    import openai

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if answers():
                return
        except openai.APIConnectionError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


@pytest.fixture(scope="module")
def peft_says(smollm2: Path) -> dict[str, str]:
    """The text that PEFT generates with each adapter, and transformers without one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(PROMPT, return_tensors="pt")
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    said = {}

    def generate(name: str) -> None:
        with torch.inference_mode():
            out = model.generate(**ids, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
        said[name] = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)

    generate("base")
    for name in ("dates-dora", "dates-lora", "style-dora"):
        if name == "dates-dora":
            model = PeftModel.from_pretrained(model, ADAPTERS / name, adapter_name=name)
        else:
            model.load_adapter(ADAPTERS / name, adapter_name=name)
        model.set_adapter(name)
        generate(name)
    assert len(set(said.values())) == 4
    return said


def test_adapters_load_are_replaced_and_go_while_others_stream(server: Server, peft_says: dict[str, str]) -> None:
    assert server.models == {"base", "dates-dora", "dates-lora"}
    said: dict[str, list[str]] = {"base": [], "dates-dora": [], "dates-lora": []}
    stopped = threading.Event()

    def keep_streaming(model: str) -> None:
        while not stopped.is_set():
            said[model].append(server.stream(model))

    threads = [threading.Thread(target=keep_streaming, args=(model,)) for model in said]
    for thread in threads:
        thread.start()
    try:
        server.load("swap", ADAPTERS / "style-dora")
        assert server.say("swap") == peft_says["style-dora"]
        server.load("swap", ADAPTERS / "dates-dora", load_inplace=True)
        assert server.say("swap") == peft_says["dates-dora"]
        server.load("swap", ADAPTERS / "dates-lora", load_inplace=True)
        assert server.say("swap") == peft_says["dates-lora"]
        server.unload("swap")
        assert "swap" not in server.models
        server.load("swap", ADAPTERS / "style-dora")
        assert server.say("swap") == peft_says["style-dora"]
        server.unload("swap")
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    for model, texts in said.items():
        assert texts
        assert set(texts) == {peft_says[model]}


def test_the_app_talks_to_it(server: Server, peft_says: dict[str, str]) -> None:
    from app.server_backend import ServerBackend
    from dora_serve.engine.requests import Request

    backend = ServerBackend(str(server.client.base_url))
    assert [row.name for row in backend.adapters()] == ["dates-dora", "dates-lora"]
    backend.load("style", ADAPTERS / "style-dora")
    requests = [Request(prompt=PROMPT, adapter=name, max_tokens=TOKENS) for name in (None, "dates-dora", "style")]
    texts = ["", "", ""]
    for event in backend.stream(requests):
        texts[event.index] += event.text or ""
    assert texts == [peft_says[name] for name in ("base", "dates-dora", "style-dora")]
    backend.unload("style")
    assert server.models == {"base", "dates-dora", "dates-lora"}


Fault = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def _shorten(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = next(name for name in tensors if "lora_magnitude" in name)
    tensors[name] = tensors[name][:-3].clone()


def _move_to_a_layer_that_is_not_there(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.0.self_attn.q_proj" in name]:
        tensors[name.replace("layers.0", "layers.77")] = tensors.pop(name)


def _move_to_a_norm(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.0.self_attn.q_proj" in name]:
        tensors[name.replace("self_attn.q_proj", "input_layernorm")] = tensors.pop(name)


def _leave_out_one_magnitude(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[next(name for name in tensors if "lora_magnitude" in name)]


def _leave_out_all_magnitudes(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if "lora_magnitude" in name]:
        del tensors[name]


def _deny_dora(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["use_dora"] = False


def _widen(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith("down_proj.lora_A.weight"))
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)


def _raise_the_rank(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["r"] = 12
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensors[name] = tensor.repeat(3, 1)
        elif "lora_B" in name:
            tensors[name] = tensor.repeat(1, 3)


def _narrow(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".k_proj." in name and "lora_A" not in name]:
        tensors[name] = tensors[name][: len(tensors[name]) // 3].clone()


def _lose_the_magnitudes(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    next(tensor for name, tensor in tensors.items() if "lora_magnitude" in name)[5] = torch.nan


def _overflow(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = torch.inf


def _leave_out_a_factor(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[next(name for name in tensors if "lora_A" in name)]


def _leave_out_both_factors(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    module = next(name for name in tensors if "lora_magnitude" in name).partition(".lora_magnitude")[0]
    for name in [name for name in tensors if name.startswith((f"{module}.lora_A", f"{module}.lora_B"))]:
        del tensors[name]


def _say_another_rank(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    _raise_the_rank(tensors, config)
    config["r"] = 4


def _say_no_number(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["lora_alpha"] = "8"


def _train_a_bias(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["bias"] = "all"


def _train_the_head(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["modules_to_save"] = ["lm_head"]


FAULTS: dict[str, tuple[Fault, str]] = {
    "short magnitude": (_shorten, "a magnitude of"),
    "no such layer": (_move_to_a_layer_that_is_not_there, "model.layers.77.self_attn.q_proj"),
    "a norm": (_move_to_a_norm, "input_layernorm"),
    "one magnitude missing": (_leave_out_one_magnitude, "no magnitude"),
    "no magnitudes": (_leave_out_all_magnitudes, "its file has no magnitude"),
    "not called a DoRA": (_deny_dora, "does not say use_dora"),
    "another base": (_widen, "a base of another size"),
    "rank": (_raise_the_rank, "--max-lora-rank 16"),
    "fewer heads": (_narrow, "a base of another size"),
    "no number": (_lose_the_magnitudes, "a magnitude that is not finite"),
    "infinite": (_overflow, "values that are not finite"),
    "half a module": (_leave_out_a_factor, "no lora_A"),
    "a magnitude alone": (_leave_out_both_factors, "neither lora_A nor lora_B"),
    "said otherwise": (_say_another_rank, "of one rank, of at most 8"),
    "a word": (_say_no_number, "lora_alpha = '8'"),
    "bias": (_train_a_bias, "dora-export merge"),
    "head": (_train_the_head, "dora-export merge"),
}
FAULTS_OF_A_LORA = ("another base", "fewer heads", "infinite", "half a module", "said otherwise")
"""Those that vLLM alone takes, or stops at when it has taken half of the adapter."""


def test_bad_adapters_are_refused_in_our_words_and_the_server_lives_on(
    server: Server, peft_says: dict[str, str], tmp_path: Path
) -> None:
    import openai

    good = ADAPTERS / "dates-dora"

    def refused(name: str, path: Path, **more: Any) -> str:
        with pytest.raises(openai.BadRequestError) as caught:
            server.load(name, path, **more)
        assert caught.value.status_code == 400
        return str(caught.value)

    server.load("good", ADAPTERS / "style-dora")
    faults = [("dora", name) for name in FAULTS] + [("lora", name) for name in FAULTS_OF_A_LORA]
    for kind, name in faults:
        fault, sentence = FAULTS[name]
        folder = shutil.copytree(ADAPTERS / f"dates-{kind}", tmp_path / f"{kind}_{name.replace(' ', '_')}")
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        fault(tensors, config)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        # One that fails takes nobody's place.
        message = refused("good", folder, load_inplace=True)
        assert "dora-serve: " in message, name
        assert sentence in message, (name, message)
        # Said of what belongs nowhere, and of nothing whose own fault has been named.
        assert ("a layer that vLLM can adapt" in message) is (name == "no such layer"), (name, message)
    cut = shutil.copytree(good, tmp_path / "cut")
    weights = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "corrupt or cut off" in refused("cut", cut)
    assert "corrupt or cut off" in refused("good", cut, load_inplace=True)
    (cut / "adapter_model.safetensors").rename(cut / "adapter_model.bin")
    assert "corrupt or cut off" in refused("cut", cut)
    (cut / "adapter_model.bin").unlink()
    assert "holds no adapter_model.safetensors" in refused("cut", cut)
    (cut / "adapter_config.json").write_text("{")
    assert "cannot be read as JSON" in refused("cut", cut)
    (cut / "adapter_config.json").unlink()
    assert "has no adapter_config.json" in refused("cut", cut)
    assert "is a file" in refused("file", good / "adapter_model.safetensors")
    assert server.say("good") == peft_says["style-dora"]
    server.unload("good")
    assert server.models == {"base", "dates-dora", "dates-lora"}
    assert server.say("dates-dora") == peft_says["dates-dora"]


def test_a_dora_is_found_by_its_name_alone(server: Server, peft_says: dict[str, str]) -> None:
    assert server.say("resolved") == peft_says["style-dora"]
    assert "resolved" in server.models
