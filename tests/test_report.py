"""The report: its numbers by hand, what it warns of, and its files."""

import html
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ET

import pytest

from experiments import codecs, figures, records, report
from experiments.summary import summarize

ROOT = pathlib.Path(__file__).parent.parent
DENSE = 4_000_000  # bytes a step

HEADER = {
    "kind": "run",
    "task": "cifar10-resnet8",
    "workers": 8,
    "emulated": True,
    "steps": 40,
    "parameters": 75290,
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "device": "cpu",
    "date": "2026-11-22",
}


def lines(codec="none", seed=0, accuracy=0.9, ratio=1.0, own=None, compressed=None, finished=True, header=None, **more):
    """The records of 40 steps, of which the last `compressed` send `ratio` times fewer bytes than dense."""
    own = own or {}
    compressed = compressed if compressed is not None else 40 * (ratio > 1)
    label = " ".join([codec, *(f"{key}={value}" for key, value in own.items())])
    settings = {"lr": 0.4, "epochs": 1, "seed": seed, "codec": codec} | {f"{codec}_{k}": v for k, v in own.items()}
    out = [HEADER | {"codec": codec, "label": label, "seed": seed, "settings": settings | more} | (header or {})]
    sent = 0.0
    for step in range(1, 41):
        sent += DENSE / ratio if step > 40 - compressed or ratio < 1 else DENSE
        so_far = {"step": step, "bytes": round(sent), "dense_bytes": step * DENSE}
        if step % 10 == 0:
            values = {"loss": 2 / step, "accuracy": 0.5, "lr": 0.4, "ms": 100.0 + step, "skipped": 0}
            out.append({"kind": "train", **so_far, **values})
        if step % 20 == 0:
            out.append({"kind": "test", **so_far, "loss": 1 - accuracy, "accuracy": accuracy * (step / 40)})
    seconds = {"compile": 9.0, "input": 1.0, "step": 4.0, "evaluate": 0.5, "checkpoint": 0.0}
    sums = {"compressed_steps": compressed, "compressed_bytes": round(compressed * DENSE / ratio), "skipped": seed}
    out.append({"kind": "end", **so_far, **sums, "seconds": seconds})
    return out if finished else out[:3]


def run(*args, **kwargs):
    return records.of(lines(*args, **kwargs))


def only(runs):
    (section,) = summarize(runs)
    return section


def save(folder, *some):
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(some):
        text = "".join(json.dumps(line) + "\n" for line in content)
        (folder / f"{number}.jsonl").write_text(text, encoding="utf-8")
    return folder


NONE = [run(seed=seed, accuracy=accuracy) for seed, accuracy in ((0, 0.90), (1, 0.92), (2, 0.91))]


@pytest.fixture
def without_figures(monkeypatch):
    """Pages are made sooner."""
    monkeypatch.setattr(report, "plots", lambda *_: [])


# Numbers


def test_a_row_of_one_run():
    section = only([*NONE, run("powersgd", accuracy=0.88, ratio=8.0, own={"rank": 1})])
    row = section.rows[1]
    assert (row.name, row.seeds, row.settings) == ("powersgd", [0], "rank=1")
    assert row.difference == pytest.approx(-3.0)  # 88 less the mean of 90, 91 and 92
    assert row.verdict == "below"
    assert row.loss == pytest.approx(0.12)
    assert row.step_mb == pytest.approx(0.5)
    assert row.total_mb == pytest.approx(20.0)
    assert row.ratio == pytest.approx(8.0)
    assert row.step_ms == 130.0  # the median of 120, 130 and 140: the first line holds the compilation


def test_a_row_of_several_seeds():
    row = only(NONE).rows[0]
    assert row.seeds == [0, 1, 2]
    assert (row.accuracy, row.low, row.high) == (pytest.approx(0.91), 0.90, 0.92)
    assert row.skipped == 0 + 1 + 2
    assert (row.difference, row.verdict, row.compressed_ratio) == (None, None, None)


def test_compressed_steps_are_told_from_the_others():
    row = only([run("gradiveq", ratio=4.0, compressed=30)]).rows[0]
    assert row.compressed_share == 0.75
    assert row.compressed_ratio == pytest.approx(4.0)
    assert row.ratio == pytest.approx(40 / (10 + 30 / 4))


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [([0.90], "within"), ([0.92], "within"), ([0.899], "below"), ([0.921], "above"), ([0.89, 0.93], "within")],
)
def test_the_mean_is_held_against_the_range_of_the_baseline(accuracies, verdict):
    row = only([*NONE, *(run("qsgd", seed=seed, accuracy=x) for seed, x in enumerate(accuracies))]).rows[1]
    assert row.verdict == verdict
    cells = {heading: cell(row) for heading, cell in report.COLUMNS.items()}
    assert cells["range of none's seeds"] == ("within" if verdict == "within" else "outside")
    assert ("one run" in cells["over seeds, %"]) == (len(accuracies) == 1)


def test_the_notes_say_what_the_seeds_allow_to_say():
    notes = " ".join(only([*NONE, run("qsgd", accuracy=0.91, own={"bits": 4}), run("powersgd", accuracy=0.8)]).notes)
    assert "The 3 seeds of none reach 90.00% to 92.00%, a range of 2.00 points." in notes
    assert "Within this range: qsgd." in notes
    assert "Below it: powersgd." in notes
    assert "Above it" not in notes
    assert "with a probability of 50%" in notes
    single = only([NONE[0], run("qsgd")])
    assert "none has one run" in " ".join(single.notes)
    assert (single.rows[1].difference, single.rows[1].verdict) == (pytest.approx(0.0), None)


def test_without_a_finished_baseline_there_are_no_differences():
    section = only([run(finished=False), run("powersgd"), run("qsgd")])
    assert [row.name for row in section.rows] == ["powersgd", "qsgd"]
    assert [row.difference for row in section.rows] == [None, None]
    assert section.notes[0].startswith("No run of none has reached its end")
    assert "none has one run" not in " ".join(section.notes)


def test_a_codec_that_does_not_pay_is_said_to():
    notes = only([run("qsgd", ratio=0.8, own={"bits": 8}), run("gradiveq"), run("powersgd", ratio=2.0)]).notes
    assert "qsgd does not pay here: it sends 1.25 times as many bytes as dense." in notes
    assert [note[:9] for note in notes if "warm-up" in note] == ["gradiveq "]
    assert any("emulated" in note for note in notes)
    assert not any("emulated" in note for note in only([run(header={"emulated": False})]).notes)


# Which runs go together


def test_rows_are_named_by_what_they_differ_in_and_in_order():
    ranks = [run("powersgd", ratio=r, own={"rank": n, "min_size": 0}) for n, r in ((4, 8.0), (1, 30.0), (2, 17.0))]
    section = only([run("qsgd", own={"bits": 4}), *ranks, *reversed(NONE)])
    assert [row.name for row in section.rows] == [
        "none",
        "powersgd rank=1",
        "powersgd rank=2",
        "powersgd rank=4",
        "qsgd",
    ]
    assert section.rows[0].seeds == [0, 1, 2]


def test_names_are_those_of_a_section_and_styles_those_of_the_page(without_figures):
    one = [run("qsgd", own={"bits": 4}), run("qsgd", own={"bits": 8})]
    other = [run("qsgd", own={"bits": 8}, header={"task": "digits"})]
    sections = summarize([*one, *other])
    assert [row.name for section in sections for row in section.rows] == ["qsgd bits=4", "qsgd bits=8", "qsgd"]
    keys = re.findall(r'<th scope="row"><span class="key" style="background: (.*?)">', report.html(sections))
    assert keys[1] == keys[2] != keys[0]


def test_labels_are_kept_apart_where_their_settings_do_not_tell():
    section = only([run("qsgd", header={"label": "qsgd"}), run("qsgd", header={"label": "qsgd bits=8"})])
    assert [row.name for row in section.rows] == ["qsgd", "qsgd bits=8"]


def test_tasks_workers_and_steps_have_their_own_sections():
    others = [{"task": "digits-resnet8"}, {"workers": 4}, {"steps": 50}]
    sections = summarize([run(), *(run(header=header) for header in others)])
    assert sorted(section.title for section in sections) == [
        "cifar10-resnet8, 4 workers, 40 steps",
        "cifar10-resnet8, 8 workers, 40 steps",
        "cifar10-resnet8, 8 workers, 50 steps",
        "digits-resnet8, 8 workers, 40 steps",
    ]


def test_runs_that_differ_in_codec_and_seed_alone_are_not_warned_of():
    section = only([*NONE, run("powersgd", own={"rank": 1}), run("powersgd", own={"rank": 2})])
    assert section.warnings == []
    facts = dict(section.facts)
    assert (facts["lr"], facts["seeds"], facts["parameters"], facts["jax"]) == ("0.4", "0, 1, 2", "75,290", "0.10.2")
    assert not {"codec", "powersgd_rank", "rank", "seed"} & set(facts)


@pytest.mark.parametrize(
    ("other", "warning"),
    [
        ({"lr": 0.2}, "lr differs: 0.4 in none (seeds 0, 1, 2); 0.2 in qsgd (seed 0)."),
        ({"dropout": 0.1}, "dropout differs: not set in none (seeds 0, 1, 2); 0.1 in qsgd (seed 0)."),
        ({"header": {"device": "gpu"}}, "device differs: cpu in none (seeds 0, 1, 2); gpu in qsgd (seed 0)."),
        (
            {"header": {"versions": {"python": "3.11.7", "jax": "0.12.0"}}},
            "jax differs: 0.10.2 in none (seeds 0, 1, 2); 0.12.0 in qsgd (seed 0).",
        ),
    ],
)
def test_a_setting_that_differs_is_warned_of(other, warning):
    section = only([*NONE, run("qsgd", **other)])
    assert section.warnings == [warning]
    assert warning.split()[0] not in dict(section.facts)


def test_warnings_are_in_both_files(without_figures):
    section = only([run(), run("qsgd", lr=0.2)])
    for text in (report.html([section]), report.markdown([section])):
        assert report.DOUBTS in text
        assert section.warnings[0] in text
    plain = section._replace(warnings=[], runs={})
    assert report.DOUBTS not in report.markdown([plain])


def test_a_run_that_is_there_twice_is_warned_of():
    assert "There are 2 runs of none (seed 0)" in only([run(), run()]).warnings[0]
    assert only([run(), run(finished=False)]).warnings == []


def test_one_label_with_two_settings_is_warned_of():
    runs = [run("qsgd", seed=seed, own={"bits": 4 + 4 * seed}, header={"label": "qsgd"}) for seed in (0, 1)]
    assert only(runs).warnings == ["bits of qsgd differs: 4 in qsgd (seed 0); 8 in qsgd (seed 1)."]


def test_a_run_that_went_on_with_fewer_workers_is_warned_of():
    content = lines()
    content.insert(3, {"kind": "resumed", "step": 20, "bytes": 1, "dense_bytes": 1, "workers": 4})
    assert only([records.of(content)]).warnings == ["none (seed 0) went on with 4 workers after step 20."]


def test_decisions_of_accordion_are_read_and_change_nothing():
    content = lines("accordion")
    content.insert(3, {"kind": "levels", "step": 20, "bytes": 1, "dense_bytes": 1, "decisions": ["a: low, as ..."]})
    read = records.of(content)
    assert read.levels[0]["decisions"] == ["a: low, as ..."]
    assert only([read]) == only([run("accordion")])._replace(runs={"accordion": [read]})


def test_an_unfinished_run_is_named_and_in_no_row(without_figures):
    section = only([*NONE, run("qsgd", finished=False)])
    assert section.unfinished == ["qsgd (seed 0): at step 20 of 40."]
    assert [row.name for row in section.rows] == list(section.runs) == ["none"]
    for text in (report.html([section]), report.markdown([section])):
        assert section.unfinished[0] in text
        assert "3 runs, 1 unfinished" in text


def test_unfinished_runs_alone_give_a_page_without_table_and_figures():
    section = only([run("qsgd", finished=False)])
    assert section.rows == []
    page = report.html([section])
    assert section.unfinished[0] in page
    assert "<svg" not in page
    assert "<table" not in page


# Figures


def test_a_name_has_the_same_style_in_every_figure_and_none_is_black():
    labels = {"none": "none", **{f"qsgd bits={n}": "qsgd" for n in (2, 4, 8)}, "powersgd": "powersgd"}
    looks = figures.styles(labels)
    assert looks["none"].color == "#1a1a1a"
    assert len({look.color for look in looks.values()}) == len({look.marker for look in looks.values()}) == 5
    assert figures.styles({f"q{n}": "q" for n in range(30)}).keys() == {f"q{n}" for n in range(30)}


def test_a_codec_has_its_hue_whatever_else_is_there():
    hues = {name: figures.styles({name: name})[name].color for name in codecs.CODECS}
    assert len(set(hues.values())) == len(hues)
    both = {"randomk": "randomk", "qsgd bits=2": "qsgd", "qsgd": "qsgd", "qsgd bits=8": "qsgd", "own": "own"}
    looks = figures.styles(both)
    assert looks["qsgd"].color == hues["qsgd"]
    assert figures.styles({"qsgd bits=2": "qsgd"})["qsgd bits=2"].color == hues["qsgd"]
    assert len({look.color for look in looks.values()}) == 5


def test_lines_have_their_styles_and_can_be_hidden():
    page = report.html([only([*NONE, run("qsgd", ratio=2.0)])])
    color = figures.styles({"none": "none", "qsgd": "qsgd"})["qsgd"].color
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert [color in picture for picture in pictures] == [True, False, True, True, True, True]  # the second is of time
    assert len(re.findall(r'id="s0-f2-run\d-codec0"', page)) == 3
    assert len(re.findall(r'id="s0-f2-run\d-codec1"', page)) == 1
    assert '#s0:has(#s0-show1:not(:checked)) figure [id$="-codec1"]' in page


def lossy(codec, errors, residuals, **more):
    """The records of a run that tells what the codec lost and owed at steps 10, 20, 30 and 40."""
    content = lines(codec, **more)
    train = [record for record in content if record["kind"] == "train"]
    for record, error, residual in zip(train, errors, residuals, strict=True):
        record |= {"error": error, "residual": 7.0, "residual_norm": residual}
    content.insert(4, {"kind": "leaves", "step": 20, "bytes": 1, "dense_bytes": 1, "error": {"a": 0.5}})
    return records.of(content)


def test_what_codecs_lose_is_in_the_table_and_in_figures_where_it_was_measured():
    topk = lossy("topk", [0.9, 0.8, 0.7, 0.5], [1.0, 2.0, 5.0, 3.0])
    qsgd = lossy("qsgd", 4 * [0.25], 4 * [0.0])
    section = only([NONE[0], topk, qsgd])
    lost = {row.name: (row.error, row.owed) for row in section.rows}
    assert lost == {"none": (None, None), "qsgd": (0.25, None), "topk": (pytest.approx(0.6), (5.0, 3.0))}
    table = [line.split(" | ") for line in report.markdown([section]).splitlines() if line[:1] == "|"]
    assert [line[-2:] for line in table if line[0] == "| topk"] == [["0.600", "5, 3 |"]]
    assert [line[-2:] for line in table if line[0] == "| none"] == [["", " |"]]
    page = report.html([section])
    *_, error, residual = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    looks = figures.styles({name: name for name in ("none", "qsgd", "topk")})
    colors = {name: look.color for name, look in looks.items()}
    assert [colors[name] in error for name in ("none", "qsgd", "topk")] == [False, True, True]
    # Without error feedback nothing is owed, of which a logarithmic axis has no place.
    assert [colors[name] in residual for name in ("none", "qsgd", "topk")] == [False, False, True]
    assert re.findall(r'id="s0-f7-run\d-codec(\d)"', page) == ["2"]
    assert page.count("<svg") == 8
    assert report.html([only([NONE[0], run("topk")])]).count("<svg") == 6


def test_losses_are_means_of_neighbours():
    train = [{"step": n + 1, "bytes": 10 * n, "loss": float(n)} for n in range(5)]
    assert figures._means(train, 5) == train
    assert [(p["step"], p["loss"]) for p in figures._means(train, 3)] == [(2, 0.5), (4, 2.5), (5, 4.0)]


def test_points_that_lie_close_all_have_their_names():
    runs = [run("qsgd", accuracy=0.9 + n / 1e4, own={"$b_i$": n}) for n in range(10)]
    section = only(runs)
    looks = figures.styles(dict.fromkeys(section.runs, "qsgd"))
    figure = figures.final_accuracy(
        [figures.Series(name, looks[name], runs) for name, runs in section.runs.items()], None
    )
    assert re.findall(r">(qsgd \$b_i\$=\d)</text>", figures.svg(figure, "x")) == list(section.runs)


def test_a_run_that_has_diverged_is_drawn():
    content = lines("qsgd", accuracy=0.1)
    for record in content[1:-1]:
        record["loss"] = float("nan")
    section = only([records.of(content)])
    assert "nan" in report.markdown([section])
    assert report.html([section]).count("<svg") == 6


# Files


def ten(folder):
    """What is asked for: three seeds of none, three settings each of two codecs, and gradiveq."""
    return save(
        folder / "runs",
        *(lines(seed=seed, accuracy=0.9 + seed / 100) for seed in range(3)),
        *(lines("powersgd", accuracy=0.87 + rank / 100, ratio=30.0 / rank, own={"rank": rank}) for rank in (1, 2, 4)),
        *(lines("qsgd", accuracy=0.9, ratio=8.0 / bits, own={"bits": bits}) for bits in (2, 4, 8)),
        lines("gradiveq", accuracy=0.9, ratio=8.0, compressed=30),
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with both files of ten runs, and their records below."""
    folder = tmp_path_factory.mktemp("ten")
    report.write([str(ten(folder))], folder)
    return folder


def test_the_page_asks_nothing_of_a_network_and_is_well_formed(built):
    page = (built / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w|<script|<link|<img|@import|@font-face", page)
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', page))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == page.count("<figcaption>") == page.count('role="img"') == 6
    for picture in pictures:
        ET.fromstring(picture.replace("<svg", '<svg xmlns:xlink="x"', 1))
        assert "<text" in picture


def test_the_same_runs_give_the_same_files(built, tmp_path):
    report.write([str(ten(tmp_path))], tmp_path)
    for name in ("report.html", "report.md"):
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()


def test_what_files_say_is_text(tmp_path):
    evil = "<script>alert(1)</script> & $x_1$ | [a](b) *c*"
    runs = save(
        tmp_path / "runs",
        lines("qsgd", header={"label": evil}),
        lines("qsgd", seed=1, header={"label": evil + "2", "task": "<script>"}),
        lines("qsgd", seed=2, finished=False, own={"bits": evil}, header={"label": evil}, lr=evil),
        lines(evil, own={"<script>": "</style><script>"}),
    )
    report.write([str(runs)], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x_1$" in page
    assert page.count("</style") == page.count("<style")
    table = [line for line in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines() if line[0:1] == "|"]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(report.COLUMNS) + 1}
    assert not any("<script" in line or "[a](b)" in line or " *c*" in line for line in table)


def test_both_files_tell_the_same(built):
    summary, page = ((built / f"report.{end}").read_text(encoding="utf-8") for end in ("md", "html"))
    table = [[cell.strip() for cell in line[1:-1].split("|")] for line in summary.splitlines() if line[:1] == "|"]
    heading, _, *rows = table
    assert [row[0] for row in rows] == [
        "none",
        "gradiveq",
        *(f"powersgd rank={rank}" for rank in (1, 2, 4)),
        *(f"qsgd bits={bits}" for bits in (2, 4, 8)),
    ]
    assert rows[2][:6] == ["powersgd rank=1", "1", "88.00", "one run", "-3.00", "outside"]
    cells = re.findall(r"<t[dh](?: [^>]*)?>(?:<span[^>]*></span>)?([^<]*)<", page)
    assert [html.unescape(cell) for cell in cells] == [cell for row in (heading, *rows) for cell in row]
    (section,) = summarize(map(report.read, report.find([str(built)])))
    for note in section.notes:
        assert f"- {note}" in summary.replace("\\", "")
        assert f"<li>{note}</li>" in html.unescape(page)


def test_a_last_line_that_was_cut_off_is_an_unfinished_run(tmp_path):
    path = save(tmp_path, lines()) / "0.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-5], encoding="utf-8")
    assert only([report.read(path)]).unfinished == ["none (seed 0): at step 40 of 40; test accuracy 90.00% at step 40."]


def test_files_are_found_once_and_below(tmp_path):
    save(tmp_path / "a" / "b", lines())
    save(tmp_path / "c", lines())
    found = report.find([str(tmp_path), str(tmp_path / "c" / "0.jsonl")])
    assert found == [tmp_path / "a" / "b" / "0.jsonl", tmp_path / "c" / "0.jsonl"]
    assert report.find([str(tmp_path / "c" / ".." / "c" / "0.jsonl"), str(tmp_path / "c")])[1:] == []


# The command


def command(monkeypatch, runs, out_dir):
    monkeypatch.setattr(report.flags, "FLAGS", types.SimpleNamespace(runs=runs, out_dir=str(out_dir)))
    report.main()


def damaged(tmp_path, change):
    content = lines()
    change(content)
    return str(save(tmp_path / "runs", content) / "0.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop(0), "the first line is not of the kind 'run'"),
        (lambda content: content[0].pop("label"), "'label' of a line of kind 'run' is None"),
        (lambda content: content[2].update(loss="low"), "'loss' of a line of kind 'train' is 'low'"),
        (lambda content: content[-1].pop("seconds"), "'seconds' of a line of kind 'end' is None"),
        (lambda content: content.__setitem__(2, [1]), "has no attribute"),
        (lambda content: content[2].update(kind="tset"), "there is a line of kind 'tset'"),
        (lambda content: content.__delitem__(slice(1, -1)), "it has an end, but nothing before it"),
    ],
)
def test_a_file_that_is_not_the_records_of_a_run_is_named(tmp_path, monkeypatch, change, message):
    path = damaged(tmp_path, change)
    with pytest.raises(SystemExit, match=rf"^error: {re.escape(path)} is not the records of a run: .*{message}"):
        command(monkeypatch, [path], tmp_path)
    assert not list(tmp_path.glob("report.*"))


def test_errors_end_in_a_message(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: --runs: there is no /nowhere$"):
        command(monkeypatch, ["/nowhere"], tmp_path)
    with pytest.raises(SystemExit, match=r"^error: --runs: found no \*.jsonl in "):
        command(monkeypatch, [str(tmp_path)], tmp_path)
    (tmp_path / "x.jsonl").write_text('{"kind": "run"}\n{"ki\n{}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^error: .*x.jsonl is not the records of a run: .*line 1 column 2"):
        command(monkeypatch, [str(tmp_path)], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^error: --out_dir=.*File exists"):
        command(monkeypatch, [str(save(tmp_path / "runs", lines()))], tmp_path / "file")


def test_the_command_writes_both_files(tmp_path):
    runs = save(tmp_path / "runs", lines(), lines("qsgd", ratio=2.0))
    argv = [sys.executable, "-m", "experiments.report", f"--runs={runs}", f"--out_dir={tmp_path / 'new' / 'out'}"]
    done = subprocess.run(argv, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name in ("report.html", "report.md"):
        assert str(tmp_path / "new" / "out" / name) in done.stdout
        assert "qsgd" in (tmp_path / "new" / "out" / name).read_text(encoding="utf-8")


def test_the_report_of_the_repository_is_made_from_its_records(tmp_path):
    """Figures but for the drawing, which another version of matplotlib makes otherwise."""
    results = ROOT / "experiments" / "results" / "cifar10"
    report.write([str(results)], tmp_path)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == (results / "report.md").read_text(encoding="utf-8")
    pages = [(folder / "report.html").read_text(encoding="utf-8") for folder in (tmp_path, results)]
    ours, theirs = (re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL) for page in pages)
    assert ours == theirs
    (section,) = summarize(map(report.read, report.find([str(results)])))
    assert not section.warnings
    assert not section.unfinished
    assert [len(row.seeds) for row in section.rows] == [3] + 8 * [1]
