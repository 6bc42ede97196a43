"""An adapter and its base: what is said where the base is another one than the adapter names."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from dora_serve.hub import Located, locate
from dora_serve.hub_headers import whole
from exporters.cli import main
from tests.cases import adapt, llama, load, rewrite_json, save


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter on it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = llama()
    save(model, base)
    adapt(load(base, model), adapter, target_modules=["q_proj"])
    return base, adapter


CASES = (
    # the adapter's own base, the one that was given, what is noted
    ("meta-llama/Llama-3", "someone/llama_3", "of the same name"),
    ("meta-llama/Llama-3", "meta-llama/Llama-3.2", "no copy"),
    ("unsloth/llama-3-bnb-4bit@main", "meta-llama/Llama-3@main", "no copy"),
    ("meta-llama/Llama-3", "meta-llama/Llama-3", None),
    ("meta-llama/Llama-3@v1", "Meta-Llama/llama-3:folder", None),
    ("meta-llama/Llama-3", None, None),  # a folder, whose name says nothing
    ("/home/someone/llama", "meta-llama/Llama-3", None),
    (None, "meta-llama/Llama-3", None),
)


@pytest.mark.parametrize(("trained_on", "given", "noted"), CASES)
def test_another_base_than_the_adapter_names_is_noted(
    trained_on: str | None,
    given: str | None,
    noted: str | None,
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = folders
    rewrite_json(adapter / "adapter_config.json", base_model_name_or_path=trained_on)

    def find(spec: str, **options: object) -> Located:
        """The Hub's repositories are all that one folder."""
        if spec != given:
            return locate(spec, what="base")
        return Located(base, spec, spec.partition("@")[0].partition(":")[0], "0" * 40)

    monkeypatch.setattr("exporters.sources.locate", find)
    monkeypatch.setattr("exporters.inspect.locate_headers", lambda spec, **options: nullcontext(whole(find(spec))))
    arguments = ["--base", given or str(base)]
    for command in (["merge", str(adapter), *arguments, "--dry-run"], ["inspect", str(adapter), *arguments]):
        assert main(command) == 0
        said = capsys.readouterr().out
        notes = [line for line in said.splitlines() if line.startswith("Note: The adapter says")]
        assert len(notes) == (noted is not None)
        assert main([*command, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["notes"]
        assert [f"Note: {note}" for note in told if note.startswith("The adapter says")] == notes
        if noted is not None:
            assert noted in notes[0]
            assert str(trained_on).partition("@")[0] in notes[0]
            assert str(given).partition("@")[0] in notes[0]


def test_the_base_that_the_adapter_names_is_not_noted(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = folders
    rewrite_json(adapter / "adapter_config.json", base_model_name_or_path="user/model")

    def find(spec: str, **options: object) -> Located:
        return Located(base, spec, spec, "0" * 40) if spec == "user/model" else Located(Path(spec), spec, None, None)

    monkeypatch.setattr("exporters.sources.locate", find)
    assert main(["merge", str(adapter), "--dry-run"]) == 0
    assert "trained on" not in capsys.readouterr().out
