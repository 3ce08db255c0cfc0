"""The yardstick: record any tensor of a run by name, compare two runs, and find the first tensor that differs.

    taps.py      sees every module's inputs and outputs, and inside attention, while networks run
    record.py    the file: tensors, or what stands for them, in a plain .safetensors with the recipe in its header
    capture.py   runs the pipeline and records
    compare.py   two tensors -> errors; two captures -> rows, in the order of execution

A name is `<where>/<module>/<tap>`: `step.001/double_blocks.3.img_attn.qkv/out`, where the module is the checkpoint's key.
"""
