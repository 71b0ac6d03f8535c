"""Losses and derivatives of TRL's own trainers on fixed log-probabilities, for `crates/lab/src/train/preference/loss.rs`.

    python3 -m venv /tmp/trl && /tmp/trl/bin/pip install torch trl==1.16.0
    /tmp/trl/bin/python crates/testkit/goldens/make_preference.py

TRL computes each loss inside its trainer. Here the trainer's method is called with a model that returns the given
log-probabilities, so that the arithmetic is TRL's and the input is ours. ORPO's method rounds to f32 inside; all else is f64.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace as Namespace
from unittest.mock import MagicMock

import torch
import trl
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

torch.set_default_dtype(torch.float64)

# Summed log-probabilities: near and far, right and wrong, equal.
CHOSEN = [-12.5, -3.25, -80.0, -1.5, -41.75, -7.0]
REJECTED = [-14.0, -2.75, -35.5, -96.0, -41.75, -6.5]
REF_CHOSEN = [-13.0, -3.0, -75.25, -30.0, -41.75, -9.0]
REF_REJECTED = [-13.5, -3.5, -36.0, -50.5, -41.75, -6.0]
KL = [-9.0, -22.5, -31.0, -4.0, -18.5, -60.25]
REF_KL = [-9.5, -22.0, -33.5, -4.75, -18.0, -62.0]
CHOSEN_LEN = [10, 3, 40, 2, 20, 5]
REJECTED_LEN = [8, 4, 25, 60, 20, 3]


class Accelerator:
    device = torch.device("cpu")

    def gather(self, x):
        return x

    gather_for_metrics = gather


class Model:
    """Answers each call with the next list of log-probabilities, one token an answer."""

    training = True

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self, **_):
        logps = self.answers.pop(0)[:, None]
        zeros = torch.zeros_like(logps)
        return Namespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def leaf(values):
    return torch.tensor(values, requires_grad=True)


def base(model, **fields):
    trainer = MagicMock()
    for name, value in dict(
        model=model, accelerator=Accelerator(), _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        precompute_ref_logps=True, aux_loss_enabled=False, use_weighting=False, **fields,
    ).items():
        setattr(trainer, name, value)
    return trainer


def dpo(beta):
    rows = []
    for w, l, rw, rl in zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED):
        policy = leaf([w, l])
        model = Model(policy)
        trainer = base(model, beta=beta, ld_alpha=None, f_divergence_type="reverse_kl", loss_types=["sigmoid"],
                       loss_weights=[1.0])
        ids = torch.zeros((2, 2), dtype=torch.long)
        inputs = dict(input_ids=ids, attention_mask=ids + 1, completion_mask=torch.tensor([[0, 1], [0, 1]]),
                      ref_chosen_logps=torch.tensor([rw]), ref_rejected_logps=torch.tensor([rl]))
        loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
        loss.backward()
        rows.append([loss.item(), *policy.grad.tolist()])
    return rows


def kto(beta, desirable_weight, undesirable_weight):
    """One batch: the preferred answers are desirable, the others are not. The loss is the mean of all."""
    policy = leaf(CHOSEN + REJECTED)
    kl = torch.tensor(KL + KL)
    model = Model(kl, policy)
    trainer = base(model, beta=beta, loss_type="kto", calculate_KL=True, desirable_weight=desirable_weight,
                   undesirable_weight=undesirable_weight)
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    n = len(policy)
    ids = torch.zeros((n, 2), dtype=torch.long)
    mask = torch.tensor([[0, 1]] * n)
    inputs = dict(input_ids=ids, attention_mask=ids + 1, completion_mask=mask, KL_input_ids=ids, KL_attention_mask=ids + 1,
                  KL_completion_mask=mask, label=torch.tensor([True] * len(CHOSEN) + [False] * len(REJECTED)),
                  ref_logps=torch.tensor(REF_CHOSEN + REF_REJECTED), ref_KL_logps=torch.tensor(REF_KL + REF_KL))
    loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    return dict(loss=loss.item(), kl=trainer._metrics["train"]["kl"][0], grads=policy.grad.tolist())


def means(values, lens):
    return leaf([value / n for value, n in zip(values, lens)])


def simpo(beta, gamma):
    w, l = means(CHOSEN, CHOSEN_LEN), means(REJECTED, REJECTED_LEN)
    trainer = base(None, beta=beta, simpo_gamma=gamma, alpha=0.0, loss_type="simpo", label_smoothing=0.0)
    losses, *_ = CPOTrainer.cpo_loss(trainer, w, l)
    losses.sum().backward()
    return [list(row) for row in zip(losses.tolist(), w.grad.tolist(), l.grad.tolist())]


def orpo(beta):
    """As `get_batch_loss_metrics`: likelihood of the preferred answer minus what the odds give."""
    w, l = means(CHOSEN, CHOSEN_LEN), means(REJECTED, REJECTED_LEN)
    losses, *_ = ORPOTrainer.odds_ratio_loss(base(None, beta=beta), w, l)
    losses = -w - losses
    losses.sum().backward()
    return [list(row) for row in zip(losses.tolist(), w.grad.tolist(), l.grad.tolist())]


golden = {
    "made_by": f"make_preference.py with trl {trl.__version__} and torch {torch.__version__}",
    "policy": [CHOSEN, REJECTED],
    "reference": [REF_CHOSEN, REF_REJECTED],
    "mismatched": [KL, REF_KL],
    "tokens": [CHOSEN_LEN, REJECTED_LEN],
    "dpo": [{"beta": beta, "rows": dpo(beta)} for beta in (0.1, 0.5)],
    "kto": [{"beta": 0.1, "weights": [1.0, 1.0], **kto(0.1, 1.0, 1.0)}, {"beta": 0.3, "weights": [1.33, 0.5], **kto(0.3, 1.33, 0.5)}],
    "simpo": [{"beta": beta, "gamma": gamma, "rows": simpo(beta, gamma)} for beta, gamma in ((2.0, 1.0), (2.5, 0.3))],
    "orpo": [{"lambda": beta, "rows": orpo(beta)} for beta in (0.1, 1.0)],
}
path = Path(__file__).parent / "preference" / "losses.json"
path.parent.mkdir(exist_ok=True)
path.write_text(json.dumps(golden, indent=1) + "\n")
print(path)
