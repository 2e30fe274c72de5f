"""A draft head of one block for speculative decoding (after EAGLE, arXiv 2401.15077), from cached states and tokens.

    python examples/draft_head.py MODEL --data PATH --at 12 --store STORE

At each position it has the model's hidden state and the token that follows, and drafts the one after that. The model
itself runs once, when its states are captured: a head of any shape is then trained without it.
"""

import argparse

import torch
from torch import nn

import stackwise


class DraftHead(nn.Module):
    """States [B, S, D] and tokens [B, S] to logits [B, S - 2, V] of the tokens at positions 2 to S - 1."""

    def __init__(self, width: int, vocab_size: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.norm, self.join = nn.RMSNorm(width), nn.Linear(2 * width, width)
        self.block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.output = nn.Linear(width, vocab_size)

    def forward(self, x_BSD: torch.Tensor, tokens_BS: torch.Tensor) -> torch.Tensor:
        """See the class."""
        known = torch.cat([self.norm(x_BSD[:, :-2].float()), self.embedding(tokens_BS[:, 1:-1])], dim=-1)
        causal = nn.Transformer.generate_square_subsequent_mask(known.shape[1])
        return self.output(self.block(self.join(known), src_mask=causal, is_causal=True))

    def loss(self, x_BSD: torch.Tensor, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy, in nats a token."""
        return nn.functional.cross_entropy(self(x_BSD, tokens_BS).flatten(0, 1), tokens_BS[:, 2:].flatten())


def main() -> None:
    """Capture, train, and say how well it drafts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--at", type=int, required=True)
    parser.add_argument("--store", default="store")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    torch.manual_seed(0)

    captured = stackwise.capture(given.model, given.data, at=[given.at], store=given.store, seq_len=given.seq_len)
    batches = captured.dataset(given.at, 8, batches=given.steps + 1)
    held_out_B, held_out_BSD, held_out_BS = next(iter(batches))
    vocab_size = 1 + max(int(tokens_BS.max()) for _, _, tokens_BS in captured.dataset(given.at, 64))
    head = DraftHead(held_out_BSD.shape[-1], vocab_size, given.heads)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    counts = torch.ones(vocab_size)
    for rows_B, x_BSD, tokens_BS in batches:
        train_B = ~torch.isin(rows_B, held_out_B)
        if train_B.any():
            loss = head.loss(x_BSD[train_B], tokens_BS[train_B])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            counts += torch.bincount(tokens_BS[train_B].flatten(), minlength=vocab_size)

    with torch.no_grad():
        drafted, wanted = head(held_out_BSD, held_out_BS).argmax(-1), held_out_BS[:, 2:]
        loss, unigram = head.loss(held_out_BSD, held_out_BS), -(counts / counts.sum()).log()[wanted].mean()
    right, most = (drafted == wanted).float().mean(), (wanted == counts.argmax()).float().mean()
    print(f"loss {loss:.3f} nats a token; by how often tokens occur {unigram:.3f}")
    print(f"right at first: {right:.1%}; the most frequent token: {most:.1%}")


if __name__ == "__main__":
    main()
