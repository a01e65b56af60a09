"""What a source was asked, so that only what is new is asked again."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from graftllm.records import Prompt, read_responses, write_rows
from graftllm.storage import write_text


def keep_answers(path: Path, prompts: Sequence[Prompt], way: str) -> None:
    """Leave those answers in a file that are to these prompts, asked in this way; note what further ones will be to.

    Args:
        path: JSONL of one source's responses. The note is beside it, in `NAME.asked.json`.
        prompts: what is asked now.
        way: a hash of whatever else an answer depends on.
    """
    note = path.with_suffix(".asked.json")
    told = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    before = told["prompts"] if told.get("way") == way else {}
    now = {prompt.id: hashlib.sha256(json.dumps(prompt.question).encode()).hexdigest() for prompt in prompts}
    if path.exists():
        rows = read_responses(path)
        kept = [row for row in rows if row.prompt_id in now and before.get(row.prompt_id) == now[row.prompt_id]]
        if kept != rows:
            write_rows(path, kept)
    write_text(note, json.dumps({"way": way, "prompts": now}))
