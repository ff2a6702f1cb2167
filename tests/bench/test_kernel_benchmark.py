"""`qsparse bench kernels` from checks to CSV, figure and page, with real timing of small cases on this machine."""

import io
import subprocess
import sys
from functools import partial

import pytest
import torch
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from rich.console import Console

from kernels.dispatch import ReferenceKernels
from pipeline.bench.kernels.__main__ import SECTIONS, draw, load_section, main, run
from pipeline.bench.kernels.case import COLUMNS, Check, Contest, Options
from pipeline.bench.kernels.decode import _draw_map
from pipeline.bench.kernels.layer import LayerCase
from pipeline.bench.kernels.memory import saved_bytes
from pipeline.bench.kernels.sparsify import SECTION, SparsifyCase
from pipeline.bench.kernels.timing import measure, runnable
from pipeline.bench.results import extend_csv, read_csv, update_page, write_csv
from tests.testing import ROOT

CPU = Options(device="cpu", quick=True)


def without_one(x, kept, block):
    return ReferenceKernels().sparsify(x, None if kept is None else kept - 1, block)


def section(*functions):
    """The sparsify section with small cases of these functions."""
    cases = {
        f"D={32 * (number + 1)}": partial(SparsifyCase, 4, 32 * (number + 1), "cpu", function=function)
        for number, function in enumerate(functions)
    }
    return SECTION._replace(cases=lambda options: cases)


def run_to_text(tmp_path, *functions, wanted=""):
    stream = io.StringIO()
    code = run({"sparsify": section(*functions)}, CPU, tmp_path / "out", Console(file=stream), wanted, "c0ffee")
    return code, stream.getvalue()


def test_green_section_is_written(tmp_path):
    page = tmp_path / "out.md"
    page.write_text("# Title\n<!-- bench: sparsify -->\nold\n<!-- end -->\nafter\n")
    code, text = run_to_text(tmp_path, ReferenceKernels().sparsify)
    assert code == 0
    assert "8 of 8 checks passed" in text
    head, rows = read_csv(tmp_path / "out" / "sparsify.csv")
    assert "commit c0ffee" in head
    assert "torch" in head[1]
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 4 * 3  # patterns x (ours, eager, copy)
    for row in rows:
        assert 0 < float(row["q25_us"]) <= float(row["median_us"]) <= float(row["q75_us"])
        copy = next(r for r in rows if (r["operation"], r["variant"]) == (row["operation"], "copy"))
        eager = next(r for r in rows if (r["operation"], r["variant"]) == (row["operation"], "torch eager"))
        assert row["floor_us"] == copy["median_us"]
        assert float(row["speedup"]) == pytest.approx(
            float(eager["median_us"]) / float(row["median_us"]), abs=0.02, rel=0.02
        )
    assert (tmp_path / "out" / "sparsify.png").stat().st_size > 10_000
    written = page.read_text()
    assert written.startswith("# Title\n")
    assert written.endswith("<!-- end -->\nafter\n")
    assert "old" not in written
    assert "| D=32 | top-k 50% |" in written
    assert "c0ffee" in written


def test_red_section_has_no_speed(tmp_path):
    """One wrong case is enough: nothing is timed, not even the right one."""
    code, text = run_to_text(tmp_path, ReferenceKernels().sparsify, without_one)
    assert code == 1
    assert "wrong: D=64: codes, top-k 50%" in text
    assert " us " not in text
    assert not (tmp_path / "out").exists()


def test_kernel_that_raises_is_red(tmp_path):
    def broken(x, kept, block):
        raise RuntimeError("no such instruction")

    code, text = run_to_text(tmp_path, broken)
    assert code == 1
    assert "no such instruction" in text


def test_only_cases_that_are_wanted(tmp_path):
    code, text = run_to_text(tmp_path, without_one, ReferenceKernels().sparsify, wanted="D=64")
    assert code == 0
    assert "D=32" not in text


class BreaksOff:
    """Right, but its second contest cannot be timed."""

    def checks(self):
        yield Check("fine", 0.0, 0.0)

    def contests(self, rates):
        yield Contest("first", {"ours": lambda: None})
        yield Contest("second", {"ours": lambda: [][0]})


def test_what_was_measured_before_an_error_is_kept(tmp_path):
    broken = SECTION._replace(cases=lambda options: {"case": BreaksOff})
    stream = io.StringIO()
    assert run({"x": broken}, CPU, tmp_path, Console(file=stream)) == 1
    assert "timing broke off: IndexError" in stream.getvalue()
    assert [row["operation"] for row in read_csv(tmp_path / "x.csv").rows] == ["first"]


def test_cases_beyond_the_time_are_left_out(tmp_path):
    stream = io.StringIO()
    sections = {"sparsify": section(ReferenceKernels().sparsify, ReferenceKernels().sparsify)}
    assert run(sections, CPU._replace(seconds=0.0), tmp_path, Console(file=stream)) == 0
    assert "D=64 is left out: 0 seconds are over" in stream.getvalue()
    assert "8 of 8 checks passed" in stream.getvalue()
    assert not (tmp_path / "sparsify.csv").exists()


def test_kernels_are_compiled_before_the_checks(tmp_path):
    compiled = []

    def fails():
        raise RuntimeError("will be told by the checks")

    one = section(ReferenceKernels().sparsify)
    early = one._replace(compile=lambda options, wanted: [fails, partial(compiled.append, wanted)])
    assert run({"sparsify": early}, CPU, tmp_path, Console(file=io.StringIO()), "D=32") == 0
    assert compiled == ["D=32"]


def test_break_even_map_marks_where_dense_wins(tmp_path):
    """Speed-ups from 0.5 to 4 on a map of 2 x 3 cells: the line at 1 crosses it."""
    rows = [
        {"case": f"64 -> 32, T={T}", "operation": f"{zeros}% zeros", "variant": variant, "speedup": str(zeros / 50 / T)}
        for T in (1, 2)
        for zeros in (50, 80, 90)
        for variant in ("ternary gemv", "ternary dot", "bf16 gemv")
    ]
    panel = Figure().subplots()
    image = _draw_map(panel, [row for row in rows if row["variant"] == "bf16 gemv"])
    assert image.get_array().tolist() == [[1.0, 1.6, 1.8], [0.5, 0.8, 0.9]]
    assert [text.get_text() for text in panel.texts] == ["1.00x", "1.60x", "1.80x", "0.50x", "0.80x", "0.90x"]
    (contour,) = [one for one in panel.collections if isinstance(one, ContourSet)]
    assert contour.levels.tolist() == [1.0]
    load_section("decode").draw(rows, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_variants_take_turns():
    order = []
    variants = {name: partial(order.append, name) for name in ("a", "b")}
    variants["two operands"] = [partial(order.append, "c1"), partial(order.append, "c2")]
    timings = measure(variants, rounds=3, fill_us=0.001)
    assert order[-4 * 4 :] == ["a", "b", "c1", "c2"] * 4  # the first round warms up
    assert set(timings) == set(variants)
    assert all(0 < timing.low <= timing.median <= timing.high for timing in timings.values())


def test_what_does_not_run_is_named():
    def needs_more():
        raise RuntimeError("needs sm_100\nand more")

    found, absent = runnable({"there": lambda: None, "not there": needs_more})
    assert list(found) == ["there"]
    assert absent == {"not there": "RuntimeError: needs sm_100"}


def test_csv_keeps_what_was_written(tmp_path):
    write_csv(tmp_path / "a" / "b.csv", ["here", "now"], ("x", "y"), [{"x": 1, "y": "a,b"}, {"x": 2, "y": ""}])
    assert read_csv(tmp_path / "a" / "b.csv") == (["here", "now"], [{"x": "1", "y": "a,b"}, {"x": "2", "y": ""}])
    with pytest.raises(ValueError, match="z"):
        write_csv(tmp_path / "b.csv", [], ("x",), [{"x": 1, "z": 2}])


def test_rows_of_the_same_machine_and_commit_stay(tmp_path):
    path, columns = tmp_path / "a.csv", ("case", "us")

    def extend(head, case, time):
        extend_csv(path, [head], columns, [{"case": case, "us": time}], keys=("case",))
        return [(row["case"], row["us"]) for row in read_csv(path).rows]

    assert extend("H100, commit 1", "a", 1) == [("a", "1")]
    assert extend("H100, commit 1", "b", 2) == [("a", "1"), ("b", "2")]
    assert extend("H100, commit 1", "a", 3) == [("b", "2"), ("a", "3")]
    assert extend("H100, commit 2", "c", 4) == [("c", "4")]


def test_page_without_the_place_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n")
    assert update_page(page, {"layer": "table"}) == ["layer"]
    assert page.read_text() == "text\n"


def test_draws_from_files_alone(tmp_path):
    run_to_text(tmp_path, ReferenceKernels().sparsify)
    picture = tmp_path / "out" / "sparsify.png"
    picture.unlink()
    assert (
        draw({"sparsify": SECTION, "layer": load_section("layer")}, tmp_path / "out", Console(file=io.StringIO())) == 0
    )
    assert picture.is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_says_that_it_needs_a_gpu():
    command = [sys.executable, "-m", "launch", "bench", "kernels", "--only", "sparsify"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "needs a CUDA GPU" in result.stderr


@pytest.mark.parametrize("name", SECTIONS)
def test_the_docs_have_a_place_for_each_section(name):
    assert f"<!-- bench: {name} -->" in (ROOT / "docs" / "performance.md").read_text()


def test_saved_bytes_of_a_layer():
    """Per token: 2 D bytes dense or naive (with a copy of the weight), D int8 codes and a float32 scale here."""
    D, outputs, T = 64, 48, 32
    case = LayerCase(D, outputs, T, "cpu")
    found = {name: saved_bytes(layer, case.x) for name, layer in case.layers().items()}
    assert found["dense bf16"] == (2 * D * T, 0)
    assert found["naive"] == (2 * D * T, 2 * D * outputs)
    assert found["ours exact"] == found["ours fast"] == ((D + 4) * T, 0)


def test_unknown_section_is_named(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--only", "sparsify,layers"])
    assert exit_info.value.code == 2
    assert "--only layers: expected some of sparsify, ternarize" in capsys.readouterr().err
