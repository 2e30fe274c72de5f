"""Answers to prompts of several lengths: drawn together, and what a model says of each drawn token.

Shapes in names: B rows, S positions, n drawn tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stackwise.inference.forward import LoadedModel
from stackwise.inference.generate import Continuing, sample_causal
from stackwise.model.block import evaluating
from stackwise.objectives.objective import Outputs, flat_index
from stackwise.objectives.ppo import said, said_and_values


@dataclass(frozen=True)
class Answers:
    """Rows of a prompt each, with what was drawn to it."""

    ids_BS: Tensor
    """Prompts, answers, and the separator behind them."""
    lengths_B: Tensor
    """Tokens of the prompts."""
    drawn_BS: Tensor
    """Which tokens were drawn, bool: up to the separator that ends an answer, or as many as it may have."""
    separator: int

    @classmethod
    def marked(cls, ids_BS: Tensor, lengths_B: Tensor, new_tokens: int, separator: int) -> Answers:
        """Rows of which it follows what was drawn."""
        at_S, lengths_B1 = torch.arange(ids_BS.shape[1], device=ids_BS.device), lengths_B[:, None]
        answer_BS = (at_S >= lengths_B1) & (at_S < lengths_B1 + new_tokens)
        stops_BS = (answer_BS & (ids_BS == separator)).long()
        return cls(ids_BS, lengths_B, answer_BS & (stops_BS.cumsum(1) - stops_BS == 0), separator)

    @property
    def before_BS(self) -> Tensor:  # noqa: N802
        """The positions in front of what was drawn."""
        return nn.functional.pad(self.drawn_BS[:, 1:], (0, 1))

    @property
    def ended_B(self) -> Tensor:  # noqa: N802
        """Which answers ended by themselves."""
        return (self.drawn_BS & (self.ids_BS == self.separator)).any(1)

    def prompts(self) -> list[list[int]]:
        """The ids of each prompt."""
        return [row[:length] for row, length in zip(self.ids_BS.tolist(), self.lengths_B.tolist(), strict=True)]

    def answers(self) -> list[list[int]]:
        """The ids of each answer, without the separator that ended it."""
        kept_BS = self.drawn_BS & (self.ids_BS != self.separator)
        return [row[kept].tolist() for row, kept in zip(self.ids_BS, kept_BS, strict=True)]


def draw_answers(
    model: LoadedModel, prompts_BS: Tensor, lengths_B: Tensor, new_tokens: int, how: Continuing
) -> Answers:
    """Draw an answer to each prompt, with the model's cache; see `sample_causal`.

    Args:
        prompts_BS: Each prompt with room for an answer of `new_tokens` behind it.
        how: With a `stop_token_id`, the separator.
    """
    assert how.stop_token_id is not None, "answers end with a separator"
    longest = int(lengths_B.max())
    ids_BT = sample_causal(model, prompts_BS[:, :longest], new_tokens, how, lengths_B=lengths_B)
    missing = prompts_BS.shape[1] - ids_BT.shape[1]
    ids_BS = nn.functional.pad(ids_BT, (0, missing), value=how.stop_token_id)
    return Answers.marked(ids_BS, lengths_B, new_tokens, how.stop_token_id)


def likelihoods(model: LoadedModel, answers: Answers, temperature: float = 1.0) -> Tensor:
    """The log-probability of each drawn token, at the position in front of it; 0 elsewhere: float32 [B, S]."""
    with _asked(model, answers) as (outputs, index_n, targets_n):
        said_n = said(outputs.head, outputs.x_BSD.flatten(0, 1).index_select(0, index_n), targets_n, temperature)
    return _spread(answers, index_n, said_n)


def likelihoods_and_values(model: LoadedModel, answers: Answers, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same, and beside it what the head's layer for values says at these positions."""
    with _asked(model, answers) as (outputs, index_n, targets_n):
        said_n, values_n = said_and_values(outputs, index_n, targets_n, temperature)
    return _spread(answers, index_n, said_n), _spread(answers, index_n, values_n)


@contextlib.contextmanager
def _asked(model: LoadedModel, answers: Answers) -> Iterator[tuple[Outputs, Tensor, Tensor]]:
    """What enters the head; where it is asked, and for which tokens: the head in evaluation mode, no gradients."""
    ids_BS = answers.ids_BS
    narrow = torch.autocast(ids_BS.device.type, model.autocast, enabled=model.autocast is not None)
    with torch.no_grad(), narrow:
        x_BSD, head = model.features(ids_BS, time=torch.zeros(len(ids_BS), device=ids_BS.device))
        index_n = flat_index(answers.before_BS, ids_BS.device)
        with evaluating(head):
            yield Outputs(x_BSD, head), index_n, ids_BS.roll(-1, 1).flatten().index_select(0, index_n)


def _spread(answers: Answers, index_n: Tensor, values_n: Tensor) -> Tensor:
    flat = torch.zeros(answers.ids_BS.numel(), dtype=torch.float32, device=values_n.device)
    return flat.index_copy(0, index_n, values_n.float()).view(answers.ids_BS.shape)
