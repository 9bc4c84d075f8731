"""Boundless DAS is a folder that can be removed: nothing else in the package needs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import actscale_fast

PACKAGE = Path(actscale_fast.__file__).parent
CODE = """
import sys
import actscale_fast as af, tiny
import actscale_fast.cli.commands, actscale_fast.cli.output, actscale_fast.cli.record
from fit_cases import conflicts
model, tokenizer = tiny.llama(), tiny.tokenizer()
examples = conflicts(4)
scalars = af.ActivScalar.for_model(model)
af.fit(model, tokenizer, examples, scalars, steps=2, batch_size=4, progress=False)
found = af.evaluate(model, tokenizer, examples, scalars)
with af.patch(model, scalars), af.use_backend("auto"):
    model(**tokenizer(examples[0].prompt, return_tensors="pt"))
scalars.save_pretrained("saved")
assert (af.load_intervention("saved").alpha == scalars.alpha).all()
assert not any("das" in name.split(".") for name in sys.modules)
print(af.__file__, found.n_examples)
"""


def test_without_the_folder_everything_else_works(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "actscale_fast", ignore=shutil.ignore_patterns("das", "__pycache__"))
    helpers = Path(__file__).resolve().parent.parent / "helpers"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, helpers)))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.split() == [str(tmp_path / "actscale_fast" / "__init__.py"), "4"], done.stderr
