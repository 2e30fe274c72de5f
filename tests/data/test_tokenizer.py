"""Tokenizers: training is repeatable, special names in a text are text, and bytes add up for every kind."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from stackwise.config import DataConfig
from stackwise.data import Tokenizer, bytes_tokenizer, prepare, vocabulary
from stackwise.errors import UsageError

from .conftest import FOREIGN

Settings = Callable[..., DataConfig]

SAMPLE = [
    "def f(x):\n    return x + 1\n\n\n\tx = f('quoted')  # note\r\n",
    FOREIGN * 2,
    "the mask <|mask|> and [MASK], <mask>, </s>, [SEP], <|endoftext|> are words here",
    " leading and trailing  ",
    "\n\n \n",
    "ﬁligature e\u0301 combining \u200b zero width \U0001f468\u200d\U0001f469\u200d\U0001f467 \x00 \x7f",
]


def gpt2_like() -> Backend:
    backend = Backend(models.BPE(dropout=0.5))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLE * 20, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    return backend


def llama3_like() -> Backend:
    backend = gpt2_like()
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return backend


def qwen_like() -> Backend:
    backend = llama3_like()
    backend.normalizer = normalizers.NFC()
    return backend


def bert_like() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    backend.train_from_iterator(SAMPLE * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend


def llama2_like() -> Backend:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁t",
        "▁th",
    ]
    merges = [("▁", "t"), ("▁t", "h")]
    backend = Backend(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def words() -> Backend:
    vocabulary = {"[UNK]": 0, "[MASK]": 1, "the": 2, "mask": 3, "and": 4}
    backend = Backend(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>", "<mask>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SAMPLE * 20, trainer)
    return backend


KINDS = {
    "gpt2": gpt2_like,
    "llama3": llama3_like,
    "qwen": qwen_like,
    "bert": bert_like,
    "llama2": llama2_like,
    "unigram": unigram,
    "words": words,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    made = {name: Tokenizer.from_json(make().to_str(), name=name) for name, make in KINDS.items()}
    return made | {"bytes": bytes_tokenizer()}


@pytest.mark.parametrize("name", [*KINDS, "bytes"])
def test_no_text_makes_a_special_token(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    assert tokenizer.separator_id != tokenizer.mask_id
    assert max(tokenizer.separator_id, tokenizer.mask_id) < tokenizer.vocab_size
    for ids in tokenizer.encode_batch([*SAMPLE, "[MASK]", "</s>", "<|mask|>", "<|endoftext|>"]):
        assert not np.isin(ids, [tokenizer.separator_id, tokenizer.mask_id]).any()
        assert ids.size == 0 or ids.max() < tokenizer.vocab_size


def test_ids_of_its_own_are_kept(tokenizers: dict[str, Tokenizer]) -> None:
    assert (tokenizers["bert"].separator_id, tokenizers["bert"].mask_id) == (3, 4)
    assert (tokenizers["unigram"].separator_id, tokenizers["unigram"].mask_id) == (1, 2)
    assert (tokenizers["gpt2"].separator_id, tokenizers["gpt2"].mask_id) == (0, tokenizers["gpt2"].vocab_size - 1)
    assert tokenizers["llama2"].separator_id == 2
    assert (tokenizers["words"].separator_id, tokenizers["words"].mask_id) == (5, 1)


@pytest.mark.parametrize("name", ["unigram", "words"])
def test_names_that_the_model_itself_would_take(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """These models have the names of special tokens in their vocabulary, where a text finds them."""
    tokenizer = tokenizers[name]
    texts = [
        "a </s> b<mask>c [MASK] [MASK]",
        "＜/s＞ the ＜mask＞ 東京",
        "[MASK]",
        "</s></s><mask>",
        "[MASK]  \n [MASK]  ",
    ]
    for text, (ids, sizes) in zip(texts, tokenizer.encode_with_bytes(texts), strict=True):
        assert not np.isin(ids, [tokenizer.separator_id, tokenizer.mask_id]).any()
        assert sizes.sum() == len(text.encode())
    assert tokenizer.encode_batch(["the mask and"])[0].size >= 3


@pytest.mark.parametrize("name", ["gpt2", "llama3", "bytes"])
def test_byte_level_round_trip(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    for text, ids in zip(SAMPLE, tokenizer.encode_batch(SAMPLE), strict=True):
        assert tokenizer.decode(ids) == text
        assert np.array_equal(ids, tokenizer.encode_batch([text])[0])
    assert tokenizer.decode([tokenizer.mask_id]) == "<|mask|>"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("gpt2", True),
        ("llama3", True),
        ("bytes", True),
        ("qwen", False),
        ("bert", False),
        ("llama2", False),
        ("unigram", False),
    ],
)
@hypothesis_settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(SAMPLE)).map("".join)))
def test_bytes_of_tokens_add_up(tokenizers: dict[str, Tokenizer], name: str, table: bool, text: str) -> None:
    tokenizer = tokenizers[name]
    size = len(text.encode())
    ((ids, sizes),) = tokenizer.encode_with_bytes([text])
    assert len(ids) == len(sizes)
    assert sizes.sum() == (size if len(ids) else 0)
    lengths = tokenizer.bytes_per_token()
    assert (lengths is not None) == table
    if lengths is not None:
        assert len(lengths) == tokenizer.vocab_size
        (plain,) = tokenizer.encode_batch([text])
        assert lengths[plain].sum() == size
        assert lengths[[tokenizer.separator_id, tokenizer.mask_id]].tolist() == [0, 0]


def test_bytes_of_characters_that_share_tokens() -> None:
    ((ids, sizes),) = Tokenizer.from_json(llama2_like().to_str()).encode_with_bytes(["the é東🙂"])
    assert [int(size) for size in sizes] == [2, 1, 1, 2, 0, 3, 0, 0, 4, 0, 0, 0]
    assert len(ids) == 12


@pytest.mark.parametrize("name", [*KINDS, "bytes"])
def test_saved_and_loaded_it_is_the_same(tokenizers: dict[str, Tokenizer], name: str, tmp_path: Path) -> None:
    first = tokenizers[name]
    first.save(tmp_path / "tokenizer.json")
    for second in (Tokenizer.load(tmp_path / "tokenizer.json"), Tokenizer.load(tmp_path)):
        assert second.id == first.id
        assert (second.separator_id, second.mask_id, second.vocab_size) == (
            first.separator_id,
            first.mask_id,
            first.vocab_size,
        )
        assert [ids.tolist() for ids in second.encode_batch(SAMPLE)] == [
            ids.tolist() for ids in first.encode_batch(SAMPLE)
        ]
    # the file is a plain tokenizer.json
    assert Backend.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() <= first.vocab_size


def test_the_separator_is_what_the_model_says_where_no_name_does(tmp_path: Path) -> None:
    """`config.json` first, then `generation_config.json`, the first of several; a copy keeps it; names go first."""
    content = json.loads(
        bytes_tokenizer().json.replace("<|endoftext|>", "<|im_end|>").replace("<|mask|>", "<|im_start|>")
    )
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert Tokenizer.load(path).separator_id == 258  # added
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 257]}))
    one = Tokenizer.load(tmp_path)
    assert (one.separator_id, one.mask_id, one.vocab_size) == (256, 258, 259)
    assert 256 not in one.encode_batch(["a <|im_end|> b"])[0]
    (tmp_path / "copy").mkdir()
    one.save(tmp_path / "copy" / "tokenizer.json")
    copy = Tokenizer.load(tmp_path / "copy")
    assert (copy.separator_id, copy.id) == (256, one.id)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 257}))
    other = Tokenizer.load(tmp_path)
    assert other.separator_id == 257
    assert other.id != one.id
    path.write_text(bytes_tokenizer().json)
    assert Tokenizer.load(tmp_path).id == bytes_tokenizer().id


def test_what_is_off_stays_off(tokenizers: dict[str, Tokenizer]) -> None:
    long = tokenizers["gpt2"].encode_batch([SAMPLE[0] * 9, "a"])
    assert len(long[0]) > 8
    assert len(long[1]) == 1
    assert len({tuple(tokenizers["gpt2"].encode_batch([SAMPLE[0]])[0]) for _ in range(20)}) == 1
    assert 0 not in tokenizers["llama3"].encode_batch(["x"])[0]


def test_gaps_in_the_ids(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 2, "[UNK]": 4}, unk_token="[UNK]"))
    with pytest.raises(UsageError):
        Tokenizer(backend)


def test_added_words_that_are_not_special_count_their_bytes() -> None:
    backend = gpt2_like()
    backend.add_tokens([AddedToken("東京", normalized=False)])
    tokenizer = Tokenizer.from_json(backend.to_str())
    lengths = tokenizer.bytes_per_token()
    assert lengths is not None
    (ids,) = tokenizer.encode_batch(["in 東京!"])
    assert lengths[ids].sum() == len("in 東京!".encode())
    backend.add_tokens([AddedToken("strips", lstrip=True, normalized=False)])
    assert Tokenizer.from_json(backend.to_str()).bytes_per_token() is None


def test_training_repeats(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    """In another process, with other hash seeds and threads, and with the documents in another order."""
    data, _ = prepare(settings(corpus, vocab_size=1500))
    for number, file in enumerate(random.Random(5).sample(sorted(corpus.rglob("*.py")), 30)):
        file.rename(file.with_name(f"{number}-{file.name}"))
    script = (
        "import sys; from stackwise.config import DataConfig; from stackwise.data import prepare; "
        "print(prepare(DataConfig(paths=[sys.argv[1]], vocab_size=1500, cache_dir=sys.argv[2]))[0].tokenizer.id)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(corpus), str(tmp_path / "other")],
        env={"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.stdout.strip() == data.tokenizer.id
    assert (data.separator_id, data.mask_id) == (0, 1)


def test_training_sees_no_held_out_text(tmp_path: Path, settings: Settings) -> None:
    rows = [{"text": f"common words {i} " + chr(0x4E00 + i) * 40} for i in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, _ = prepare(settings(tmp_path / "rows.jsonl", vocab_size=2000, held_out=0.3))
    held = {chr(0x4E00 + i) for i, row in enumerate(rows) if row["text"] in data.tokenizer.decode(data.held_out.tokens)}
    merged = {character for character in held if len(data.tokenizer.encode_batch([character])[0]) == 1}
    assert len(held) > 50
    assert not merged


def test_a_large_corpus_is_sampled(corpus: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "SAMPLE_BYTES", 200_000)
    told: list[int] = []
    data, _ = prepare(
        settings(corpus), progress=lambda phase, done, total: told.append(done) if phase == "tokenizer" else None
    )
    assert told[-1] == 200_000
    assert len(told) < data.train.n_documents / 2
    assert data.vocab_size == 4096


def test_tokenizer_is_trained_once(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    prepare(settings(corpus, vocab_size=600))
    phases: set[str] = set()
    prepare(
        settings(corpus, vocab_size=600), out=tmp_path / "out", progress=lambda phase, done, total: phases.add(phase)
    )
    assert phases == {"reading", "tokenizing"}


@pytest.mark.parametrize("name", ["bert", "llama2", "qwen", "unigram"])
def test_prepared_bytes_are_exact_for_any_tokenizer(
    corpus: Path, settings: Settings, tokenizers: dict[str, Tokenizer], name: str, tmp_path: Path
) -> None:
    tokenizers[name].save(tmp_path / "own.json")
    data, _ = prepare(settings(corpus / "part1", tokenizer=str(tmp_path / "own.json"), held_out=0.3))
    total = sum(len(file.read_bytes()) for file in (corpus / "part1").iterdir())
    assert data.summary()["bytes"] == total
    splits = (data.train, data.held_out)
    assert sum(int(split.sample_bytes(range(split.n_tokens), 1).sum()) for split in splits) == total
    assert all(split.counts[data.separator_id] == split.n_documents for split in splits)


def test_a_tokenizer_that_drops_text_after_all_is_measured(
    corpus: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tokenizer(gpt2_like()).save(tmp_path / "own.json")
    wrong = np.ones(500, np.int64)
    monkeypatch.setattr(Tokenizer, "bytes_per_token", lambda self: wrong)
    data, _ = prepare(settings(corpus / "part1", tokenizer=str(tmp_path / "own.json"), held_out=0.3))
    total = sum(len(file.read_bytes()) for file in (corpus / "part1").iterdir())
    assert data.train.sample_bytes(range(data.train.n_tokens), 1).sum() == data.train.n_bytes
    assert data.summary()["bytes"] == total


def test_text_that_makes_no_token_is_still_counted(
    settings: Settings, tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """Blanks make no token for BERT, also where they fill whole pieces of a long document."""
    texts = ["word", " " * 300_000 + "word" + " " * 300_000 + "word", "word" + "\n" * 400_000, "\n", " word "]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizers["bert"].save(tmp_path / "own.json")
    data, _ = prepare(settings(tmp_path / "rows.jsonl", tokenizer=str(tmp_path / "own.json"), held_out=0.4))
    assert data.summary()["documents"] == 4
    assert data.summary()["bytes"] == sum(len(text) for text in texts if text.strip())
    for split in (data.train, data.held_out):
        assert split.sample_bytes(range(split.n_tokens), 1).sum() == split.n_bytes
