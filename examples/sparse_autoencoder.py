"""A sparse autoencoder (top-k, arXiv 2406.04093) over one layer of a pretrained model.

    python examples/sparse_autoencoder.py MODEL --data PATH --at 6 --store STORE

The hidden states are captured once; a further run, with other settings of the autoencoder, reads them from the store.
"""

import argparse

import torch
from torch import nn

import stackwise


class SparseAutoencoder(nn.Module):
    """Rows of activations as sums of `k` of `features` directions."""

    def __init__(self, mean_D: torch.Tensor, scale: torch.Tensor, features: int, k: int) -> None:
        super().__init__()
        self.k, width = k, len(mean_D)
        self.register_buffer("mean_D", mean_D)
        self.register_buffer("scale", scale)
        self.decoder = nn.Parameter(nn.functional.normalize(torch.randn(features, width), dim=-1))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The reconstruction [N, D] of normed activations, and which features are active [N, k]."""
        values, active = (x_ND @ self.encoder.T + self.bias).relu().topk(self.k)
        return torch.einsum("nk,nkd->nd", values, self.decoder[active]), active

    def normed(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Activations as rows without their mean, of about length 1 a feature."""
        return (x_BSD.flatten(0, 1).float() - self.mean_D) / self.scale


def main() -> None:
    """Capture, train, and say what is left unexplained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--at", type=int, required=True)
    parser.add_argument("--store", default="store")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    torch.manual_seed(0)

    captured = stackwise.capture(given.model, given.data, at=[given.at], store=given.store, seq_len=given.seq_len)
    batches = iter(captured.dataset(given.at, 8, batches=given.steps + 1))
    held_out_B, held_out_BSD, _ = next(batches)
    first_ND = held_out_BSD.flatten(0, 1).float()
    model = SparseAutoencoder(first_ND.mean(0), first_ND.std(), given.features, given.k)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    used = torch.zeros(given.features)
    for rows_B, x_BSD, _tokens in batches:
        x_ND = model.normed(x_BSD[~torch.isin(rows_B, held_out_B)])
        made_ND, active = model(x_ND)
        loss = (made_ND - x_ND).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        used[active.flatten()] = 1

    with torch.no_grad():
        x_ND = model.normed(held_out_BSD)
        loss, mean = (model(x_ND)[0] - x_ND).pow(2).mean(), x_ND.pow(2).mean()
        # As many numbers a row, in the directions that explain these very rows best.
        _, _, directions = torch.linalg.svd(x_ND, full_matrices=False)
        pca = (x_ND - x_ND @ directions[: given.k].T @ directions[: given.k]).pow(2).mean()
    print(f"unexplained variance {loss / mean:.3f}; by {given.k} principal components {pca / mean:.3f}; by the mean 1")
    print(f"features used: {int(used.sum())} of {given.features}")


if __name__ == "__main__":
    main()
