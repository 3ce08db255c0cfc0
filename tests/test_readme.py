"""The Python of flux/README.md runs, in order, and does what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "flux/README.md"


@pytest.mark.slow
def test_examples_of_the_library_run(monkeypatch, capsys):
    from flux import transformer

    monkeypatch.setattr(transformer, "attention", transformer.attention)  # an example replaces it
    text = README.read_text(encoding="utf-8").partition("## How to change things")[2]
    names: dict = {}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(compile(code, f"example {number} of flux/README.md", "exec"), names)
        if "# equals pipe(prompt, guidance=1)[0]" in code:
            assert names["image"] == names["pipe"](names["prompt"], guidance=1)[0]
    taps = capsys.readouterr().out.splitlines()
    assert taps[0].startswith("1 conditional single_blocks.1 attention/q (1, 4, 288, 32)")
    assert {"norms", "both", "frames", "gradient"} <= names.keys() and names["norms"]
