"""Encoding, chat, streams and stop strings on byte-level tokenizers small enough to build here."""

import json
from pathlib import Path

import pytest
import tiny_gguf
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.chat_template import ChatTemplate
from prfaas_jax.models.gguf import GgufFile
from prfaas_jax.models.tokenizer import StopStrings, StreamDetokenizer, Tokenizer

HF = Path(__file__).parents[1] / "goldens" / "hf"
CORPUS = ["the quick brown fox", "naïve café, 東京 と 京都 🙂🙂👍🏽", "don't 12 345"]


def byte_level() -> Tokenizer:
    """All 256 bytes and a few merges, some of which join halves of characters."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]))
    return Tokenizer(backend, eos_ids=(1,))


def metaspace() -> Tokenizer:
    """The other kind: words marked by U+2581, the first one's mark stripped in decoding."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "▁a": 1, "▁b": 2, "c": 3, "▁": 4}, unk_token="c"))
    backend.add_special_tokens(["<s>"])
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


BYTES, WORDS = byte_level(), metaspace()


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(GgufFile(tiny_gguf.write(HF / "llama_tied", tmp_path_factory.mktemp("gguf") / "tiny.gguf")))


# --- streams --------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=40))
def test_text_survives_encoding_and_streaming(text: str) -> None:
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text
    stream = BYTES.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text
    # No piece shows half a character, for the text itself has none (unless hypothesis wrote U+FFFD).
    assert "\ufffd" in text or not any("\ufffd" in p for p in pieces)


@given(st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=40))
def test_any_ids_streamed_give_what_decode_gives(ids: list[int]) -> None:
    """A model may write invalid UTF-8 and special tokens anywhere."""
    stream = BYTES.stream()
    assert "".join(stream.push(i) for i in ids) + stream.finish() == BYTES.decode(ids)


@given(st.lists(st.integers(0, 4), max_size=12))
def test_a_decoder_that_treats_the_first_word_differently(ids: list[int]) -> None:
    stream = WORDS.stream()
    assert "".join(stream.push(i) for i in ids) + stream.finish() == WORDS.decode(ids)


def test_text_leaves_as_soon_as_it_is_certain() -> None:
    stream, backend = StreamDetokenizer(BYTES), BYTES.backend
    smiley = [backend.token_to_id(c) for c in "ðŁĻĤ"]  # F0 9F 99 82 as byte-level BPE writes them
    assert stream.push(backend.token_to_id("x")) == "x"
    assert [stream.push(i) for i in smiley] == ["", "", "", "🙂"]
    assert stream.push(smiley[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


# --- stop strings ---------------------------------------------------------------------------------------------------------

SHORT = st.text("ab\n", max_size=12)


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: cut before the first stop string to be completed, the longest if several are at once."""
    for end in range(len(text) + 1):
        done = [s for s in stops if text[:end].endswith(s)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


@given(st.lists(SHORT, max_size=6), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_stop_strings_do_not_depend_on_how_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    watcher, shown, stopped = StopStrings(stops), "", False
    for piece in pieces:
        emit, stopped = watcher.push(piece)
        shown += emit
        if stopped:
            assert watcher.push("a") == ("", True)
            break
    assert (shown + watcher.finish(), stopped) == reference("".join(pieces), stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    watcher = StopStrings(["\nUser:", "###"])
    assert watcher.push("Hi") == ("Hi", False)
    assert watcher.push("!\nUs") == ("!", False)
    assert watcher.push("e") == ("", False)
    assert watcher.push("d ##") == ("\nUsed ", False)
    assert watcher.finish() == "##"
    assert StopStrings([]).push("anything") == ("anything", False)
    for bad in ([""], ["ok", 3]):
        with pytest.raises(InvalidInput, match="stop="):
            StopStrings(bad)


# --- files and chat -------------------------------------------------------------------------------------------------------


def test_gguf_vocabulary(from_gguf: Tokenizer) -> None:
    assert from_gguf.vocab_size == 256 and from_gguf.eos_ids == (2,)
    text = "It's 1212 — 東京"
    ids = from_gguf.encode(f"{text}<|im_end|>")
    assert ids[-1] == 2, "special tokens are recognised in text"
    assert len(ids) == len(text.encode()) + 1, "digits stand alone: the merge of 1 and 2 is never reached"
    assert from_gguf.decode(ids) == text
    assert len(from_gguf.encode(" the")) == 1, "merges are applied"


def test_chat_writes_the_template_and_the_default_system_message(from_gguf: Tokenizer) -> None:
    ids = from_gguf.chat([{"role": "user", "content": "Hi"}])
    assert from_gguf.backend.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    own = from_gguf.chat([{"role": "system", "content": "Shout."}, {"role": "user", "content": "Hi"}])
    assert "Be brief" not in from_gguf.decode(own)


def test_saved_and_read_back(from_gguf: Tokenizer, tmp_path: Path) -> None:
    from_gguf.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    messages = [{"role": "user", "content": "né 12 🙂"}]
    assert (again.chat(messages), again.eos_ids, again.vocab_size) == (from_gguf.chat(messages), from_gguf.eos_ids, 256)
    BYTES.save(tmp_path)
    with pytest.raises(InvalidInput, match="chat template"):
        Tokenizer.load(tmp_path).chat(messages)


def test_hugging_face_directory(tmp_path: Path) -> None:
    BYTES.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_ids == (1,)
    assert tokenizer.chat([{"role": "user", "content": "a"}]) == [0, *tokenizer.encode("a"), 1]
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    assert Tokenizer.load(tmp_path).chat([{"role": "user", "content": "b"}]) == tokenizer.encode("b")


def test_templates_refuse_and_are_confined() -> None:
    picky = ChatTemplate("{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}")
    with pytest.raises(InvalidInput, match="user first"):
        picky.render([{"role": "system", "content": "x"}])
    with pytest.raises(InvalidInput):
        ChatTemplate("{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}").render([{"role": "user", "content": "x"}])
    for bad in ([], [{"role": "user"}], [{"role": "user", "content": 3}], [{"role": "user", "content": "x", "name": "y"}]):
        with pytest.raises(InvalidInput, match="messages="):
            picky.render(bad)


def test_missing_and_foreign_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInput, match="readable"):
        Tokenizer.load(tmp_path)
