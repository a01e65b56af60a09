"""Tiny models built on the spot: real architectures, a real tokenizer, random weights."""

import json
import random
import shutil
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from graftllm.checkpoint import Checkpoint, copy_companions
from graftllm.records import Message, Prompt

CHARACTERS = string.ascii_letters + string.digits + " .,:?!"
MARKERS = ("<pad>", "<user>", "<assistant>", "<end>")


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters with a chat template."""
    vocabulary = {token: i for i, token in enumerate([*MARKERS, "<unk>", *CHARACTERS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    built.decoder = decoders.Fuse()
    built.add_special_tokens(list(MARKERS))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    wrapped.chat_template = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<assistant>' }}{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return wrapped


def save_llama(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Save a random Llama of two layers, width 32, with a tied embedding."""
    torch.manual_seed(seed)
    words = tokenizer()
    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(words),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
        initializer_range=0.2,
        **(shape | changes),
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    words.save_pretrained(path)
    return path


class Int8Tensor(torch.Tensor):
    """A weight of 8 bits and a step a row that says it is of another dtype, as torchao's kinds of tensors do."""

    codes: torch.Tensor
    steps: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, steps: torch.Tensor) -> "Int8Tensor":
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=steps.dtype)  # pyright: ignore

    def __init__(self, codes: torch.Tensor, steps: torch.Tensor) -> None:
        self.codes, self.steps = codes, steps

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, *bias = args
            return torch.nn.functional.linear(x, weight.codes.to(weight.dtype) * weight.steps, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].steps)
        raise NotImplementedError(f"{cls.__name__}: {func}")  # torchao refuses what it does not know so, too


def quantize(model: torch.nn.Module) -> None:
    """Keep the weights of all linear layers but the head in 8 bits."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            steps = module.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (module.weight.detach() / steps).round().to(torch.int8)
            module.weight = torch.nn.Parameter(Int8Tensor(codes, steps), requires_grad=False)


def save_reward_model(path: Path, *, labels: int = 1, template: bool = True) -> Path:
    """Save a random sequence classifier of one layer, width 16."""
    torch.manual_seed(0)
    words = tokenizer()
    if not template:
        words.chat_template = None
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=labels, pad_token_id=0, eos_token_id=3, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


def perturb(base: Path, out: Path, *, seed: int, scale: float = 0.05) -> Path:
    """Save a checkpoint whose matrices differ from the base's by rank 4 plus noise, and whose vectors by noise."""
    draw = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        change = 0.1 * torch.randn(value.shape, generator=draw)
        if value.ndim == 2:
            change += (
                torch.randn(value.shape[0], 4, generator=draw) @ torch.randn(4, value.shape[1], generator=draw) / 2
            )
        tensors[name] = (value.float() + scale * change).to(value.dtype)
    out.mkdir(parents=True)
    copy_companions(Checkpoint.open(base), out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def with_head(checkpoint: Path, out: Path) -> Path:
    """Save a copy of a checkpoint that holds its tied head, too."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


class RouterFile:
    """A router as the directory sees it: classes, and a file."""

    def __init__(self, *packs: str) -> None:
        self.classes = ("base", *packs)

    def save(self, path: Path) -> None:
        path.write_text(" ".join(self.classes))


def with_vocabulary(base: Path, out: Path, size: int, *, config: int | None = None) -> Path:
    """Save a perturbed checkpoint with another number of tokens, which its config tells (or tells otherwise)."""
    perturb(base, out, seed=3)
    tensors = load_file(out / "model.safetensors")
    old = tensors["model.embed_tokens.weight"]
    words = torch.randn(size, old.shape[1], generator=torch.Generator().manual_seed(4)).to(old.dtype)
    words[: len(old)] = old[:size]
    save_file(tensors | {"model.embed_tokens.weight": words}, out / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((out / "config.json").read_text()) | {"vocab_size": size if config is None else config}
    (out / "config.json").write_text(json.dumps(settings))
    return out


def rows(count: int, *, seed: int = 0, answered: bool = True, task: str = "reverse") -> list[Prompt]:
    """Prompts to write words backward, with references and, if asked for, answers."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        word = "".join(draw.choices(string.ascii_uppercase, k=5))
        answer = (Message(role="assistant", content=word[::-1]),) if answered else ()
        question = Message(role="user", content=f"backward: {word}")
        found.append(Prompt(f"{task}-{i}", (question, *answer), task, word[::-1]))
    return found
