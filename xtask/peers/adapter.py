"""Does PEFT, with an adapter that Bantam trained, compute Bantam's logits?

The base is the same GGUF dequantised to f32 on both sides. Compared are the logits at every position of some test rows,
and those of the base alone, so that an adapter that is not applied cannot pass. Prints one JSON line.
"""
import argparse
import json
import os
import subprocess

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

a = argparse.ArgumentParser()
a.add_argument("--gguf", required=True)
a.add_argument("--adapter", required=True)
a.add_argument("--probe", required=True)
a.add_argument("--rows", required=True, help="JSON lines of text/label")
a.add_argument("--system", required=True)
a.add_argument("--n", type=int, default=12)
a.add_argument("--work", required=True)
a.add_argument("--threads", type=int, default=2)
a = a.parse_args()

torch.set_num_threads(a.threads)
folder, name = os.path.split(a.gguf)
tok = AutoTokenizer.from_pretrained(folder, gguf_file=name)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


def render(row):
    turns = [{"role": "system", "content": a.system}, {"role": "user", "content": row["text"]}]
    return tok.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + row["label"] + "<|im_end|>\n"


rows = [json.loads(line) for line in open(a.rows)][:a.n]
prompts = [tok(render(row), add_special_tokens=False).input_ids for row in rows]
os.makedirs(a.work, exist_ok=True)
asked, told = os.path.join(a.work, "asked.json"), os.path.join(a.work, "told.json")
raw = os.path.join(a.work, "logits.f32")
json.dump({"prompts": prompts}, open(asked, "w"))


def bantam(*adapter):
    subprocess.run([a.probe, "--model", a.gguf, *adapter, "--asked", asked, "--told", told, "--logits", raw,
                    "--threads", str(a.threads)], check=True)
    return torch.from_numpy(np.fromfile(raw, dtype="<f4")).reshape(sum(map(len, prompts)), -1).double()


def torch_logits(m):
    with torch.no_grad():
        return torch.cat([m(input_ids=torch.tensor([p])).logits[0] for p in prompts]).double()


def compare(got, want):
    return {"nmse": ((got - want).square().sum() / want.square().sum()).item(), "max_abs": (got - want).abs().max().item()}


base = torch_logits(model)
result = {"rows": len(prompts), "positions": base.shape[0], "base": compare(bantam(), base)}
adapted = torch_logits(PeftModel.from_pretrained(model, a.adapter).eval())
result["adapter"] = compare(bantam("--adapter", a.adapter), adapted)
result["adapter_moves_logits_by"] = (adapted - base).abs().max().item()
print(json.dumps(result))
