import math
from pathlib import Path

import pytest
import torch
from distribution_fusion import Taught, fused_loss, teach, train_fused
from hypothesis import given
from hypothesis import strategies as st
from token_alignment import END, align, carry_over, edit_distance, single, token_texts, vocabulary_map
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from graftllm.demo import byte_bpe, unigram
from graftllm.loading import load_model, load_tokenizer
from graftllm.records import Message, Prompt
from graftllm.rendering import render_answered
from graftllm.training_options import SftOptions
from tests.models import save_llama, tokenizer

CUTS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6)


@given(CUTS, CUTS)
def test_an_alignment_is_monotone_and_leaves_no_token_out(source: list[str], target: list[str]) -> None:
    places = align(source, target)
    flat = [place for found in places for place in found]
    assert flat == sorted(flat)
    assert set(flat) == set(range(len(source)))
    assert all(places)


@given(st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=6))
def test_the_same_tokens_are_aligned_with_themselves(tokens: list[str]) -> None:
    assert align(tokens, tokens) == [[i] for i in range(len(tokens))]


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_known_edit_distances() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance(END, END) == 0


def test_a_token_cut_in_two_is_aligned_with_both_halves() -> None:
    # "kitten END" as [ki, tten, END] and as [kit, ten, END]; then "AB" against "A", "B".
    assert align(["ki", "tten", END], ["kit", "ten", END]) == [[0], [1], [2]]
    assert align(["AB", "C", END], ["A", "B", "C", END]) == [[0], [0], [1], [2]]
    assert align(["A", "B", "C"], ["AB", "C"]) == [[0, 1], [2]]


def test_only_tokens_that_have_each_other_alone_count() -> None:
    assert single([[0], [0], [1], [2]]) == [None, None, 1, 2]
    assert single([[0, 1], [2]]) == [None, 2]


def test_a_word_stands_for_what_it_is_most_often_aligned_with_and_else_for_the_nearest() -> None:
    source, target = ["He", "llo", "Hey", END], [END, "Hell", "o", "Hex"]
    words = vocabulary_map(source, target, [([0, 1, 3], [1, 2, 0])])
    # "He" was seen with "Hell" and "llo" with "o"; "Hey" was not seen, one letter from "Hex".
    assert words.tolist() == [1, 2, 3, 0]


def test_distributions_are_carried_over_word_by_word() -> None:
    source, target = ["A", "B", "AB", END], [END, "B", "A"]
    words = vocabulary_map(source, target, [])
    assert words.tolist() == [2, 1, 1, 0] or words.tolist() == [2, 1, 2, 0]
    carried = carry_over(
        torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.1, 0.9]]), ["A", END], ["A", END], [2, 0], words, 3
    )
    ab = int(words[2])
    assert carried[0].tolist() == [0.0, 0.25 + 0.25 * (ab == 1), 0.5 + 0.25 * (ab == 2)]
    assert carried[1, 0] == pytest.approx(0.9)
    assert carried.sum(1).tolist() == pytest.approx([1, 1])


def test_a_target_token_without_a_source_token_of_its_own_learns_itself() -> None:
    carried = carry_over(torch.tensor([[0.0, 1.0]]), ["AB"], ["A", "B"], [1, 2], torch.tensor([0, 0]), 3)
    assert carried.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_tokenizers_of_other_kinds_agree_on_what_their_tokens_say() -> None:
    corpus = ["say the word: ABC", "say it: CAB"] * 20
    for build in (byte_bpe(300), unigram(30)):
        wrapped = PreTrainedTokenizerFast(tokenizer_object=build(corpus, ["<pad>", "<end>"]), eos_token="<end>")
        texts = token_texts(wrapped)
        assert texts[wrapped.eos_token_id] == END
        said = "".join(texts[i] for i in wrapped("say ABC")["input_ids"])
        assert said.strip() == "say ABC"


def row(word: str) -> Prompt:
    messages = (Message(role="user", content=f"say {word}"), Message(role="assistant", content=word))
    return Prompt(word, messages, "say")


def test_the_model_that_finds_the_answer_most_probable_teaches(tmp_path: Path) -> None:
    target, other = save_llama(tmp_path / "target", seed=0), save_llama(tmp_path / "other", seed=1)
    rows = [row("ab"), row("longer")]
    taught = teach(target, [other], rows, device="cpu")
    words = load_tokenizer(target)
    for prompt, found in zip(rows, taught, strict=True):
        ids, start = render_answered(words, prompt)
        losses = []
        for path in (other, target):
            model = load_model(path, device="cpu")
            logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].detach()
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]))))
        assert found.teacher == losses.index(min(losses))
        assert found.distributions is not None and found.distributions.shape[0] == len(ids) - start
        assert found.distributions.sum(1).tolist() == pytest.approx([1.0] * (len(ids) - start), abs=1e-5)


def test_a_source_with_absolute_positions_reads_rows_of_other_lengths_as_it_reads_one(tmp_path: Path) -> None:
    words = tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    words.save_pretrained(tmp_path / "source")
    target = save_llama(tmp_path / "target")
    rows = [row("ab"), row("muchlonger")]
    for prompt, found in zip(rows, teach(target, [tmp_path / "source"], rows, device="cpu"), strict=True):
        alone = teach(target, [tmp_path / "source"], [prompt], device="cpu")[0]
        assert found.teacher == alone.teacher
        torch.testing.assert_close(found.distributions, alone.distributions)


def test_the_loss_is_a_weighted_sum_of_both_cross_entropies(tmp_path: Path) -> None:
    target = save_llama(tmp_path / "target")
    model, words = load_model(target, device="cpu"), load_tokenizer(target)
    ids, start = render_answered(words, row("ab"))
    even = torch.full((len(ids) - start, len(words)), 1 / len(words))
    log_p = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].detach().log_softmax(-1)
    answer = -float(log_p.gather(1, torch.tensor(ids[start:])[:, None]).mean())
    spread = -float(log_p.mean(1).mean())
    loss = fused_loss(model, words, [Taught(ids, start, even)], 0.9)
    assert math.isclose(loss.item(), 0.9 * answer + 0.1 * spread, rel_tol=1e-5)
    assert math.isclose(fused_loss(model, words, [Taught(ids, start)], 1.0).item(), answer, rel_tol=1e-5)


def test_training_makes_the_answers_probable(tmp_path: Path) -> None:
    target = save_llama(tmp_path / "target")
    taught = teach(target, [save_llama(tmp_path / "other", seed=1)], [row("ab"), row("cd")], device="cpu")
    options = SftOptions(epochs=30, batch_size=2, learning_rate=1e-2)
    train_fused(target, tmp_path / "out", taught, options, weight=0.9, seed=0, device="cpu")
    words = load_tokenizer(target)
    before, after = (
        fused_loss(load_model(path, device="cpu"), words, taught, 1.0).item() for path in (target, tmp_path / "out")
    )
    assert after < before / 4
