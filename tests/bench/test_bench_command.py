"""`unbackdoor bench FILE`: plan, a part, the rest, thresholds and mistakes, on the small grid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bench.helpers import Plan
from unbackdoor.cli.main import main


def test_a_part_is_run_then_the_rest_and_the_plan_knows(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "mine.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(plan()))

    def bench(*more: str) -> tuple[int, str]:
        status = main(["bench", str(file), "--out", str(out), "--quiet", *more])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    status, said = bench("--dry-run", "--json")
    planned = json.loads(said)
    assert (status, len(planned["cells"]), out.exists()) == (0, 4, False)
    assert not any(cell["measured_before"] for cell in planned["cells"])
    status, said = bench("--only", "*/tune/*", "--only", "untouched")
    assert (status, len(list((out / "cells").iterdir()))) == (0, 2)
    assert "2 cells measured, 0 failed, 2 left." in said
    later = json.loads(bench("--dry-run", "--json")[1])
    assert sum(cell["measured_before"] for cell in later["cells"]) == 2
    wanted = sum(cell["seconds"] for cell in later["cells"] if not cell["measured_before"])
    assert later["seconds"] == pytest.approx(wanted)
    assert "not counted" in bench("--dry-run")[1]
    status, said = bench("--only", "tunning")
    assert status == 2
    assert "no cell's name holds 'tunning'" in said
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert bench("--fail-on", "asr<=1")[0] == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list((out / "cells").iterdir())) == 4
    assert bench("--fail-on", "asr>1")[0] == 0


def test_a_grid_is_not_run_in_the_folder_of_its_own_file(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine" / "grid.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(plan()) + "# by hand\n")
    assert main(["bench", str(file), "--out", str(file.parent), "--quiet"]) == 2
    assert "lies in the grid's folder" in capsys.readouterr().err
    assert file.read_text().endswith("# by hand\n")
    assert list(file.parent.iterdir()) == [file]


def test_a_plan_reads_what_the_grid_will_read(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "mine.yaml", tmp_path / "out"
    for wrong, words in (
        ({"second_source": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"models": [str(tmp_path)]}, "holds no config.json"),
    ):
        file.write_text(yaml.safe_dump(plan(**wrong)))
        for more in ((), ("--dry-run",)):
            assert main(["bench", str(file), "--out", str(out), "--quiet", *more]) == 2
            assert words in capsys.readouterr().err
    file.write_text(yaml.safe_dump(plan()))
    for more in ((), ("--dry-run",)):
        assert main(["bench", str(file), "--out", str(out), "--quiet", "--device", "cpuu", *more]) == 2
        assert "there is no device 'cpuu'" in capsys.readouterr().err
    assert main(["bench", str(file), "--out", str(out), "--fail-on", "resistance>1"]) == 2
    assert "will not be measured here" in capsys.readouterr().err
    assert not out.exists()


def test_a_failed_cell_is_exit_code_2_and_names_the_reason(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = plan(defenses={})
    data["attacks"]["default"]["settings"]["train"]["max_length"] = 8
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(data))
    assert main(["bench", str(tmp_path / "short.yaml"), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "max_length" in capsys.readouterr().out
