"""Whether an engine with our adapters answers as PEFT does, and `auto` in front of it as the pack that it picks.

    make demo
    graftllm export runs/demo/grafted --format vllm --out adapters --allow-drop
    sh adapters/launch.sh &
    graftllm serve runs/demo/grafted --engine http://127.0.0.1:8000 --port 8001 &
    python benchmarks/engine.py [--run runs/demo] [--adapters adapters] [--prompts 60] [--device auto]
        [--engine http://127.0.0.1:8000] [--router http://127.0.0.1:8001]

Each skill's test prompts are asked greedily: of the base on the engine, of the skill's adapter through PEFT and on the
engine, and, streamed, of `auto`. Printed are the shares of right answers and how many texts agree.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from openai import OpenAI
from peft import PeftModel
from transformers import PreTrainedModel

from graftllm.fusion.manifest import read_manifest
from graftllm.generation import generate
from graftllm.loading import load_model, load_tokenizer
from graftllm.records import Prompt, read_prompts
from graftllm.transfer_options import SamplingOptions

CLIENTS = 8
GREEDY = SamplingOptions(samples=1, temperature=0, max_new_tokens=24)


def ask(address: str, model: str, prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
    """Return a server's streamed answers, each with the pack that it says it chose."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300)

    def one(prompt: Prompt) -> tuple[str, str]:
        raw = client.chat.completions.with_raw_response.create(
            model=model, messages=cast(Any, list(prompt.question)), temperature=0,
            max_tokens=GREEDY.max_new_tokens, stream=True,
        )  # fmt: skip
        pieces = [choice.delta.content or "" for piece in raw.parse() for choice in piece.choices]
        return "".join(pieces), raw.headers.get("x-graftllm-pack", "")

    with ThreadPoolExecutor(CLIENTS) as crowd:
        return list(crowd.map(one, prompts))


def through_peft(base: Path, adapter: Path, prompts: Sequence[Prompt], device: str) -> list[str]:
    """Return what transformers answers with the adapter."""
    model = PeftModel.from_pretrained(load_model(base, device=device), str(adapter)).eval()
    found = generate(cast(PreTrainedModel, model), load_tokenizer(base), [one.question for one in prompts], GREEDY)
    return [texts[0] for texts in found]


def right(prompts: Sequence[Prompt], texts: Sequence[str]) -> str:
    """Return the share of right answers in percent."""
    found = [text.strip() == prompt.reference for prompt, text in zip(prompts, texts, strict=True)]
    return f"{100 * sum(found) / len(found):.0f} %"


def main() -> None:
    """Ask, and print a row for each skill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--device", default="auto", help="where PEFT and the base run")
    parser.add_argument("--engine", default="http://127.0.0.1:8000")
    parser.add_argument("--router", default="http://127.0.0.1:8001")
    given = parser.parse_args()
    print(
        "| right | base on the engine | through PEFT | on the engine | `auto` | as PEFT | routed right |\n"
        + 7 * "| --- "
        + "|"
    )
    for name in read_manifest(given.run / "grafted").packs:
        prompts = read_prompts(given.run / "zoo" / "prompts" / f"{name}.test.jsonl")[: given.prompts]
        peft = through_peft(given.run / "zoo" / "target", given.adapters / name, prompts, given.device)
        plain, engine = ([text for text, _ in ask(given.engine, model, prompts)] for model in ("base", name))
        auto = ask(given.router, "auto", prompts)
        same = sum(one == other for one, other in zip(peft, engine, strict=True))
        routed = sum(pack == name for _, pack in auto)
        cells = [right(prompts, texts) for texts in (plain, peft, engine, [text for text, _ in auto])]
        print(f"| {name} | {' | '.join(cells)} | {same} of {len(prompts)} | {routed} of {len(prompts)} |", flush=True)


if __name__ == "__main__":
    main()
