"""Runs the PEFT opponent untouched, and writes down what it does: the adapter it starts from, the rows of each batch,
and the loss of each step.

    peft_trace.py SCRIPT INIT_OUT ORDER_OUT LOSSES_OUT [the script's own arguments...]

INIT_OUT is a folder for the adapter, as `bantam train --init-adapter` reads it; ORDER_OUT a JSON list with the row
indices of each batch, as `bantam train --order` reads it; LOSSES_OUT a JSON list.
"""
import json
import random
import runpy
import sys

import peft
import torch
from transformers import LlamaForCausalLM

script, init_out, order_out, losses_out, *arguments = sys.argv[1:]
shuffled, losses = [], []
shuffle, forward, get_peft_model = random.shuffle, LlamaForCausalLM.forward, peft.get_peft_model


def remember_adapter(*args, **kwargs):
    model = get_peft_model(*args, **kwargs)
    model.save_pretrained(init_out)
    return model


def remember_order(items):
    """The script's last shuffle is that of its batches."""
    shuffle(items)
    shuffled[:] = items


def remember_loss(self, *args, **kwargs):
    out = forward(self, *args, **kwargs)
    if torch.is_grad_enabled() and out.loss is not None:
        losses.append(out.loss.item())
        write_down()
    return out


def write_down():
    """After every step: a run that is cut short can be compared as far as it came."""
    json.dump(shuffled[:len(losses)], open(order_out, "w"))
    json.dump(losses, open(losses_out, "w"))


random.shuffle, LlamaForCausalLM.forward, peft.get_peft_model = remember_order, remember_loss, remember_adapter
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
assert shuffled and isinstance(shuffled[0], list), "the script did not shuffle batches last"
