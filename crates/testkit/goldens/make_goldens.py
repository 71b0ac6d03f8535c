"""Reference values from PyTorch for miniature random Llama models, read by `bantam_testkit::golden`.

    python3 -m venv venv && venv/bin/pip install torch transformers peft safetensors
    venv/bin/python crates/testkit/goldens/make_goldens.py

Each variant becomes a folder: `config.json` and `model.safetensors` (f32) as Hugging Face writes them, and
`golden.safetensors`. The stock classes of transformers and PEFT do the work, in f64: the three places where
transformers forces f32 (norm, rotary table, softmax) are lifted to f64, and the result is checked here
against the untouched f32 classes. Results are stored as f32, scalars as f64.

golden.safetensors holds, with T tokens in all (two sequences end to end), V logits, D width:

    tokens [T], seq_lens [2]                       i64
    target.pos [n], target.token [n]               i64: the token that the logits at `pos` must predict
    hidden.embed, hidden.layer.{i}, hidden.norm    [T, D], after the embedding, each block, the last norm
    logits [T, V], loss [1]                        without LoRA; loss is the mean over targets
    base_grad.<HF name>                            d loss / d weight, variant `tied` only
    lora.<PEFT name>                               r=4, alpha=8, on every linear layer, B not zero
    lora_logits [T, V], lora_loss [1]              with that adapter
    lora_grad.<PEFT name>                          d lora_loss / d adapter
    train.lr, train.clip, train.weight_decay, train.beta1, train.beta2, train.eps   [1]
    train.loss [10], train.grad_norm [10]          AdamW on this batch; loss and norm before each step
    lora_final.<PEFT name>                         the adapter after ten steps
    full.loss [10], full.grad_norm [10]            the same ten steps with every weight trained and no adapter
    full_final.<HF name>                           the gains and biases after them
"""
import copy
import json
import math
import os

import torch
import transformers.models.llama.modeling_llama as llama
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
LENGTHS = [13, 7]
TRAINED_FROM = [6, 3]  # the first token of each sequence that is a target
RANK, ALPHA = 4, 8
TRAIN = {"lr": 1e-2, "clip": 1.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

VARIANTS = {
    # Grouped-query attention, the head tied to the embedding.
    "tied": dict(
        seed=1, weight_decay=0.0,
        config=dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96,
                    vocab_size=160, rms_norm_eps=1e-5, tie_word_embeddings=True, rope_theta=10000.0, rope_scaling=None),
    ),
    # Everything optional: own head, biases, n_heads * head_dim != width, RoPE scaled as in Llama 3.
    # The original context is tiny so that the few positions here meet all three bands of the scaling.
    "biased": dict(
        seed=2, weight_decay=0.1,
        config=dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=80,
                    vocab_size=150, rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
                    rope_theta=10000.0,
                    rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                      original_max_position_embeddings=32)),
    ),
    # Multi-head attention, widths that are no multiple of 16, linear RoPE scaling, the newer `rope_parameters` spelling.
    "mha": dict(
        seed=3, weight_decay=0.0,
        config=dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=12, intermediate_size=84,
                    vocab_size=150, rms_norm_eps=1e-6, tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0)),
    ),
}


def inv_freq_f64(config):
    """The rotary frequencies, in f64: transformers computes its own in f32."""
    rope = config.rope_parameters
    half = config.head_dim // 2
    freq = [rope["rope_theta"] ** (-i / half) for i in range(half)]
    if rope["rope_type"] == "linear":
        freq = [f / rope["factor"] for f in freq]
    if rope["rope_type"] == "llama3":
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        for i, f in enumerate(freq):
            wavelength = 2 * math.pi / f
            if wavelength > low:
                freq[i] = f / rope["factor"]
            elif wavelength > high:
                smooth = (low / wavelength * rope["low_freq_factor"] - rope["low_freq_factor"]) / (
                    rope["high_freq_factor"] - rope["low_freq_factor"])
                freq[i] = (1 - smooth) * f / rope["factor"] + smooth * f
    return torch.tensor(freq, dtype=torch.float64)


def lift_to_f64():
    """Replaces the three spots of transformers' Llama that force f32."""
    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self, x, position_ids):
        angle = position_ids[..., None].double() * self.inv_freq_f64
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        key = llama.repeat_kv(key, module.num_key_value_groups)
        value = llama.repeat_kv(value, module.num_key_value_groups)
        score = query @ key.transpose(2, 3) * scaling
        t = score.shape[-1]
        score = score.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
        prob = torch.softmax(score, dim=-1)
        return (prob @ value).transpose(1, 2).contiguous(), prob

    llama.LlamaRMSNorm.forward = norm
    llama.LlamaRotaryEmbedding.forward = rotary
    llama.eager_attention_forward = attention


def random_model(config, generator):
    """A model whose every weight, gain and bias is drawn from `generator`, at a scale where nothing is negligible."""
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif "embed" in name:
                p.copy_(0.25 * noise)
            else:
                p.copy_(noise / math.sqrt(p.shape[1]))
    return model


def per_sequence(model, batch):
    return torch.cat([model(input_ids=seq[None], use_cache=False).logits[0] for seq in batch["tokens"].split(LENGTHS)])


def mean_loss(logits, batch):
    return torch.nn.functional.cross_entropy(logits[batch["target.pos"]], batch["target.token"])


def make_batch(vocab, generator):
    tokens = torch.randint(0, vocab, (sum(LENGTHS),), generator=generator)
    pos, start = [], 0
    for length, first in zip(LENGTHS, TRAINED_FROM):
        pos += range(start + first - 1, start + length - 1)
        start += length
    pos = torch.tensor(pos)
    return {"tokens": tokens, "seq_lens": torch.tensor(LENGTHS), "target.pos": pos, "target.token": tokens[pos + 1]}


def make(name, spec):
    fields = dict(num_hidden_layers=2, hidden_act="silu", max_position_embeddings=256, attention_dropout=0.0,
                  bos_token_id=1, eos_token_id=2, pad_token_id=2) | spec["config"]
    config = LlamaConfig(**copy.deepcopy(fields))  # it edits the nested dictionaries
    generator = torch.Generator().manual_seed(spec["seed"])
    stock = random_model(config, generator)
    batch = make_batch(config.vocab_size, generator)
    folder = os.path.join(HERE, name)
    os.makedirs(folder, exist_ok=True)
    weights = {k: v.clone() for k, v in stock.state_dict().items()
               if not (config.tie_word_embeddings and k == "lm_head.weight")}
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    os.chmod(os.path.join(folder, "model.safetensors"), 0o644)
    with open(os.path.join(folder, "config.json"), "w") as out:
        json.dump({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"} | fields, out, indent=2)
        out.write("\n")

    return {"stock": stock, "stock_logits": per_sequence(stock, batch).detach(), "config": config,
            "generator": generator, "batch": batch, "folder": folder}


def ten_steps(model, params, spec, batch, first=lambda logits, loss: None):
    """Losses and gradient norms before each of ten steps of AdamW; `first` sees the first backward."""
    opt = torch.optim.AdamW(params, lr=TRAIN["lr"], betas=(TRAIN["beta1"], TRAIN["beta2"]), eps=TRAIN["eps"],
                            weight_decay=spec["weight_decay"])
    losses, norms = [], []
    for step in range(10):
        opt.zero_grad()
        logits = per_sequence(model, batch)
        loss = mean_loss(logits, batch)
        loss.backward()
        if step == 0:
            first(logits, loss)
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(params, TRAIN["clip"]).item())
        opt.step()
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)


def measure(name, spec, made):
    config, batch, model = made["config"], made["batch"], made["stock"]
    inv_freq = inv_freq_f64(config)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), inv_freq, rtol=1e-6, atol=0)
    model.double()
    model.model.rotary_emb.inv_freq_f64 = inv_freq
    out = dict(batch)

    hidden, hooks = {}, []
    def keep(key):
        def hook(_module, _args, result):
            hidden.setdefault(key, []).append((result[0] if isinstance(result, tuple) else result)[0].detach())
        return hook
    named = [("embed", model.model.embed_tokens), ("norm", model.model.norm)]
    named += [(f"layer.{i}", layer) for i, layer in enumerate(model.model.layers)]
    for key, module in named:
        hooks.append(module.register_forward_hook(keep(key)))
    logits = per_sequence(model, batch)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits.detach(), made["stock_logits"].double(), rtol=1e-4, atol=2e-5)
    out |= {f"hidden.{key}": torch.cat(parts) for key, parts in hidden.items()}
    loss = mean_loss(logits, batch)
    out |= {"logits": logits, "loss": loss.reshape(1)}
    if name == "tied":
        model.zero_grad()
        loss.backward()
        out |= {f"base_grad.{k}": p.grad.clone() for k, p in model.named_parameters()}

    every = copy.deepcopy(model)
    losses, norms = ten_steps(every, list(every.parameters()), spec, batch)
    out |= {"full.loss": losses, "full.grad_norm": norms}
    out |= {f"full_final.{k}": p.detach() for k, p in every.named_parameters() if p.dim() == 1}

    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear",
                                            task_type="CAUSAL_LM"))
    with torch.no_grad():
        for key, p in peft.named_parameters():
            if "lora_" in key:
                p.data = p.data.double()
                noise = torch.randn(p.shape, generator=made["generator"])
                p.copy_((noise / math.sqrt(p.shape[1]) * (0.5 if "lora_B" in key else 1.0)).float().double())
    adapter = lambda: {k: v.detach().clone() for k, v in get_peft_model_state_dict(peft).items()}
    out |= {f"lora.{k}": v for k, v in adapter().items()}

    params = {k.replace(".default", ""): p for k, p in peft.named_parameters() if p.requires_grad}
    assert set(params) == set(adapter()) and len(params) == 2 * 7 * 2, sorted(params)
    def first(logits, loss):
        out.update({"lora_logits": logits, "lora_loss": loss.reshape(1)})
        out.update({f"lora_grad.{k}": p.grad.clone() for k, p in params.items()})
    losses, norms = ten_steps(peft, list(params.values()), spec, batch, first)
    out |= {f"lora_final.{k}": v for k, v in adapter().items()}
    out |= {"train.loss": losses, "train.grad_norm": norms}
    out |= {f"train.{k}": torch.tensor([v], dtype=torch.float64) for k, v in (TRAIN | {"weight_decay": spec["weight_decay"]}).items()}

    small = lambda key: key.endswith("loss") or key.startswith(("train.", "full."))
    stored = {k: v.detach() if small(k) or v.dtype == torch.int64 else v.detach().float() for k, v in out.items()}
    path = os.path.join(made["folder"], "golden.safetensors")
    save_file({k: v.contiguous() for k, v in sorted(stored.items())}, path)
    os.chmod(path, 0o644)
    print(f"{name}: loss {out['loss'].item():.6f}, ten steps with LoRA {losses[0]:.6f} -> {losses[-1]:.6f}, "
          f"norms {norms[0]:.3f} .. {norms[-1]:.3f}; with every weight -> {out['full.loss'][-1]:.6f}")


def main():
    torch.set_num_threads(1)
    made = {name: make(name, spec) for name, spec in VARIANTS.items()}
    lift_to_f64()
    for name, spec in VARIANTS.items():
        measure(name, spec, made[name])


main()
