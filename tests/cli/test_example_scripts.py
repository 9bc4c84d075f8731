"""The scripts in examples/ that call the command line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from actscale_fast.cli.parser import build_parser

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("job", ["", "7"])
def test_the_jobs_of_a_slurm_array_get_their_shares(job: str, tmp_path: Path) -> None:
    for name in ("actscale-fast", "srun"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_JOB_ID": job}
    said = subprocess.run(
        [EXAMPLES / "sweep_with_slurm.sh", "shared"], text=True, capture_output=True, check=True,
        env=os.environ | given | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    words = said.stdout.split()
    assert (words[0] == "srun") is bool(job)
    options = build_parser().parse_args(words[words.index("actscale-fast") + 1 :])
    assert (options.points, options.out) == ("2/4", "shared")
