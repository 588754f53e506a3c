"""A model with a MoE layer learns a text, on one process. It needs nothing but `pip install '.[torch]'`."""

import torch
import torch.nn.functional as F

from moecomm.nn import MoE, parameter_groups

TEXT = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 24)).reshape(24, 45)
STEPS = 20


class Model(torch.nn.Module):
    """Bytes in; out come logits of the next byte, and what the gate decided."""

    def __init__(self, groups=None):
        super().__init__()
        torch.manual_seed(0)  # the weights that all ranks have must be the same on all
        self.embedding = torch.nn.Embedding(256, 32)
        self.moe = MoE(hidden=32, ffn=64, num_experts=8, top_k=2, groups=groups, key=(0, 1))  # seed, layer
        self.logits = torch.nn.Linear(32, 256)

    def forward(self, text):
        x = self.embedding(text)
        y, routing = self.moe(x)
        return self.logits(x + y), routing


def loss_of(model, text):
    logits, routing = model(text[:, :-1])
    # The auxiliary loss is 1 where all experts have equally many tokens.
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), routing.aux_loss


def optimizer_of(model):
    return torch.optim.AdamW(parameter_groups(model), lr=0.01)


def main():
    model = Model()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        loss, aux_loss = loss_of(model, TEXT)
        optimizer.zero_grad()
        (loss + 0.01 * aux_loss).backward()
        optimizer.step()
        if step % 5 == 4:
            print(f"step {step + 1}: loss {loss:.2f}")
    _, routing = model(TEXT[:, :-1])
    print("tokens of each expert:", *routing.count.tolist())


if __name__ == "__main__":
    main()
