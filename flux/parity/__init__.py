"""Record any tensor of a run by name, compare two runs, and find the first tensor that differs.

    hooks.py         observe the inputs and outputs of modules, and the inside of attention
    capture.py       run the pipeline and record its tensors
    capture_file.py  the file of a capture: a plain .safetensors with a recipe in its header
    compare.py       errors of two tensors; rows of two captures, in the order of execution
    compare_live.py  compare a capture with diffusers, or with any function, run live
    name_map.py      which tensor of diffusers is which of ours
    modules.py       run any module of a pipeline by its name in a capture
    replay.py        run modules on recorded inputs, or the loop from recorded noise and features
    bisect.py        the first step and module that differ, by replay
    tolerances.py    how far rounding alone moves each tensor
    diagnose.py      the known bug behind the first wrong tensor (known_bugs.py, rerun.py)
    report.py        a comparison as one web page
    golden_kit.py    golden tensors to port against; example_port.py, a block in numpy
    reference.py     the networks of diffusers and transformers, with our weights
    table.py         the table of parity measurements

A name is `<where>/<module>/<tap>`: in `step.001/double_blocks.3.img_attn.qkv/out`, the module's
path is the checkpoint's key.
"""
