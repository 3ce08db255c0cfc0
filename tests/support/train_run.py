"""Run scripts/train.py in this process, and compare what runs wrote."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.load_script import script

from flux.training import memory

Train = Callable[..., tuple[int, str, str]]


def train_script(cache: Path, monkeypatch, capsys) -> Train:
    """Return train(*flags) -> exit code, last line of the output, standard error.

    To save time, no charts are drawn, and the memory is not estimated.
    """
    module = script("train")
    monkeypatch.setattr(module, "can_plot", lambda: False)
    monkeypatch.setattr(
        "modules.training_options.estimate_memory", lambda *_, **__: memory.TrainingMemory(0, 0, 0)
    )

    def run(*flags) -> tuple[int, str, str]:
        argv = ["train.py", "--device", "cpu", "--cache", cache, *flags]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        code = module.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.strip(), err

    run.module = module  # type: ignore[attr-defined]
    return run


def equal_files(a: Path, b: Path) -> bool:
    tensors, others = load_file(a), load_file(b)
    if tensors.keys() != others.keys():
        return False
    return all(torch.equal(tensors[name], others[name]) for name in tensors)
