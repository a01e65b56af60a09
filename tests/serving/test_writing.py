import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RepetitionPenaltyLogitsProcessor

from graftllm.serving.orders import Order, Reading
from graftllm.serving.writing import Draw, Text, scored


def _bytes() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte, so that most characters take several."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    built = Tokenizer(models.BPE(vocabulary, []))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=built)


WORDS = _bytes()
texts = st.text(st.sampled_from("ab €é\N{GRINNING FACE}"), max_size=20)


@given(texts, st.lists(st.text("ab €", min_size=1, max_size=3), max_size=3))
def test_pieces_make_the_text_up_to_the_first_stop_and_never_show_a_part_of_it(whole: str, stop: list[str]) -> None:
    text, pieces = Text(WORDS, tuple(stop)), []
    for token in WORDS(whole)["input_ids"]:
        pieces.append(text.add(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    places = [place for word in stop if (place := whole.find(word)) >= 0]
    assert text.stopped == bool(places)
    if not places:
        assert "".join(pieces) == whole
    else:  # the stop text that was complete first counts
        ends = {whole.find(word) + len(word): whole.find(word) for word in stop if word in whole}
        assert whole[: ends[min(ends)]].startswith("".join(pieces))
    assert "\ufffd" not in "".join(pieces)


def _unread(pack: str) -> Reading:
    raise AssertionError(f"{pack}: nobody reads the prompt here")


def test_a_character_that_stays_incomplete_is_shown_at_the_end_only() -> None:
    text = Text(WORDS, ())
    assert text.add(WORDS("€")["input_ids"][0]) == ""
    assert text.finish() == "\ufffd"


@given(st.integers(0, 2**62), st.floats(0.05, 1.0))
def test_only_tokens_of_the_wanted_share_are_drawn(seed: int, top_p: float) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed % 97))
    ranked = torch.softmax(logits, 0).sort(descending=True)
    allowed = ranked.indices[: int((ranked.values.cumsum(0) < top_p - 1e-6).sum()) + 1]
    draw = Draw(Order([], _unread, "base", temperature=1.0, top_p=top_p, seed=seed), [1], 0)
    assert all(draw.token(logits) in allowed for _ in range(20))


@given(st.integers(0, 2**62), st.integers(1, 25), st.floats(0.0, 1.0))
def test_only_the_likeliest_tokens_are_drawn(seed: int, top_k: int, min_p: float) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed % 97))
    shares = torch.softmax(logits, 0)
    likeliest = {int(one) for one in shares.argsort(descending=True)[:top_k]}
    allowed = {one for one in likeliest if float(shares[one]) >= min_p * float(shares.max()) * (1 - 1e-6)}
    draw = Draw(Order([], _unread, "base", temperature=1.0, top_k=top_k, min_p=min_p, seed=seed), [1], 0)
    assert {draw.token(logits) for _ in range(20)} <= allowed


def test_of_the_likeliest_tokens_the_wanted_share_is_drawn() -> None:
    logits = torch.tensor([0.3, 0.3, 0.2, 0.2]).log()
    draw = Draw(Order([], _unread, "base", temperature=1.0, top_k=2, top_p=0.5, seed=1), [1], 0)
    assert {draw.token(logits) for _ in range(50)} == {0}  # half of what two of them have


def test_however_small_the_share_the_likeliest_token_is_drawn() -> None:
    draw = Draw(Order([], _unread, "base", temperature=1.0, top_p=1e-50, seed=1), [1], 0)
    assert draw.token(torch.tensor([1.0, 3.0, 2.0])) == 1


@pytest.mark.parametrize("temperature", [1e-40, 1e-5])
def test_however_cold_the_likeliest_token_is_drawn(temperature: float) -> None:
    draw = Draw(Order([], _unread, "base", temperature=temperature, seed=1), [1], 0)
    assert {draw.token(torch.tensor([30.0, 1.0, 29.0])) for _ in range(50)} == {0}


def test_draws_follow_the_probabilities() -> None:
    draw = Draw(Order([], _unread, "base", temperature=2.0, seed=1), [1], 0)
    counts = torch.bincount(torch.tensor([draw.token(torch.tensor([2.0, 0.0])) for _ in range(4000)]))
    assert counts[0] / 4000 == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.03)


@given(st.lists(st.integers(0, 19), min_size=1, max_size=9), st.floats(0.5, 2.0), st.integers(0, 99))
def test_repetition_is_penalised_as_transformers_does_it(prompt: list[int], penalty: float, seed: int) -> None:
    draw = Draw(Order([], _unread, "base", temperature=0.0, repetition_penalty=penalty), prompt, 0)
    generator, written = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(5):
        logits = torch.randn(20, generator=generator)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([written]), logits[None].clone())
        written.append(draw.token(logits))
        assert written[-1] == int(theirs.argmax())


def test_each_time_and_the_first_time_are_penalised_by_what_was_written_alone() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    often = Draw(Order([], _unread, "base", temperature=0.0, frequency_penalty=0.4), [0], 0)
    assert [often.token(logits) for _ in range(7)] == [0, 0, 0, 1, 0, 1, 0]
    once = Draw(Order([], _unread, "base", temperature=0.0, presence_penalty=1.5), [0], 0)
    assert [once.token(logits) for _ in range(4)] == [0, 1, 0, 0]


def test_scores_are_log_probabilities_with_the_best_first() -> None:
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    token = scored(logits, 2, 2, WORDS)
    assert token.likely.logprob == pytest.approx(torch.tensor(0.3).log().item())
    assert [one.logprob for one in token.alternatives] == pytest.approx(torch.tensor([0.6, 0.3]).log().tolist())
