"""Hidden states captured into a store: what they are, and that none is computed twice, whatever is killed between."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import stackwise
from stackwise.data.tokenizer import bytes_tokenizer
from stackwise.errors import InterruptedRun, UsageError
from stackwise.pipeline.committed.capture import Request, write_share
from stackwise.pipeline.committed.partwise import Captured, Progress
from stackwise.pretrained.families import FAMILIES
from stackwise.store import ActivationStore
from tests.cli.conftest import COMMAND
from tests.cli.conftest import stackwise as program
from tests.conftest import mounted, raises_naming

BLOCKS, SEQ = 3, 32
SMALL_CHUNKS = """
import sys, time
from stackwise.store import codecs
codecs.CHUNK_BYTES = 1 << 14  # four rows
"""


def transformers_model(family: str) -> Any:
    """A small model of random weights, as `transformers` has it."""
    import transformers as hf

    torch.manual_seed(0)
    size = {"vocab_size": 258, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "hidden_size": 64}
    if family == "llama":
        config = hf.LlamaConfig(**size, intermediate_size=96, num_key_value_heads=2, max_position_embeddings=64)
        return hf.LlamaForCausalLM(config).eval()
    if family == "gpt2":
        small = hf.GPT2Config(vocab_size=258, n_positions=64, n_embd=64, n_layer=BLOCKS, n_head=4)
        return hf.GPT2LMHeadModel(small).eval()
    return hf.BertForMaskedLM(hf.BertConfig(**size, intermediate_size=96, max_position_embeddings=64)).eval()


def checkpoint(family: str, directory: Path) -> Path:
    transformers_model(family).save_pretrained(directory)
    bytes_tokenizer().save(directory / "tokenizer.json")
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(text: Path) -> str:
    return str(text / "bisect.txt")


def captured(model: Path, data: str, store: Path, at: list[int], **options: Any) -> Captured:
    return stackwise.capture(model, [data], at=at, store=store, seq_len=SEQ, **options)


def contents(store: Path, result: Captured) -> dict[int, bytes]:
    """The bytes of all chunks' files of each boundary."""
    return {
        at: b"".join(path.read_bytes() for path in sorted((store / "boundaries" / info.id).rglob("c/*/*/*")))
        for at, info in result.boundaries.items()
    }


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "bert") if name in FAMILIES])
def test_hidden_states_are_those_of_transformers_with_their_tokens(data: str, tmp_path: Path, family: str) -> None:
    result = captured(checkpoint(family, tmp_path / "m"), data, tmp_path / "s", list(range(BLOCKS + 1)), codec="fp32")
    reference, text = transformers_model(family), Path(data).read_bytes()
    assert result.tokens == (len(text) + 1) // SEQ * SEQ == result.computed
    separator, read = 256, dict[int, bytes]()
    for at in range(BLOCKS):
        for rows_B, x_BSD, tokens_BS in result.dataset(at, 16, seed=at):
            with torch.no_grad():
                expected = reference(tokens_BS, output_hidden_states=True).hidden_states[at]
            torch.testing.assert_close(x_BSD, expected, atol=1e-5, rtol=1e-5)
            read |= {
                int(row): tokens.numpy().astype("<u2").tobytes() for row, tokens in zip(rows_B, tokens_BS, strict=True)
            }
    stream = np.append(np.frombuffer(text, np.uint8), separator).astype("<u2")[: result.tokens].reshape(-1, SEQ)
    assert sorted(read) == list(range(len(stream)))
    assert sorted(read.values()) == sorted(row.tobytes() for row in stream)  # every sample, each once
    # `transformers` puts the last one through the final norm, where the model has one.
    final: Any = {"llama": "model.norm", "gpt2": "transformer.ln_f"}.get(family, "bert.embeddings.dropout")
    for _, x_BSD, tokens_BS in result.dataset(BLOCKS, 16):
        with torch.no_grad():
            expected = reference(tokens_BS, output_hidden_states=True).hidden_states[-1]
            torch.testing.assert_close(reference.get_submodule(final)(x_BSD), expected, atol=1e-5, rtol=1e-5)


def test_what_is_there_is_not_computed_again(llama: Path, data: str, tmp_path: Path) -> None:
    store = tmp_path / "s"
    first = captured(llama, data, store, [1, 2], codec="fp32")
    assert first.computed == first.tokens
    assert captured(llama, data, store, [2, 1], codec="fp32").computed == 0
    copy = tmp_path / "copy"  # the same weights and the same text elsewhere
    copy.mkdir()
    for path in llama.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (tmp_path / "same.txt").write_bytes(Path(data).read_bytes())
    assert captured(copy, str(tmp_path / "same.txt"), store, [1], codec="fp32").computed == 0
    arguments = ("--data", data, "--store", str(store), "--seq-len", str(SEQ), "--codec", "fp32", "--json")
    done = program("capture", str(llama), "--at", "1,2", *arguments)
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert printed == first.plain() | {"tokens_per_second": 0.0}
    assert [entry["at"] for entry in printed["boundaries"]] == [1, 2]
    # One block more goes on from what is there: a third of the way to depth 2, which are the front and two blocks.
    assert captured(llama, data, store, [3], codec="fp32").computed == pytest.approx(first.tokens / 4)
    # Another codec of what is there is read and written, not computed.
    assert captured(llama, data, store, [2], codec="int8").computed == 0
    with ActivationStore(store) as opened:
        assert opened.gc(dry_run=True)["boundaries"] == []


def test_shares_of_passes_give_the_same_bytes(
    llama: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stackwise.store.codecs.CHUNK_BYTES", 1 << 14)
    whole = captured(llama, data, tmp_path / "whole", [1, 3], codec="int8", batch_size=4)

    def spread(request: Request, look: Callable[[], bool]) -> None:
        for k in (2, 0, 1):
            assert not look()
            write_share(request, (k, 3))

    shares = captured(llama, data, tmp_path / "shares", [1, 3], codec="int8", batch_size=4, memory=1, spread=spread)
    assert contents(tmp_path / "whole", whole) == contents(tmp_path / "shares", shares)
    assert shares.computed == whole.computed


@pytest.mark.stress
def test_tasks_of_ray_lose_a_worker_and_give_the_same_bytes(llama: Path, data: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    store, seen = tmp_path / "tasks", []
    command = ["capture", str(llama), "--data", data, "--at", "1,3", "--codec", "int8", "--seq-len", str(SEQ)]
    command += ["--batch-size", "4", "--device", "cpu", "--memory", "1", "--json"]
    ray = [*command, "--store", str(store), "--engine", "ray", "--tasks", "2"]
    small = SMALL_CHUNKS + "from stackwise.cli import main\nmain()"
    process = subprocess.Popen([sys.executable, "-c", small, *ray], stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not seen:  # a worker of Ray, whose task has begun a command
        time.sleep(0.02)
        for one in psutil.process_iter(["cmdline", "ppid"]):
            if "stackwise.pipeline.batch.ray_captures" in (one.info["cmdline"] or []):
                seen.append(one.info["ppid"])
                os.kill(one.info["ppid"], signal.SIGKILL)
                break
    printed = json.loads(process.communicate(timeout=300)[0])
    assert process.returncode == 0
    assert seen
    here = [sys.executable, "-c", small, *command, "--store", str(tmp_path / "here")]
    alone = json.loads(subprocess.run(here, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert [b["id"] for b in printed["boundaries"]] == [b["id"] for b in alone["boundaries"]]
    names = [boundary["id"] for boundary in printed["boundaries"]]
    chunks = [
        {name: [path.read_bytes() for path in sorted((at / "boundaries" / name).rglob("c/*/*/*"))] for name in names}
        for at in (store, tmp_path / "here")
    ]
    assert chunks[0] == chunks[1]


@pytest.mark.parametrize("codec", ["int8", "fp32", pytest.param("bf16", marks=pytest.mark.stress)])
def test_one_part_at_a_time_gives_the_same_bytes(llama: Path, data: str, tmp_path: Path, codec: str) -> None:
    whole = captured(llama, data, tmp_path / "whole", [1, 3], codec=codec)
    parts = captured(llama, data, tmp_path / "parts", [1, 3], codec=codec, memory=1)
    assert contents(tmp_path / "whole", whole) == contents(tmp_path / "parts", parts)
    assert len(contents(tmp_path / "whole", whole)[3]) > 1000
    with ActivationStore(tmp_path / "parts") as store:  # and nothing is left of what was between
        assert {info.id for info in store.boundaries()} == set(next(iter(store.runs().values()))["boundaries"])


KILLED = (
    SMALL_CHUNKS
    + """
import os, signal, stackwise
model, data, store, codec, after = sys.argv[1:]
seen = 0
def progress(step):
    global seen
    seen += bool(step.tokens)
    if seen == int(after):
        time.sleep(0.3 * (int(after) > 3))  # what was handed over is written behind
        os.kill(os.getpid(), signal.SIGKILL)
how = {"seq_len": 32, "codec": codec, "batch_size": 2, "memory": 1}
stackwise.capture(model, [data], at=[1, 3], store=store, progress=progress, **how)
"""
)


def test_killed_and_resumed_gives_the_same_bytes(
    llama: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stackwise.store.codecs.CHUNK_BYTES", 1 << 14)
    steps = list[Progress]()
    how: dict[str, Any] = {"codec": "bf16", "batch_size": 2}
    whole = captured(llama, data, tmp_path / "whole", [1, 3], **how, memory=1, progress=steps.append)
    passes = sum(step.tokens > 0 for step in steps)
    store = tmp_path / "killed"
    for after in (3, passes // 3):  # before anything is published, and where some of it was
        done = subprocess.run([sys.executable, "-c", KILLED, llama, data, store, "bf16", str(after)])
        assert done.returncode == -signal.SIGKILL
    with ActivationStore(store) as opened:
        assert any(info.state == "writing" and info.published for info in opened.boundaries())
    resumed = captured(llama, data, store, [1, 3], **how)
    assert 0 < resumed.computed < resumed.tokens
    assert contents(store, resumed) == contents(tmp_path / "whole", whole)


@pytest.mark.stress
def test_sigterm_saves_and_ends_with_75(llama: Path, data: str, tmp_path: Path) -> None:
    slow = SMALL_CHUNKS + (
        "from stackwise.training.stage import StageModel\n"
        "real = StageModel.activations\n"
        "StageModel.activations = lambda self, batch: (time.sleep(0.1), real(self, batch))[1]\n"
        "from stackwise.cli import main\n"
        "main()"
    )
    arguments = ["capture", llama, "--data", data, "--at", "2", "--store", tmp_path / "s", "--seq-len", "32"]
    arguments += ["--batch-size", "2"]
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "s").glob("boundaries/*/*/c/*/0/0")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "saved" in errors
    assert "Traceback" not in errors
    with ActivationStore(tmp_path / "s") as store:
        assert any(info.state == "writing" for info in store.boundaries())
    done = subprocess.run([*COMMAND, *arguments, "--json"], capture_output=True, check=True)
    assert json.loads(done.stdout)["tokens_per_second"] > 0


def test_stopped_before_the_first_chunk_is_an_interruption(llama: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        captured(llama, data, tmp_path / "s", [1], stop=lambda: True)


def test_a_full_disk_ends_with_5_and_goes_on(llama: Path, data: str, tmp_path: Path) -> None:
    arguments = ["--data", data, "--at", "1,2,3", "--store", str(tmp_path / "s"), "--seq-len", "32", "--codec", "fp32"]
    with mounted(tmp_path, 9):
        filler = tmp_path / "filler"
        stackwise.capture(llama, [data], at=[0], store=tmp_path / "s", seq_len=SEQ, rows=1)
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_bsize
        filler.write_bytes(bytes(max(0, free - (1 << 20))))
        done = program("capture", str(llama), *arguments)
        assert done.code == 5, done.err
        assert "Traceback" not in done.err
        filler.unlink()
        done = program("capture", str(llama), *arguments)
        assert done.code == 0, done.err


MEMORY = """
import sys, stackwise
from pathlib import Path
def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
model, data, store, memory = sys.argv[1:]
def capture(at):
    stackwise.capture(model, [data], at=[at], store=store, seq_len=32, batch_size=1, rows=2, memory=int(memory))
capture(0)
before = peak()
capture(6)
print(1024 * (peak() - before))
"""


def test_memory_is_that_of_one_part(data: str, tmp_path: Path) -> None:
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=258, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    bytes_tokenizer().save(tmp_path / "m" / "tokenizer.json")

    def taken(memory: int) -> int:
        store = tmp_path / f"s{memory}"
        arguments = [tmp_path / "m", data, store, str(memory)]
        return int(subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, check=True).stdout)

    assert taken(1 << 40) > 5 * 4 * block
    assert taken(1) < 2.5 * 4 * block  # a block in fp32, and in the file's bf16 while it is read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": [9]}, "no depth 9"),
        ({"at": [-1]}, "no depth -1"),
        ({"at": []}, "no depth"),
        ({"codec": "int3"}, "codec 'int3'"),
        ({"seq_len": 65}, "at most 64 tokens"),
        ({"seq_len": 64, "data": "nowhere.txt"}, "nowhere.txt"),
        ({"dtype": "fp64"}, "fp64"),
        ({"batch_size": 0}, "batch_size"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    llama: Path, data: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    how: dict[str, Any] = {"model": llama, "data": data, "at": [1], "seq_len": SEQ} | options
    model, path = how.pop("model"), how.pop("data")
    with pytest.raises(UsageError, match=message):
        stackwise.capture(model, [path], store=tmp_path / "s", **how)
    assert not (tmp_path / "s").exists()


def test_text_that_the_model_has_no_tokenizer_or_no_ids_for(llama: Path, data: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in llama.iterdir():
        if path.name != "tokenizer.json":
            (bare / path.name).write_bytes(path.read_bytes())
    with raises_naming(UsageError, "tokenizer.json"):
        captured(bare, data, tmp_path / "s", [1])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": list(range(n, n + 40))}) + "\n" for n in range(240, 280)))
    prepared = program("data", "prepare", str(rows), "--out", str(tmp_path / "set"))
    assert prepared.code == 0, prepared.err
    with raises_naming(UsageError, 258):
        captured(bare, str(tmp_path / "set"), tmp_path / "s", [1])
    rows.write_text("".join(json.dumps({"input_ids": list(range(n, n + 40))}) + "\n" for n in range(40)))
    assert program("data", "prepare", str(rows), "--out", str(tmp_path / "fits")).code == 0
    assert captured(bare, str(tmp_path / "fits"), tmp_path / "s", [1]).computed > 0


def test_the_dataset_of_a_boundary_without_tokens(llama: Path, data: str, tmp_path: Path) -> None:
    result = captured(llama, data, tmp_path / "s", [1])
    with ActivationStore(tmp_path / "s") as store:
        assert len(next(iter(store.dataset(result.boundaries[1].id, 4, tokens=False)))) == 2
        loader = torch.utils.data.DataLoader(store.dataset(result.boundaries[1].id, 4), batch_size=None)
        rows_B, x_BSD, tokens_BS = next(iter(loader))
    assert (rows_B.shape, x_BSD.shape, tokens_BS.shape) == ((4,), (4, SEQ, 64), (4, SEQ))
    assert tokens_BS.dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "arguments", "figures"),
    [
        (
            "sparse_autoencoder",
            ["--at", "2", "--steps", "150"],
            r"variance ([\d.]+); .* ([\d.]+); by",
        ),
        ("draft_head", ["--at", "3", "--steps", "40"], r"loss ([\d.]+) nats a token; .* ([\d.]+)"),
    ],
)
def test_an_example_learns_more_than_its_baseline(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    name: str, arguments: list[str], figures: str,
) -> None:  # fmt: skip
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 80
    given = [str(llama), "--data", str(text), "--store", str(tmp_path / "s"), "--seq-len", "32", *arguments]
    monkeypatch.setattr(sys, "argv", [str(path), *given])
    runpy.run_path(str(path), run_name="__main__")
    found = re.search(figures, capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) < float(found[2])
