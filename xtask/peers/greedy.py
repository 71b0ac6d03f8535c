"""Is every token Bantam takes greedily the one transformers would take?

Both see the same dequantised weights in f32. The probe continues each prompt by itself; transformers then reads prompt
and continuation and must find each of those tokens on top, given the ones before it. A token that is not on top but
within `--tie` of the top logit is a tie, and counted. With no ties, by induction, the two outputs are equal.
Prints one JSON line.
"""
import argparse
import json
import os
import subprocess

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    "What is the capital of France?", "Write a haiku about rain.", "Explain gravity to a child.", "List three uses of salt.",
    "Translate 'good morning' to Spanish.", "Why is the sky blue?", "Give me a recipe for pancakes.", "What is 17 times 23?",
    "Who wrote Hamlet?", "Name the planets in order.", "Write a Python function that reverses a string.",
    "Summarise the plot of Cinderella.", "What does HTTP stand for?", "How do bees make honey?", "Tell me a joke about cats.",
    "What causes tides?", "Write a polite email declining a meeting.", "Compare tea and coffee.", "Define photosynthesis.",
    "Où est la bibliothèque ? 你好 🙂",
]

a = argparse.ArgumentParser()
a.add_argument("--gguf", required=True)
a.add_argument("--probe", required=True)
a.add_argument("--work", required=True, help="folder for the files in between")
a.add_argument("--tokens", type=int, default=64)
a.add_argument("--tie", type=float, default=1e-4)
a.add_argument("--threads", type=int, default=2)
a = a.parse_args()

torch.set_num_threads(a.threads)
folder, name = os.path.split(a.gguf)
tok = AutoTokenizer.from_pretrained(folder, gguf_file=name)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
render = lambda q: tok.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
prompts = [tok(render(q), add_special_tokens=False).input_ids for q in QUESTIONS]

os.makedirs(a.work, exist_ok=True)
asked, told = os.path.join(a.work, "asked.json"), os.path.join(a.work, "told.json")
json.dump({"prompts": prompts, "generate": a.tokens}, open(asked, "w"))
subprocess.run([a.probe, "--model", a.gguf, "--asked", asked, "--told", told, "--threads", str(a.threads)], check=True)
outputs = json.load(open(told))["tokens"]

same = ties = wrong = 0
worst_gap, first_wrong = 0.0, None
with torch.no_grad():
    for index, (prompt, output) in enumerate(zip(prompts, outputs)):
        assert len(output) == a.tokens, f"prompt {index}: {len(output)} tokens"
        logits = model(input_ids=torch.tensor([prompt + output])).logits[0, len(prompt) - 1:-1]
        gaps = logits.max(-1).values - logits[torch.arange(a.tokens), torch.tensor(output)]
        for at, gap in enumerate(gaps.tolist()):
            same, ties, wrong = same + (gap == 0), ties + (0 < gap <= a.tie), wrong + (not gap <= a.tie)
            worst_gap = max(worst_gap, gap)
            if not gap <= a.tie and first_wrong is None:
                first_wrong = {"prompt": index, "at": at, "gap": gap, "took": output[at], "top": logits[at].argmax().item()}
print(json.dumps({"prompts": len(prompts), "tokens": same + ties + wrong, "same": same, "ties": ties, "wrong": wrong,
                  "worst_gap": worst_gap, "first_wrong": first_wrong}))
