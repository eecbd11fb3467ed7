"""Text of tokens that come one by one, with byte-level and SentencePiece's tokenizers."""

import itertools
import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from drivetrain.model.text import BROKEN, TextStream

KNOWN = "the cat sat on the mat, and the dog saw it; naïve façades "
WORDS = KNOWN + "— 北京 東京 🙂 "  # the end of it has no tokens but bytes
BOS, EOS = "<s>", "</s>"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([KNOWN * 20], trainer)
    tokenizer.add_special_tokens([AddedToken(BOS), AddedToken(EOS)])
    return tokenizer


def sentencepiece(mistral: bool) -> Tokenizer:
    """As transformers converts Llama 2's (a normalizer and four decoders) or newer ones (Metaspace)."""
    tokenizer = Tokenizer(models.BPE())
    if mistral:
        metaspace = {"replacement": "▁", "prepend_scheme": "first"}
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**metaspace, split=True)
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(**metaspace), decoders.Fuse()]
        )
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # Training on whole texts would make words of several.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        tokenizer.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", BOS, EOS], show_progress=False, initial_alphabet=["▁"]
    )
    tokenizer.train_from_iterator([KNOWN * 20], trainer)
    definition = json.loads(tokenizer.to_str())
    vocab = definition["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    definition["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return Tokenizer.from_str(json.dumps(definition))


TOKENIZERS = {
    "byte-level": byte_level(),
    "llama 2": sentencepiece(mistral=False),
    "metaspace": sentencepiece(mistral=True),
}
each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def told(
    tokenizer: Tokenizer, prompt: Sequence[int], completion: Sequence[int], stop: Sequence[str] = ()
) -> str:
    stream = TextStream(tokenizer.decode, stop, prompt)
    pieces = [stream.push(token) for token in completion]
    assert not any(BROKEN in piece for piece in pieces)
    return "".join(pieces) + stream.finish()


@each
def test_a_continuation_is_what_it_adds_to_the_whole(tokenizer: Tokenizer) -> None:
    """Wherever the tokens are cut into a prompt and a completion between two characters."""
    for text in (WORDS, WORDS * 3, "the  cat   sat", "🙂🙂 北京", "naïve\n\n 北"):
        tokens = tokenizer.encode(text).ids
        whole = tokenizer.decode(tokens)
        assert whole == text
        for cut in range(len(tokens)):
            before = tokenizer.decode(tokens[:cut])
            if BROKEN not in before:
                assert told(tokenizer, tokens[:cut], tokens[cut:]) == whole[len(before) :]


@each
def test_a_character_that_the_prompt_begins_is_told_whole(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the cat 京 sat").ids
    cuts = [cut for cut in range(len(tokens)) if BROKEN in tokenizer.decode(tokens[:cut])]
    assert len(cuts) == 2
    for cut in cuts:
        assert told(tokenizer, tokens[:cut], tokens[cut:]) == "京 sat"


@pytest.mark.parametrize("name", ["llama 2", "metaspace"])
def test_the_space_before_a_word_is_kept_after_a_text_and_dropped_at_the_beginning(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    word, bos, eos = tokenizer.encode("dog").ids, tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    assert tokenizer.decode(word) == "dog"
    cat = [bos, *tokenizer.encode("the cat").ids]
    for prompt in (cat, [*cat, eos], [*cat, *[eos, bos] * 20]):
        assert told(tokenizer, prompt, word) == " dog"
        assert told(tokenizer, prompt, [eos, *word, eos]) == " dog"
    for beginning in ([], [bos], [bos] * 20):
        assert told(tokenizer, beginning, word) == "dog"
        assert told(tokenizer, beginning, [*word, eos, *word]) == "dog dog"


@each
def test_bytes_that_are_no_character_are_told_when_that_is_sure(tokenizer: Tokenizer) -> None:
    cat, begun = tokenizer.encode("the cat").ids, tokenizer.encode("the 北").ids[-3:-1]
    stream = TextStream(tokenizer.decode, (), cat)
    assert [stream.push(token) for token in begun] == ["", ""]
    said = stream.push(cat[0])
    assert said.strip(BROKEN) in ("the", " the", "t", " t") and said.startswith(BROKEN)
    stream = TextStream(tokenizer.decode, (), cat)
    assert "".join(map(stream.push, begun)) + stream.finish() == ""


@each
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["the dog"], "the cat sat on the mat, and "),
        (["never", "t on", "mat"], "the cat sa"),
        (["it; naïve façades — 北京 東京 🙂 x"], WORDS),
        (["京 東"], WORDS[: WORDS.index("京")]),
        ([" 🙂 "], WORDS[:-3]),
    ],
)
def test_text_ends_before_a_stop_text(tokenizer: Tokenizer, stop: list[str], expected: str) -> None:
    stream = TextStream(tokenizer.decode, stop)
    said = ""
    for token in tokenizer.encode(WORDS).ids:
        said += stream.push(token)
        assert expected.startswith(said)
    assert said + stream.finish() == expected
    assert stream.stopped is (expected != WORDS)


def test_a_stop_text_that_begins_with_a_space_is_found_at_once() -> None:
    tokenizer = TOKENIZERS["llama 2"]
    prompt = tokenizer.encode("the cat").ids
    stream = TextStream(tokenizer.decode, [" dog"], prompt)
    assert "".join(map(stream.push, tokenizer.encode("dog").ids)) == "" and stream.stopped


@each
@given(
    texts=st.lists(st.text(alphabet="the cat naï北🙂 ", max_size=9), min_size=1, max_size=5),
    cut=st.integers(0, 30),
)
def test_any_text_comes_back(tokenizer: Tokenizer, texts: list[str], cut: int) -> None:
    """Texts with control tokens between them."""
    eos = tokenizer.token_to_id(EOS)
    parts = [[*tokenizer.encode(text).ids, eos] for text in texts]
    tokens = list(itertools.chain.from_iterable(parts))
    before, whole = tokenizer.decode(tokens[:cut]), tokenizer.decode(tokens)
    if BROKEN not in before:
        assert told(tokenizer, tokens[:cut], tokens[cut:]) == whole[len(before) :]


def test_few_tokens_are_decoded_at_a_time() -> None:
    tokenizer = TOKENIZERS["llama 2"]
    lengths: list[int] = []

    def counted(decode: Callable[[list[int]], str]) -> Callable[[list[int]], str]:
        return lambda tokens: lengths.append(len(tokens)) or decode(tokens)  # type: ignore[func-returns-value]

    tokens = tokenizer.encode(WORDS * 30).ids
    stream = TextStream(counted(tokenizer.decode), (), tokens[:-200])
    text = "".join(map(stream.push, tokens[-200:]))
    assert text and text in WORDS * 30 and max(lengths) <= 16
