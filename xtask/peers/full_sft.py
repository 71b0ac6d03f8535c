"""Supervised fine-tuning of every weight with plain PyTorch and transformers: the opponent of `--method full`.

Weights, gradients and moments in bf16, the fused AdamW, batches of like length, dynamic padding. Rows are JSONL of
`text` and `label`; the label and the end of the turn are trained. One JSON line on stdout.
"""
import argparse
import json
import math
import random
import resource
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--base", required=True, help="Hugging Face folder")
parser.add_argument("--train", required=True)
parser.add_argument("--system", required=True)
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--max-steps", type=int, required=True)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--dtype", default="bfloat16")
args = parser.parse_args()

torch.manual_seed(0)
random.seed(0)
torch.set_num_threads(args.threads)
tokenizer = AutoTokenizer.from_pretrained(args.base)
model = AutoModelForCausalLM.from_pretrained(args.base, dtype=getattr(torch, args.dtype), attn_implementation="sdpa")


def ids(text):
    return tokenizer(text, add_special_tokens=False).input_ids


def row(line):
    line = json.loads(line)
    turns = [{"role": "system", "content": args.system}, {"role": "user", "content": line["text"]}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return ids(prompt), ids(line["label"] + "<|im_end|>\n")


rows = [row(line) for line in open(args.train)]
random.shuffle(rows)
batches = []
for first in range(0, len(rows), args.batch * 32):
    pool = sorted(rows[first:first + args.batch * 32], key=lambda pair: len(pair[0]) + len(pair[1]))
    batches += [pool[i:i + args.batch] for i in range(0, len(pool), args.batch)]
random.shuffle(batches)
batches = batches[:args.max_steps]

optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
model.train()
tokens = n_rows = 0
start = time.time()
for step, batch in enumerate(batches):
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    inputs = torch.full((len(batch), width), tokenizer.pad_token_id)
    labels, mask = torch.full_like(inputs, -100), torch.zeros_like(inputs)
    for i, (prompt, answer) in enumerate(batch):
        n = len(prompt) + len(answer)
        inputs[i, :n], mask[i, :n] = torch.tensor(prompt + answer), 1
        labels[i, len(prompt):n] = torch.tensor(answer)
        tokens, n_rows = tokens + n, n_rows + 1
    optimizer.zero_grad()
    loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
seconds = time.time() - start
print(json.dumps({
    "rows": n_rows, "tokens": tokens, "train_s": round(seconds, 1), "tok_per_s": round(tokens / seconds, 1),
    "rows_per_s": round(n_rows / seconds, 2), "last_loss": round(loss.item(), 4),
    "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
}))
