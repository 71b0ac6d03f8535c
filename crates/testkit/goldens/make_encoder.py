"""Reference values from PyTorch for a miniature random BERT, read by `bantam_testkit::golden`.

    python3 -m venv venv && venv/bin/pip install torch transformers safetensors
    venv/bin/python crates/testkit/goldens/make_encoder.py

Writes `encoder/`: the folder of a sentence encoder (f32 weights, the files that sentence-transformers adds), and
`golden.safetensors`. The stock BertModel does the work, in f64, one sequence at a time; a padded batch with its mask
is checked here to give the same. With T tokens in all, D width, n sequences:

    tokens [T], seq_lens [n]     i64
    hidden [T, D]                the last layer's rows
    vectors [n, D]               their mean by sequence, scaled to length 1
"""
import json
import math
import os

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(HERE, "encoder")
LENGTHS = [13, 1, 40, 7, 33]
FIELDS = dict(vocab_size=150, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80,
              max_position_embeddings=64, type_vocab_size=2, layer_norm_eps=1e-12, hidden_act="gelu",
              hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0)


def random_model(generator):
    model = BertModel(BertConfig(**FIELDS, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "LayerNorm.weight" in name:
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.2 * noise)
            elif "embeddings" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise * 1.5 / math.sqrt(p.shape[1]))
    return model


def write_json(name, value):
    path = os.path.join(FOLDER, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as out:
        json.dump(value, out, indent=2)
        out.write("\n")


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(5)
    model = random_model(generator)
    write_json("config.json", {"architectures": ["BertModel"], "model_type": "bert",
                               "position_embedding_type": "absolute"} | FIELDS)
    write_json("sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    kinds = ["Transformer", "Pooling", "Normalize"]
    write_json("modules.json", [{"idx": i, "name": str(i), "path": "" if i == 0 else f"{i}_{kind}",
                                 "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)])
    write_json("1_Pooling/config.json", {"word_embedding_dimension": FIELDS["hidden_size"],
                                         "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
                                         "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False})
    weights = {k: v.clone() for k, v in model.state_dict().items() if "position_ids" not in k}
    save_file(weights, os.path.join(FOLDER, "model.safetensors"), metadata={"format": "pt"})

    tokens = torch.randint(0, FIELDS["vocab_size"], (sum(LENGTHS),), generator=generator)
    model.double()
    with torch.no_grad():
        rows = [model(input_ids=seq[None]).last_hidden_state[0] for seq in tokens.split(LENGTHS)]
        padded = torch.nn.utils.rnn.pad_sequence(tokens.split(LENGTHS), batch_first=True)
        mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
        batch = model(input_ids=padded, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(torch.cat(rows), batch[mask], rtol=1e-9, atol=1e-9)
    vectors = torch.stack([torch.nn.functional.normalize(r.mean(0), dim=0) for r in rows])
    golden = {"tokens": tokens, "seq_lens": torch.tensor(LENGTHS), "hidden": torch.cat(rows).float(),
              "vectors": vectors.float()}
    save_file({k: v.contiguous() for k, v in golden.items()}, os.path.join(FOLDER, "golden.safetensors"))
    for name in ["model.safetensors", "golden.safetensors"]:
        os.chmod(os.path.join(FOLDER, name), 0o644)
    print("encoder: norms of the first rows", [round(r[0].norm().item(), 4) for r in rows])


main()
