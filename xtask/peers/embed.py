"""Are Bantam's vectors those of transformers?

`--write` puts texts into a file as JSON lines: the awkward strings of the WordPiece golden, and sentences of every
length up to what the encoder reads. Without it, Bantam's vectors of that file are set beside the mean-pooled,
normalised rows of transformers' model in f32, with the same folder's tokenizer (which reads special tokens in a text
as characters and cuts nothing off). Prints one JSON line.
"""
import argparse
import json
import time

ORDINARY = [
    "Where is my card?", "I still have not received my new card, I ordered over a week ago.", "How do I top up by bank transfer?",
    "The exchange rate you applied to my cash withdrawal is wrong.", "Embeddings map sentences to points in a space.",
    "Der Zug nach München fährt um halb neun vom Gleis sieben ab.", "東京は日本の首都です。", "Le café est fermé le dimanche matin.",
]

a = argparse.ArgumentParser()
a.add_argument("--write")
a.add_argument("--golden", required=True, help="wordpiece.json of the tokenizer's tests")
a.add_argument("--folder", help="the encoder as Hugging Face lays it out")
a.add_argument("--vectors", help="what `bantam embed` wrote")
a.add_argument("--threads", type=int, default=2)
a = a.parse_args()

texts = [t for t in json.load(open(a.golden))["awkward"] if len(t) < 240]
texts += [" ".join(ORDINARY[(i + j) % len(ORDINARY)] for j in range(1 + i % 15)) for i in range(120)]
if a.write:
    with open(a.write, "w") as out:
        out.writelines(json.dumps(t) + "\n" for t in texts)
    raise SystemExit

import torch
from tokenizers import Tokenizer
from transformers import AutoModel

torch.set_num_threads(a.threads)
tok = Tokenizer.from_file(f"{a.folder}/tokenizer.json")
tok.no_truncation()
tok.no_padding()
tok.encode_special_tokens = True
model = AutoModel.from_pretrained(a.folder, dtype=torch.float32).eval()
rows = [json.loads(line) for line in open(a.vectors)]
assert len(rows) == len(texts), (len(rows), len(texts))

ids = [tok.encode(t).ids for t in texts]
began = time.perf_counter()
want = []
with torch.no_grad():
    for row in ids:
        hidden = model(input_ids=torch.tensor([row])).last_hidden_state[0]
        want.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).double())
alone_s = time.perf_counter() - began

began = time.perf_counter()
order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
with torch.no_grad():
    for first in range(0, len(order), 32):
        batch = [torch.tensor(ids[i]) for i in order[first : first + 32]]
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        mask = (torch.arange(padded.shape[1])[None] < torch.tensor([len(b) for b in batch])[:, None]).long()
        model(input_ids=padded, attention_mask=mask)
batched_s = time.perf_counter() - began

got = torch.tensor([r["embedding"] for r in rows], dtype=torch.float64)
want = torch.stack(want)
cosine = (got * want).sum(1) / got.norm(dim=1) / want.norm(dim=1)
tokens = sum(map(len, ids))
print(json.dumps({
    "texts": len(texts), "tokens": tokens, "longest": max(map(len, ids)),
    "other_tokens": sum(len(i) != r["tokens"] for i, r in zip(ids, rows)),
    "cosine_min": cosine.min().item(), "max_abs": (got - want).abs().max().item(),
    "transformers_tok_per_s": tokens / alone_s, "transformers_batched_tok_per_s": tokens / batched_s,
}))
