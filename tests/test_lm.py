"""The language model: its text, its network, its methods, and the link that they are compared over."""

import contextlib
import hashlib
import http.server
import itertools
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import flagsaver
from flax import nnx

import gradcomp_jax as gcj
from experiments import data, download, link, lm, loop, records, text
from experiments.models.transformer import Transformer
from tests.small_training import FLAGS, assert_same_end, standard_promotion  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent
VERSE = ("".join(map(chr, range(97, 113))) + "to be or not to be ").encode() * 60
SMALL = ["--context=8", "--width=16", "--blocks=1", "--heads=2", "--validation_tokens=64", "--workers=2", "--every=3"]
SMALL += [
    "--tokens=224",
    "--sequences=2",
    "--eval_every=3",
    "--log_every=1",
    "--checkpoint_every=2",
    "--streaming_fragments=3",
]  # 7 steps
METHODS = ["dense", "topk", *lm.OUTER]


@pytest.fixture(autouse=True)
def default_flags():
    with flagsaver.flagsaver():
        lm.set_defaults()
        FLAGS(["lm"])
        yield


@pytest.fixture(scope="module")
def verse(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "verse.txt"
    path.write_bytes(VERSE)
    return path


def given(verse, folder, *args):
    """The arguments of a small training, which are also set."""
    folders = [f"--text={verse}", f"--out_dir={folder}/out", f"--checkpoint_dir={folder}/checkpoints"]
    FLAGS(["lm", *SMALL, *folders, *args])
    return [*SMALL, *folders, *args]


# The command


def test_every_method_trains_and_the_table_tells_what_it_sent(verse, tmp_path, capsys):
    given(verse, tmp_path, f"--method={','.join(METHODS)}", "--topk_fraction=0.1", "--eval_every=7")
    lm.main()
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "verse-transformer.png").read_bytes().startswith(b"\x89PNG")
    params = lm.language_model(text.load(str(verse), None)).params
    for name in METHODS:
        label = {"dense": "dense", "topk": "topk fraction=0.1"}.get(name, f"{name} every=3")
        label += " fragments=3" * (name == "streaming_diloco")
        run = records.read(tmp_path / "out" / f"verse-transformer-{label.replace(' ', '_')}-seed0.jsonl")
        (plan,) = lm.plans_of(name, [3])
        assert run.end["bytes"] == sent(plan.tx, params, steps=7), name
        assert all(math.isfinite(line["loss"]) for line in (*run.train, *run.test))
        cells = next(line for line in shown.splitlines() if line.startswith(f"│ {label.split()[0]} ")).split("│")
        assert [cell.strip() for cell in cells[4:6]] == ["224", f"{run.end['bytes'] / 1e6:,.2f}"]
        streams = name == "streaming_diloco"  # whose fragments are exchanged in turn
        assert run.end["exchanges"] == (7 if name in ("dense", "topk") else 6 if streams else 2), name
    assert "sparseloco every=3: the last 1 steps came after its last exchange" in shown
    assert "a model, not a measurement" in shown


def sent(tx, params, steps):
    """The bytes that a worker sends, as `wire_bits` tells, in a training on something else."""

    def loss_fn(params, batch):
        loss = sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params)) + jnp.sum(batch)
        return loss, loss

    step, state = gcj.simulate(loss_fn, tx, 2, has_aux=True), gcj.init(tx, params, 2)
    for _ in range(steps):
        params, state, *_ = step(params, state, jnp.zeros(2))
    return gcj.wire_bits(state).total // 8


@pytest.mark.parametrize("method", ["dense", "sparseloco", "streaming_diloco"])
def test_an_interrupted_training_ends_as_one_that_was_not(method, verse, tmp_path, monkeypatch):
    """Stopped inside a period, between two checkpoints."""
    given(verse, tmp_path / "whole", f"--method={method}")
    lm.main()
    given(verse, tmp_path / "stopped", f"--method={method}")
    batches = text.batches

    def interrupted(*args):
        for number, batch in enumerate(batches(*args)):
            if number == 4:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(text, "batches", interrupted)
    with pytest.raises(SystemExit, match="130"):
        lm.main()
    monkeypatch.setattr(text, "batches", batches)
    lm.main()
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    (path,) = (tmp_path / "stopped" / "out").glob("*.jsonl")
    assert [line["step"] for line in records.read(path).resumed] == [5]


def test_a_killed_training_ends_as_one_that_was_not(verse, tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(folder):
        args = given(verse, folder, "--method=sparseloco", "--tokens=1280", "--eval_every=40")  # 40 steps
        command = [sys.executable, "-m", "experiments.lm", *args]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | cache, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    process = start(tmp_path / "killed")
    while not [*(tmp_path / "killed").glob("checkpoints/*/1?")]:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start(tmp_path / "killed").wait() == 0
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    (path,) = (tmp_path / "killed" / "out").glob("*.jsonl")
    assert len(records.read(path).resumed) == 1


def test_on_another_number_of_workers_it_goes_on(verse, tmp_path, monkeypatch, capsys):
    given(verse, tmp_path, "--method=sparseloco")
    monkeypatch.setattr(loop, "interruptible", lambda: contextlib.nullcontext(lambda: True))
    with pytest.raises(SystemExit, match="130"):
        lm.main()
    monkeypatch.undo()
    given(verse, tmp_path, "--method=sparseloco", "--workers=4", "--sequences=1")
    lm.main()
    assert "The checkpoint is of 2 workers, now there are 4" in capsys.readouterr().out
    given(verse, tmp_path, "--method=sparseloco", "--workers=4")
    with pytest.raises(SystemExit, match="batch=4, not 8"):
        lm.main()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--width=18", "--heads=4"], "--width=18 is no even multiple of --heads=4"),
        (["--tokens=31"], "--tokens=31 is less than a step, which has 32 over all workers"),
        (["--context=1000"], "a batch has 4 pieces of 1000 symbols, and the text has 1890 to train on"),
        (["--method=streaming_diloco", "--every=3", "--streaming_delay=3"], "delay=3 must be below every=3"),
        (["--method=streaming_diloco", "--every=2"], "3 fragments do not fit into a period of every=2 steps"),
        (["--text=/nowhere"], "cannot read /nowhere (No such file or directory)"),
        (["--runs=/nowhere"], "--runs=/nowhere has no *.jsonl of a run that has reached its end"),
        (["--method=qsgd", "--qsgd_bits=3"], "bits=3 must be 2, 4 or 8"),
    ],
)
def test_wrong_settings_end_in_a_message(args, message, verse, tmp_path):
    given(verse, tmp_path, *args)
    with pytest.raises(SystemExit, match=re.escape(message)):
        lm.main()
    assert not (tmp_path / "checkpoints").exists()


# The text


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A site with the text, an empty cache; gives the body that is answered, and the paths that were asked for."""
    body, asked = [VERSE], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body[0])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/input.txt"
    source = text.SHAKESPEARE._replace(url=url, sha256=hashlib.sha256(VERSE).hexdigest())
    monkeypatch.setattr(text, "SHAKESPEARE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("GRADCOMP_DATA_DIR", raising=False)
    yield body, asked
    server.shutdown()


def test_the_text_is_downloaded_once_verified_and_renewed_if_damaged(site):
    _, asked = site
    whole = text.load(None, None)
    assert (whole.name, whole.symbols, len(whole.train) + len(whole.validation)) == ("tinyshakespeare", 19, len(VERSE))
    text.load(None, None)
    assert len(asked) == 1
    (download.cache_dir() / "tinyshakespeare" / "input.txt").write_bytes(b"damaged")
    assert text.load(None, None).sha256 == whole.sha256
    assert len(asked) == 2


def test_a_wrong_download_names_all_ways(site):
    site[0][0] = b"something else"
    ways = r"by hand to .*gradcomp_jax/tinyshakespeare.*--data_dir.*GRADCOMP_DATA_DIR.*--text"
    with pytest.raises(data.DataError, match=r"cannot bring http\S+ to .*but got [0-9a-f]{64}.*" + ways):
        text.load(None, None)


@pytest.mark.parametrize("inner", ["", "tinyshakespeare"])
def test_a_directory_may_hold_the_text(inner, site, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "tinyshakespeare"
    folder.mkdir(parents=True)
    with pytest.raises(
        data.DataError, match=r"cannot read .*input.txt \(No such file or directory\): without --data_dir"
    ):
        text.load(None, str(tmp_path / "data" / inner))
    (folder / "input.txt").write_bytes(b"damaged")
    with pytest.raises(
        data.DataError, match=r"input.txt is not the file of http\S+, its sha256 is [0-9a-f]{64}: without"
    ):
        text.load(None, str(tmp_path / "data" / inner))
    (folder / "input.txt").write_bytes(VERSE)
    monkeypatch.setenv("GRADCOMP_DATA_DIR", str(tmp_path / "data" / inner))
    whole = text.load(None, None)
    assert bytes(np.unique(np.frombuffer(VERSE, np.uint8))[np.concatenate([whole.train, whole.validation])]) == VERSE
    assert not site[1]


def test_an_epoch_goes_through_the_text_once():
    ids = np.arange(103)
    steps = text.steps_per_epoch(ids, 3, 8)
    epochs = [np.concatenate([*itertools.islice(text.batches(ids, 3, 8, 5, first), steps)]) for first in (0, steps)]
    for rows in epochs:
        assert rows.shape == (9, 9)
        assert (np.diff(rows) == 1).all()
        assert len(np.unique(rows[:, :-1])) == 72  # no symbol is predicted twice
    assert (epochs[0] != epochs[1]).any()
    later = [*itertools.islice(text.batches(ids, 3, 8, 5, 2), 2)]
    np.testing.assert_array_equal(later[1], epochs[1][:3])
    assert (np.concatenate([*itertools.islice(text.batches(ids, 3, 8, 6), steps)]) != epochs[0]).any()


def test_the_pieces_of_an_evaluation_are_spread_over_the_held_out_text():
    ids = np.arange(101)
    np.testing.assert_array_equal(text.pieces(ids, 3, 10)[:, 0], [0, 40, 90])
    assert text.pieces(ids, 99, 10).shape == (10, 11)


# The network


def test_a_symbol_is_predicted_from_those_before_it_alone():
    network = Transformer(5, 16, 2, 4, nnx.Rngs(0))
    symbols = np.random.default_rng(0).integers(0, 5, (2, 8))
    changed = symbols.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 5
    before, after = network(symbols), network(changed)
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(axis=(0, 2)) > 1e-6).all()


def test_a_position_is_told_by_the_order_alone():
    network = Transformer(5, 16, 1, 4, nnx.Rngs(0))
    symbols = np.random.default_rng(0).permutation(5)[None]
    apart = np.abs(network(symbols)[:, -1] - network(symbols[:, [1, 0, 2, 3, 4]])[:, -1]).max()
    assert apart > 1e-7  # without positions they would be equal, to rounding


def test_the_network_of_the_default_flags_has_three_million_parameters():
    FLAGS(["lm"])
    make = lambda: Transformer(65, FLAGS.width, FLAGS.blocks, FLAGS.heads, nnx.Rngs(0))  # noqa: E731
    params = jax.eval_shape(lambda: nnx.state(make(), nnx.Param))
    width = 256
    layers = 4 * (12 * width**2 + 2 * width)
    assert sum(x.size for x in jax.tree.leaves(params)) == layers + (65 + 1) * width == 3_164_672


def test_muon_trains_the_kernels_and_adamw_the_rest(verse, tmp_path):
    given(verse, tmp_path)
    params = lm.language_model(text.load(str(verse), None)).params
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3) + 1e-3 * jnp.arange(x.size).reshape(x.shape) % 7, params)
    one = optax.constant_schedule(1.0)
    FLAGS.adamw_decay = 0.0
    tx = lm.muon(one, one)
    changes, _ = tx.update(grads, tx.init(params), params)
    for path, x in jax.tree_util.tree_leaves_with_path(changes):
        if "kernel" in jax.tree_util.keystr(path):
            assert np.linalg.norm(x, 2) < 1.5 * max(1, x.shape[1] / x.shape[0]) ** 0.5  # orthogonal, but for a scale
        else:
            np.testing.assert_allclose(np.abs(x), np.abs(x).mean(), rtol=1e-3)  # Adam's first step is of the signs


# The link


def run_of(codec, label, seed, bytes_sent, loss, ms=80.0, **header):
    """A run of 100 steps."""
    at = {"step": 100, "bytes": bytes_sent, "dense_bytes": 10**9}
    facts = {"task": "t", "workers": 8, "steps": 100, "batch_size": 10, "parameters": 10**6, "settings": {}}
    facts |= {"emulated": True}
    end = {"exchanges": 10, "skipped": 0}
    lines = [
        {"kind": "run", "codec": codec, "label": label, "seed": seed, **facts, **header},
        {"kind": "train", **at, "ms": ms},
        {"kind": "test", **at, "loss": loss},
        {"kind": "end", **at, **end},
    ]
    return records.of(lines)


def test_the_simulated_time_is_that_of_the_steps_and_of_the_bytes():
    runs = [run_of("diloco", "diloco every=10", 0, 10**8, 2.0), run_of("dense", "dense", 0, 10**9, 2.5)]
    dense, diloco = link.rows(runs)
    assert (dense.name, diloco.name) == ("dense", "diloco every=10")
    assert dense.minutes(runs[1].end) == pytest.approx((100 * 0.08 / 8 + 8e9 / 1e8) / 60)
    (real,) = link.rows([run_of("dense", "dense", 0, 10**9, 2.5, emulated=False)])  # each worker has a device
    assert real.minutes(runs[1].end) == pytest.approx((100 * 0.08 + 8e9 / 1e8) / 60)
    FLAGS(["lm", "--link=50", "--step_time=0.5"])
    _, diloco = link.rows(runs)
    assert diloco.minutes(runs[0].end) == pytest.approx((100 * 0.5 + 8e8 / 5e7) / 60)


def test_runs_that_differ_in_the_seed_share_a_row():
    runs = [run_of("diloco", "diloco every=30", seed, 10**8, 2.0 + seed) for seed in range(3)]
    runs[0].header["settings"]["diloco_every"] = 30
    (row,) = link.rows(runs)
    cells = [[*column.cells] for column in link.table([row], "").columns]
    assert cells[1:7] == [["3.0000"], ["2.0000 to 4.0000"], ["1,000"], ["100.00"], ["10.0"], ["10"]]
    assert "diloco every=30: the last 10 steps came after its last exchange, and count for nothing." in link.notes(
        [row]
    )


@pytest.mark.parametrize(
    ("every", "delay", "fragments", "left_over"),
    [
        (10, 0, 1, ""),
        (10, 0, 4, ""),
        (30, 0, 1, "the last 10 steps came after its last exchange, and count for nothing"),
        (20, 1, 1, "the last 20 steps came after its last exchange, and count for nothing"),
        (11, 1, 2, "the last 1 steps came after the last exchange of its last fragment, and count for nothing there"),
        (200, 0, 1, "there was no exchange"),
        (100, 1, 2, "there was no exchange of its last fragment"),
    ],
)
def test_steps_after_the_last_exchange_are_told(every, delay, fragments, left_over):
    run = run_of("diloco", f"diloco every={every}", 0, 10**8 if every < 100 else 0, 2.0)
    run.header["settings"] |= {"diloco_every": every, "diloco_delay": delay, "diloco_fragments": fragments}
    assert run.left_over == left_over
    rows = link.rows([run])
    told = [note for note in link.notes(rows) if note.startswith("diloco")]
    assert told == [f"diloco every={every}: {left_over}."] * bool(left_over)
    assert [*link.table(rows, "").columns[5].cells] == ["10.0" if every < 100 else "inf"]


def test_records_of_several_tasks_are_not_compared(verse, tmp_path, capsys):
    for seed in (0, 1):
        given(verse, tmp_path / str(seed), "--method=dense", "--tokens=64", f"--seed={seed}")
        lm.main()
    FLAGS(["lm", f"--runs={tmp_path}", f"--out_dir={tmp_path}"])
    capsys.readouterr()
    lm.main()
    assert re.search(r"│ dense +│ +\d\.\d{4} │ \d\.\d{4} to \d\.\d{4} │", capsys.readouterr().out)
    given(verse, tmp_path / "2", "--method=dense", "--tokens=32", "--runs=")
    lm.main()
    FLAGS(["lm", f"--runs={tmp_path}"])
    with pytest.raises(SystemExit, match="has runs of several tasks: give a directory for each"):
        lm.main()
