"""Weight files: find, check and load them.

files.py            the folder, the Hugging Face cache, the download; headers; shards
locate.py           a row of the table of models, and the files that it needs
load.py             the tensors of files into a module; `infer_config`
diffusers_names.py  our layer names and diffusers' layer names
quantization/       Linears that stay quantized in memory: FP8, NVFP4, NF4, GGUF, int8, int4
"""

from flux.weights.load import infer_config

__all__ = ["infer_config"]
