"""A zoo that trains in seconds: one target with two general tasks, and two sources of other architectures."""

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from graftllm.demo import GENERAL, NEXT, Member, WordTask, Zoo, byte_bpe, unigram
from graftllm.training_options import SftOptions

DOUBLE = WordTask("double", "double every letter: {word}", lambda word: "".join(letter * 2 for letter in word))
_SHAPE = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": True, "initializer_range": 0.06,
}  # fmt: skip


def _llama(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    return LlamaConfig(vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, **_SHAPE)


def _qwen3(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    shape = _SHAPE | {"hidden_size": 64, "head_dim": 16}
    return Qwen3Config(vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, **shape)


def _mistral(vocabulary: int, pad: int, end: int) -> PreTrainedConfig:
    shape = _SHAPE | {"num_key_value_heads": 2, "sliding_window": None}
    return MistralConfig(vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=end, **shape)


_MARKERS = ("<pad>", "<user>", "<assistant>", "<end>")


def _from_scratch(epochs: int) -> SftOptions:
    return SftOptions(epochs=epochs, batch_size=32, learning_rate=4e-3, max_length=64)


TINY = Zoo(
    members=(
        Member("target", _llama, byte_bpe(320), _MARKERS, ((GENERAL[0], 3200), (GENERAL[1], 800)), _from_scratch(3)),
        Member("qwen3-next", _qwen3, unigram(110), _MARKERS, ((NEXT, 3200),), _from_scratch(3)),
        Member("mistral-double", _mistral, byte_bpe(300), _MARKERS, ((DOUBLE, 3200),), _from_scratch(2)),
    ),
    skills=((NEXT, 900), (DOUBLE, 600)),
    general=((GENERAL[0], 100), (GENERAL[1], 100)),
    test_prompts=80,
)

RECIPE = """
name: tiny
target: "{dir}/zoo/target"
skills:
  next:
    description: Next letter for each
    sources: ["{dir}/zoo/qwen3-next"]
    prompts: "{dir}/zoo/prompts/next.jsonl"
    test: "{dir}/zoo/prompts/next.test.jsonl"
  double:
    sources: ["{dir}/zoo/mistral-double"]
    prompts: "{dir}/zoo/prompts/double.jsonl"
    test: "{dir}/zoo/prompts/double.test.jsonl"
general: {prompts: "{dir}/zoo/prompts/general.jsonl", test: "{dir}/zoo/prompts/general.test.jsonl"}
sampling: {samples: 2, temperature: 1.0, top_p: 1.0, max_new_tokens: 16, batch_size: 200}
sft: {epochs: 6, batch_size: 32, learning_rate: 3.0e-3, max_length: 64}
dpo: {epochs: 1, batch_size: 32, learning_rate: 1.0e-4, max_length: 64, beta: 0.1, sft_weight: 1.0}
pack: {strategy: paper, budget: 18%}
compare: [sequential, summed, lora]
lora: {learning_rate: 5.0e-3, dpo_learning_rate: 2.0e-4}
"""
