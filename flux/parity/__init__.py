"""The yardstick: record any tensor of a run by name, compare two runs, and find the first tensor that differs.

    taps.py      sees every module's inputs and outputs, and inside attention, while networks run
    record.py    the file: tensors, or what stands for them, in a plain .safetensors with the recipe in its header
    capture.py   runs the pipeline and records
    compare.py   two tensors -> errors; two captures -> rows, in the order of execution
    modules.py   any network or module of a pipeline, called by the name that it has in a capture
    replay.py    recorded inputs into one module, or recorded noise and features into the whole loop
    against.py   a live run of diffusers, or of any function, judged by a capture (counterparts.py: whose tensor is whose)
    bisect.py    the first step and module that depart, by replay
    budgets.py   what rounding alone does to each tensor
    doctor.py    which known mistake the first tensor that differs comes from (mistakes.py, case.py)
    report.py    a comparison as one page (page.py, charts.py, plots.py)
    kit.py       golden tensors to port against, and consumer.py, a port of one block in numpy

A name is `<where>/<module>/<tap>`: `step.001/double_blocks.3.img_attn.qkv/out`, where the module is the checkpoint's key.
"""
