from pathlib import Path

from graftllm.pipeline.work import source_identity
from graftllm.transfer_options import SourceOptions

TEMPLATE = "{{ messages }}"


def test_a_source_without_a_chat_template_is_what_it_was_before_there_were_any() -> None:
    """Kept answers hold by this value: a key that joins it asks everything anew."""
    source = SourceOptions(model="org/model", api_key_env="KEY", concurrency=3, retries=1)
    assert source_identity(source) == [
        {
            "model": "org/model", "url": None, "api_key_env": None, "concurrency": 16, "timeout_s": 600.0, "retries": 8,
            "max_failures": 0, "samples_per_request": 1, "reasoning": "strip", "price": None, "name": "model",
            "sampling": None, "device_map": None,
        },
        "org/model",
    ]  # fmt: skip


def test_a_chat_template_and_its_file_are_part_of_a_source(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    text, named = (SourceOptions(model="org/model", chat_template=one) for one in (TEMPLATE, str(file)))
    assert source_identity(text)[0]["chat_template"] == TEMPLATE
    assert source_identity(text)[1:] == ["org/model"]
    assert source_identity(named)[1:] == ["org/model", file]
