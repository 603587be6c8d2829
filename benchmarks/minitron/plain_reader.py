"""Reads a child and what it should compute, with torch, transformers and safetensors alone; prints what it found.

`plain_transformers` runs it in an environment in which Nestling is not installed.

    python plain_reader.py FOLDER EXPECTED.safetensors
"""

import importlib.metadata
import importlib.util
import json
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, expected = sys.argv[1], load_file(sys.argv[2])
assert importlib.util.find_spec("nestling") is None, "Nestling can be imported here"
child, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
ids, count = expected["ids"], expected["generated"].shape[1] - expected["ids"].shape[1]
with torch.no_grad():
    logits = child.eval()(ids).logits
    written = [
        child.generate(ids, max_new_tokens=count, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
config = child.config.to_dict()
found = {
    "class": type(child).__name__,
    "params": child.num_parameters(),
    "left_over": sorted(str(key) for kind in info.values() for key in kind),
    "largest_difference": (logits - expected["logits"]).abs().max().item(),
    "largest_logit": expected["logits"].abs().max().item(),
    "tokens_equal": all(torch.equal(one, expected["generated"]) for one in written),
    "chat_template": AutoTokenizer.from_pretrained(folder).chat_template is not None,
    "foreign_fields": [name for name in config if name.startswith(("nestling", "layer_shapes", "auto_map"))],
    "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
}
print(json.dumps(found))
