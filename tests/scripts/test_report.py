"""The report: the README's table, the page and the pictures are what the records make, and claim nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import figures, fit, fit_passes, harness, page, plots, records, report
from benchmarks.device import ROOT, DryDevice

README = ROOT / "README.md"
FACTS = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-01-02", "commit": "abc"}


def record(folder: Path, file: str, **document: object) -> Path:
    harness.write(folder / file, {"facts": FACTS, **document})
    return folder.parent


def step(rate: float, speedup: float = 1.0, peak: int = 2**30) -> dict[str, float]:
    return {"images_per_s": rate, "us": 256e6 / rate, "speedup": speedup, "peak_bytes": peak, "spread": 0.01}


class TestTheRepository:
    def test_the_readme_s_table_is_what_the_records_make(self) -> None:
        text = README.read_text()
        assert figures.updated(text, records.steps()) == text, "run scripts/report"

    def test_the_page_is_what_the_records_make(self) -> None:
        written = ROOT / "docs" / "measured.md"
        drawn = {path.stem for path in written.with_suffix("").glob("*.svg")}
        assert written.read_text() == page.page(pictures=drawn), "run scripts/report"
        assert drawn == set(page.PICTURES)

    def test_the_readme_claims_nothing_that_no_record_holds(self) -> None:
        assert figures.unheld(README.read_text()) == []


class TestClaims:
    @pytest.mark.parametrize(
        ("text", "claim"),
        [
            ("up to 2.7x faster", "2.7x"),
            ("2.7 × eager", "2.7 ×"),
            ("3 times as fast", "3 times"),
            ("8,123 images/s", "8,123 images/s"),
            ("8.1k img/s", "8.1k img/s"),
            ("8123 images per second", "8123 images per second"),
            ("| 8,123 | 9 |", "8,123"),
            ("a step of 21.5 ms", "21.5 ms"),
            ("in 17 µs", "17 µs"),
            ("needs 4.4 GiB", "4.4 GiB"),
            ("71 % of the time", "71 %"),
            ("copies at 3.9 TB/s", "3.9 TB/s"),
            ("products at 650 TFLOP/s", "650 TFLOP/s"),
            ("9999 images a second", "9999 images a second"),
            ("9999 imgs/s", "9999 imgs/s"),
            ("9_999 samples per second", "9_999 samples per second"),
            ("1e5 images/sec", "1e5 images/sec"),
            ("about 9999/s", "9999/s"),
            ("9999 fps", "9999 fps"),
            ("3.2-fold", "3.2-fold"),
            ("by a factor of 3.2", "3.2"),
            ("a speed-up of 3.2 over eager", "3.2"),
            ("**3.2**×", "3.2×"),
            ("`3.2`x", "3.2x"),
            ("1.7-3.2x", "3.2x"),
            ("-71 %", "71 %"),
            ("71 percent", "71 percent"),
            ("12 ns", "12 ns"),
            ("0.5 s a step", "0.5 s"),
            ("in 15 minutes", "15 minutes"),
            ("41 gigabytes", "41 gigabytes"),
            ("5500 GB/s", "5500 GB/s"),
            ("1.5 PFLOP/s", "1.5 PFLOP/s"),
            ("Twice as fast as eager", "Twice as fast"),
            ("takes half the memory", "half the memory"),
            ("it doubles the throughput", "doubles the throughput"),
        ],
    )
    def test_what_was_not_measured_is_refused(self, text: str, claim: str) -> None:
        assert figures.unheld(text) == [claim]

    @pytest.mark.parametrize("text", ["1×1 and 3x3", "7×7/2", "sm_90", "PyTorch 2.11", "batch 256", "ResNet-50", "224²",
                                      "four times narrower", "Python 3.10", "2026-11-23", "(256, 3, 224, 224)",
                                      "a factor 2x2", "half the channels", "bfloat16 s"])  # fmt: skip
    def test_what_claims_no_speed_is_let_through(self, text: str) -> None:
        assert figures.claims(text) == []

    def test_what_a_record_holds_may_be_said_as_it_is_rounded(self, tmp_path: Path) -> None:
        candidates = {"eager": step(4000.0, peak=4 * 2**30), "ours": step(7748.7, 1.937)}
        folder = record(tmp_path / "one", "step.json", results={"resnet50": {"batch": 256, "candidates": candidates}})
        held = "7,749 images/s, 7.7k img/s, 1.94x, 1.9 ×, 94 %, 33.0 ms, 1.0 GiB, 25 % of 4.0 GiB, a board of 80 GB"
        assert figures.unheld(held, folder) == []
        assert figures.unheld("7,750 images/s, 2.0x, 7.8k img/s, 33.1 ms", folder) == [
            "7,750 images/s", "2.0x", "7.8k img/s", "33.1 ms"]  # fmt: skip


class TestWhatIsMade:
    def test_without_a_record_nothing_is_claimed(self, tmp_path: Path) -> None:
        assert figures.NOT_YET in figures.table([]) and figures.claims(figures.table([])) == []
        text = page.page(tmp_path)
        assert text.count("Not measured yet.") == 3 and figures.claims(text) == []

    def test_the_newest_of_each_candidate_counts(self, tmp_path: Path) -> None:
        for name, date, rate in (("new", "2026-02-01", 5000.0), ("old", "2026-01-01", 4000.0)):
            candidates = {"eager": step(rate), "ours": step(2 * rate, 2.0)}
            results = {"resnet50": {"batch": 256, "candidates": candidates}, "resnet18": {"error": "it failed"}}
            record(tmp_path / name, "step.json", results=results, facts={**FACTS, "date": date})
        wrong = {"resnet50": {"batch": 256, "ok": False, "candidates": {"ours": step(99_999.0)}}}
        record(tmp_path / "wrong", "step.json", results=wrong, facts={**FACTS, "date": "2026-03-01"})
        table = figures.table(records.steps(tmp_path))
        assert "| H100 | ResNet-50, 256 | 5,000 (1.0 GiB) |" in table and "**10,000** (1.0 GiB)" in table
        assert "4,000" not in table and "99,999" not in table and figures.NOT_YET in table

    def test_a_rehearsal_and_a_damaged_file_are_no_records(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        results = {"resnet50": {"batch": 256, "candidates": {"eager": step(9_999.0)}}}
        folder = record(tmp_path / "records" / "dry", "step.json", results=results, facts=DryDevice().facts())
        record(folder / "odd", "step.json", results=3)
        (folder / "odd" / "kernels.json").write_text("{")
        (folder / "odd" / "tuned.json").write_text("[]")
        assert records.steps(folder) == [] and fit.measured(folder) == [] == fit_passes.measured_passes(folder)
        (tmp_path / "README.md").write_text(f"{figures.BEGIN}\n{figures.END}\n")
        arguments = ["--records", str(folder), "--root", str(tmp_path), "--no-pictures"]
        assert report.main(arguments) == 0
        said = capsys.readouterr().out
        for file, reason in (("dry/step", " a rehearsal's"), ("odd/step", " damaged: its results"), ("odd/kernels", ""),
                             ("odd/tuned", " damaged\n")):  # fmt: skip
            assert f"{file}.json is{reason}" in said
        assert "9,999" not in (tmp_path / "README.md").read_text()
        with pytest.raises(SystemExit, match="no results in"):
            report.report(folder / "odd")

    def test_the_suite_s_json_is_a_record_too(self, tmp_path: Path) -> None:
        info = {"gpu": FACTS["gpu"], "candidate": "ours", "images_per_s": 900.0, "device_us": 284e3, "speedup": 1.5}
        runs = [{"group": "step: resnet34, batch 128", "extra_info": info}, {"group": "kernel: x", "extra_info": info}]
        (found,) = records.steps(record(tmp_path / "suite", "suite.json", benchmarks=runs))
        assert (found.where, found.candidate) == (("h100", "resnet34", 128, "bfloat16"), "ours")
        assert found.beside == pytest.approx(600.0)

    def test_the_readme_keeps_all_but_its_table(self) -> None:
        text = f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n"
        assert figures.updated(text, []) == f"before\n{figures.BEGIN}\n{figures.table([])}\n{figures.END}\nafter\n"
        with pytest.raises(ValueError, match="measured:begin"):
            figures.updated("no table here", [])

    def test_the_command_writes_once_and_names_a_claim(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        results = {"resnet50": {"batch": 256, "candidates": {"eager": step(4000.0), "ours": step(8000.0, 2.0)}}}
        folder = record(tmp_path / "records" / "one", "step.json", results=results)
        (tmp_path / "README.md").write_text(f"{figures.BEGIN}{figures.END}\n")
        command = ["--records", str(folder), "--root", str(tmp_path), "--no-pictures"]
        assert report.main(command) == 0 and "measured.md" in capsys.readouterr().out
        assert report.main(command) == 0 and "are what the records make" in capsys.readouterr().out
        with (tmp_path / "README.md").open("a") as file:
            file.write("and 3x as fast\n")
        assert report.main(command) == 1 and "no record holds: 3x" in capsys.readouterr().out

    def test_the_pictures(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        assert plots.draw(records.FOLDER, tmp_path / "drawn") == set(page.PICTURES)
        assert plots.draw(tmp_path, tmp_path / "nothing") == set()

    def test_kernels_of_others_go_by_what_they_do(self) -> None:
        rows = [("sm90_xmma_fprop", 2, 5.0), ("cutlass_80", 1, 1.0), ("gram_kernel", 3, 9.0), ("at::native::x", 1, 0.5)]
        profile = {"rows": [{"kernel": name, "calls": calls, "us": us} for name, calls, us in rows]}
        assert list(page.shares(profile).items())[:2] == [
            ("`gram_kernel`", (3, 9.0)), ("the vendor's convolutions and products", (3, 6.0))]  # fmt: skip


class TestOneFolder:
    def test_a_report_of_what_was_measured(self, tmp_path: Path) -> None:
        timing = {"us": 100.0, "spread": 0.01, "images_per_s": 2560.0, "speedup": 1.5, "peak_bytes": 2**30}
        verdict = {"ours": {"us": 30.0}, "floor_us": 10.0, "ratio": 3.0, "vendor": {"us": 9.0}, "passes_us": 4.0}
        harness.write(tmp_path / "step.json", {"facts": {"gpu": "a GPU"}, "results": {
            "resnet50": {"candidates": {"ours": timing}}, "resnet18": {"error": "it failed"},
        }})  # fmt: skip
        harness.write(tmp_path / "kernels.json", {"results": {"good": verdict, "bad": {"checks": {}, "ok": False}}})
        harness.write(tmp_path / "facts.json", {"results": {}, "ceilings": {"bytes_per_s": 3e12, "flops_per_s": 8e14}})
        heats = {"a": 9.0, "b": 8.0, "c": 7.0}
        passes = {"bn_act 7px 512": {"rule": "a", "heats_us": heats, "wrong": {"c": {}}}}
        harness.write(tmp_path / "tuned.json", {"results": passes})
        text = report.report(tmp_path)
        assert "| bn_act 7px 512 | 9.0 | 8.0 | `b` |" in text
        assert "| resnet50 | ours | 2,560 | 1.50 x | 1.0 | 1.0 % |" in text
        assert "| good | 30 | 10 | 3.00 (!) | 9 + 4 |" in text and "| bad | wrong |" in text
        assert "3.00 TB/s" in text
        with pytest.raises(SystemExit, match="no results"):
            report.report(tmp_path / "nowhere")

    @pytest.mark.parametrize("folder", sorted((ROOT / "benchmarks" / "records").glob("*/")), ids=lambda path: path.name)
    def test_every_record_makes_a_report(self, folder: Path) -> None:
        assert report.report(folder).startswith("gpu ")
