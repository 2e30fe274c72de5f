"""The swapped engine: a stage larger than memory trains out of core, with the exact gradient of the whole.

Groups of its parts take turns. Up: group by group, all microbatches of the step go forward, each group leaving its
boundary. At the top the loss. Down: group by group, each goes forward again from the boundary below it, with the same
dropout, takes the gradient from above, and writes its own gradients. One record then publishes the step, with the
scale that clipping gives; each part is updated when it is next loaded, on the next way up. Without clipping a group is
updated on the way down, and no gradient is written. Weights and moments so move once a step, whatever the number of
microbatches (compare layer-to-layer execution, arXiv 2002.05645).

The bits are those of `ResidentEngine`: the same operations on the same tensors in the same order of microbatches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from stackwise.batch import ACTIVATIONS, Batch, Term
from stackwise.config import StageTraining
from stackwise.errors import StackWiseError
from stackwise.host import keep_freed_memory
from stackwise.identity import derive_seed
from stackwise.model.layers import pull
from stackwise.training.anchor import Squares, row_loss
from stackwise.training.engine import LOWER_RATE, Accept, State, Stepped
from stackwise.training.lanes import generator_state, lane_to, seed_generator, set_generator
from stackwise.training.optim import Rising
from stackwise.training.phases import BACKWARD, FORWARD, OPTIMIZER, PhaseClock
from stackwise.training.ranks import RankGroup
from stackwise.training.scaling import SCALER, LastNorm, LossScale, clip_factor, judged
from stackwise.training.stage import MeanLoss, StageModel, StepLoss, Tally
from stackwise.training.swap_kept import KeptPasses, Pass
from stackwise.training.swap_loader import PartLoader
from stackwise.training.swap_moving import Moving, remove_shares, share_directory
from stackwise.training.swap_parts import (
    FRONT,
    DividedParts,
    Loaded,
    PartGroup,
    Parts,
    SwapSpace,
    in_turn,
    make_groups,
    pieces_of,
)
from stackwise.training.swap_pieces import piece_name
from stackwise.training.swap_ranks import RankLoader
from stackwise.training.swap_spill import Spill
from stackwise.training.swap_state import RedoLog, Update
from stackwise.training.trainer import Trainer

PIECES = "pieces"
"""The name in a step's terms of how many pieces its rows reached, and the bytes of pieces that were read from files."""
Leave = Callable[[Loaded, float | None], None]


class SwappedEngine:
    """Trains a stage group by group; `before`: steps that the stage has taken already, in windows before this one."""

    checkpoints = "swap/record"
    """Its steps are on the disk as they are taken: a checkpoint holds the trainer's record alone."""

    def __init__(
        self,
        parts: Parts,
        settings: StageTraining,
        space: SwapSpace,
        *,
        seed: tuple[int | str, ...],
        device: torch.device,
        before: int = 0,
        rising: Rising | None = None,
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()  # passes that wait free so much each step that the C library would give it back
        self.before = before
        self.ranks = ranks = space.ranks
        self.gathers = ranks.size > 1
        self.phases = PhaseClock(device)
        self.parts, self.settings, self.seed, self.device = parts, settings, seed, device
        self.groups = make_groups(parts, space.groups)
        pieces = {piece_name(part, path): part for part, paths in pieces_of(parts).items() for path in paths}
        self.lane = lane_to(device)
        self._place = place = space.place or (lambda rank: space.directory)
        own = share_directory(space.directory, place, ranks.rank, ranks.size)
        names = None if ranks.size > 1 else pieces  # of several ranks experts come and go with their block
        self.log = RedoLog(space.directory, parts.trains, names, self.lane, memory=space.kept, ranks=ranks, own=own)
        self._moving = Moving(self.log, cast(DividedParts, parts), place, device)
        if not self.log.open(space.warn, self._moving.find):
            self._moving.forget()
        if space.direct:
            self.log.pass_cache()
        self.spill = Spill(own / "step", space.memory, self.lane)
        self.kept = KeptPasses(space.passes)
        how: dict[str, Any] = {"spill": self.spill, "most_pieces": space.pieces}
        if isinstance(ranks, RankGroup):
            self.loader: PartLoader = RankLoader(
                cast(DividedParts, parts), self.log, settings, device, rising, ranks=ranks, **how
            )
        else:
            self.loader = PartLoader(parts, self.log, settings, device, rising, **how)
        self.loader.kept, self.loader.ahead = self.kept, space.ahead
        self.scale = LossScale(settings.loss_scale) if parts.precision == "fp16" else None
        self.last = LastNorm() if settings.clip_by == "last" and settings.grad_clip > 0 else None
        if self.last is not None and self.log.committed.norm is not None:
            self.last.norm = torch.tensor(self.log.committed.norm, dtype=torch.float64)
        if self.scale is not None and self.log.committed.scaler is not None:
            self.scale.restore({SCALER: torch.tensor(self.log.committed.scaler, dtype=torch.float64)})
        trained = [group.index for group in self.groups if set(group.names) & set(parts.trains)]
        self.lowest = min(trained, default=len(self.groups))
        # The gradient of a tied projection arrives at the front from the head too, so the front waits for it.
        self.tied = parts.tied and FRONT in parts.trains

    @property
    def steps_done(self) -> int:
        """Steps that are published: a kill loses nothing of them."""
        return self.log.committed.step

    @property
    def early(self) -> bool:
        """Whether groups are moved where their gradients are: nothing of the whole gradient decides about the update.

        Pieces are moved when rows reach them, by gradients that wait on the disk.
        """
        known = self.last is not None and self.last.norm is not None
        return (self.settings.grad_clip == 0 or known) and not self.loader.pieces

    def step(self, microbatches: Iterable[Batch], step: int, rate: float, accept: Accept | None = None) -> Stepped:
        """See `Engine.step`; it is durable when this returns.

        Raises:
            StackWiseError: The loss or the gradient is no finite number, and nobody was asked; the step is not taken.
            NoSpaceError: The disk is full; the step is not taken.
        """
        assert step == self.before + self.steps_done, f"step {step} after {self.before} and {self.steps_done}"
        self.spill.clear()
        self.kept.clear()
        microbatches = list(microbatches)  # every group sees all of them
        norms: dict[str, list[Tensor]] = {}
        ways: list[Callable[[], Loaded]] = [partial(self.loader.load_to_update, group) for group in self.groups]
        early, limit, clip = self.early, self.settings.grad_clip, None
        if early:
            if self.last is not None and self.last.norm is not None:
                clip = clip_factor(limit, self.last.norm.to(torch.float32))
            self._catch_up([self.groups[-1]])  # where the step before was another
            ways[-1] = partial(self.loader.load, self.groups[-1], moments=True)
        ways += [partial(self.loader.load, group, moments=early) for group in self.groups[self.lowest : -1][::-1]]
        self.phases.begin_step(len(ways) * len(microbatches))
        turns = in_turn(ways)
        update = Update(last=step, rate=rate, clip=clip)
        leave = partial(self.loader.update_ahead, update=update) if early else self.loader.write_gradients
        losses = self._up(itertools.islice(turns, len(self.groups)), microbatches, step, partial(leave, norms=norms))
        self._down(turns, microbatches, step, losses, partial(leave, norms=norms))
        loss, means = losses.total(), losses.means()
        in_order = [norm for name in self.parts.order for norm in norms.get(name, [])]
        norm = torch.zeros((), device=self.device)
        if in_order and losses.scored:  # from the norms of the tensors, as `clip_grad_norm_` has it
            norm = self.loader.over_ranks(torch.linalg.vector_norm(torch.stack(in_order)))
            if limit > 0 and not early:
                clip = clip_factor(limit, norm if self.last is None else self.last.instead_of(norm))
        taken, refused = judged(loss, norm, self.scale, accept)
        if accept is None and taken and not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
            raise StackWiseError(
                f"the loss or its gradient is no longer a finite number at step {step + 1}",
                hint=f"{LOWER_RATE}, and run again",
            )
        if taken and self.scale is not None:
            self.scale.taken()
        if taken and self.last is not None:
            self.last.norm = norm
        scaler = None if self.scale is None else self.scale.state()[SCALER].tolist()
        reached = self.log.reached
        known = None if self.last is None or self.last.norm is None else float(self.last.norm)
        self.log.commit(
            replace(update, clip=clip), math.nan if refused else float(loss), scaler, taken=taken, norm=known
        )
        self.spill.clear()
        return Stepped(loss, norm, taken, (means if len(means) > 1 else {}) | self._read(reached))

    def _read(self, reached: int) -> dict[str, Tensor]:
        """What the step in hand took of the pieces, to be looked at, under `PIECES`."""
        read, self.log.read_bytes = self.log.read_bytes, 0
        return {PIECES: torch.tensor([reached, read], dtype=torch.float64)} if self.loader.pieces else {}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> MeanLoss:
        """See `Engine.evaluate`."""
        held, tally = list(batches), Tally()
        terms: list[dict[str, Term]] = [{} for _ in held]
        self.spill.clear()
        for loaded in in_turn([partial(self.loader.load_to_update, group) for group in self.groups]):
            index = loaded.group.index
            model = self._settled(loaded, self.loader.update)
            for number, cpu_batch in enumerate(held):
                batch = self._entering(index, number, cpu_batch, track=False)
                self.spill.drop(("x", index, number))
                if index + 1 == len(self.groups):
                    tally.add(self._terms(model, batch, terms[number]))
                else:
                    with model.numerics(self.device):
                        leaving, terms[number] = model.run(batch, terms[number])
                    self.spill.put(("x", index + 1, number), leaving)
            del loaded, model
        mean = tally.mean(self.ranks)
        self.log.note_evaluation(mean.total)
        return mean

    def squared_gradients(self, batches: Sequence[Batch]) -> dict[str, dict[str, Tensor]]:
        """See `Engine.squared_gradients`: up and down once, every row by itself in each group."""
        squares, top = Squares(), len(self.groups) - 1
        terms: list[dict[str, Term]] = [{} for _ in batches]
        self.spill.clear()
        for loaded in in_turn([partial(self.loader.load, group) for group in self.groups]):
            index = loaded.group.index
            model = self._settled(loaded, self.loader.receive)
            for number, cpu_batch in enumerate(batches):
                batch = self._entering(index, number, cpu_batch)
                if index == top:
                    row_loss(self._terms(model, batch, terms[number])).backward()  # type: ignore[no-untyped-call]
                    squares.take(loaded.parameters())
                    self._hand_down(index, number, batch)
                    continue
                with torch.no_grad(), model.numerics(self.device):
                    leaving, terms[number] = model.run(batch, terms[number])
                self.spill.put(("x", index + 1, number), leaving)
            del loaded, model
        for loaded in in_turn([partial(self.loader.load, group) for group in self.groups[self.lowest : -1][::-1]]):
            index = loaded.group.index
            model = self._settled(loaded, self.loader.receive)
            head = self.loader.tied_head(loaded) if self.tied and index == 0 else None
            for number, cpu_batch in enumerate(batches):
                batch = self._entering(index, number, cpu_batch)
                with model.numerics(self.device):
                    leaving, of_blocks = model.run(batch)
                roots, slopes = [], []
                if ("g", index, number) in self.spill:
                    roots, slopes = [leaving], [self.spill.take(("g", index, number))]
                if head is not None:
                    of_blocks = self._terms(head.eval(), self._entering(top, number, cpu_batch, track=False), of_blocks)
                of_blocks = {name: term for name, term in of_blocks.items() if term.sum.requires_grad}
                if of_blocks:
                    roots, slopes = [*roots, row_loss(of_blocks)], [*slopes, torch.ones((), device=self.device)]
                if roots:
                    pull(roots, slopes)
                    squares.take(loaded.parameters())
                    self._hand_down(index, number, batch)
                del leaving, of_blocks, roots  # whose graphs have the weights
            del loaded, model, head
        self.spill.clear()
        return squares.means(len(batches))

    def _settled(self, loaded: Loaded, begin: Callable[[Loaded], None]) -> StageModel:
        """A group, once it is updated or received, with the weights that are committed, without dropout."""
        begin(loaded)
        self.loader.fill(loaded)
        self.loader.take_mean(loaded)
        return self.parts.model(loaded.parts).eval()

    def state(self) -> dict[str, Tensor]:
        """See `Engine.state`: nothing, as all that it holds is on the disk already, step by step."""
        return {}

    def outline(self) -> dict[str, Tensor]:
        """See `Engine.outline`."""
        return {}

    def keeps(self, name: str, whole: Tensor) -> Tensor | None:
        """See `Engine.keeps`."""
        return whole

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.restore`: nothing, as it took up its own directory."""

    def resume(self, trainer: Trainer) -> bool:
        """See `Engine.resume`: the steps on the disk may end after the record's, or before, where they were damaged."""
        self.take_over()
        trainer.step = self.steps_done
        trainer.record.correct(self.log.losses(), self.log.committed.held_out)
        return self.steps_done > 0

    def take_over(self) -> None:
        """Let this rank have its share of a state that another number of ranks left. All ranks call it."""
        if self._moving.needed:
            self._moving.move(self.loader.advance)

    def settle(self) -> None:
        """Bring every part up to the last step published."""
        self._catch_up([group for group in self.groups if set(group.names) & set(self.parts.trains)])
        self.log.flush()

    def _catch_up(self, groups: Sequence[PartGroup]) -> None:
        lacking = [group for group in groups if any(self.log.missing(name) for name in self.loader.named(group))]
        for loaded in in_turn([partial(self.loader.load_to_update, group) for group in lacking]):
            self.loader.update(loaded)
            self.loader.make_up(loaded.group)
            del loaded

    def weights(self, part: str) -> dict[str, Tensor]:
        """See `Engine.weights`."""
        return self.loader.make(part, self.loader.committed(part)).state_dict()

    def carried(self) -> dict[str, State]:
        """See `Engine.carried`."""
        kept = [one.state() for one in (self.scale, self.last) if one is not None]
        carried: dict[str, State] = {part: partial(self.loader.carried, part) for part in self.log.parts}
        return carried | {"": lambda: {key: value for state in kept for key, value in state.items()}}

    def take_up(self, carried: Mapping[str, State]) -> None:
        """See `Engine.take_up`; with steps on the disk, these have gone on already."""
        self.log.begin = lambda part: self.loader.begun(part, carried)
        for kept in (self.scale, self.last):
            if kept is not None and not self.steps_done:
                kept.restore(carried[""]())

    def close(self) -> None:
        """See `Engine.close`."""
        self.log.close()
        self.spill.close()
        self._moving.forget()

    def discard(self) -> None:
        """See `Engine.discard`."""
        if self.ranks.size > 1:
            remove_shares(self._place(self.ranks.rank))

    def _up(self, turns: Iterable[Loaded], microbatches: Sequence[Batch], step: int, leave: Leave) -> StepLoss:
        """Everything forward, the loss at the top and its gradient.

        Args:
            leave: Called with a group that has its gradients, and their share.
        """
        terms: list[dict[str, Term]] = [{} for _ in microbatches]
        losses: StepLoss | None = None
        for loaded in turns:
            index = loaded.group.index
            with self.phases(OPTIMIZER):  # of the step before
                self.loader.update(loaded)
            self.loader.fill(loaded)
            model, top, last = self.parts.model(loaded.parts), index + 1 == len(self.groups), len(microbatches) - 1
            sums = self.loader.sums(loaded)
            for number, cpu_batch in self.phases.counted(microbatches):
                batch = self._entering(index, number, cpu_batch)
                seeded = self._draw(step, index, number)
                if top:
                    if losses is None:
                        scale = 1.0 if self.scale is None else self.scale.scale
                        losses = StepLoss(model.objective, lambda: microbatches[1:], self.device, self.ranks, scale)
                    with self.phases(FORWARD):
                        terms[number] = self._terms(model, batch, terms[number])
                        root = losses.root(terms[number], batch)
                    with self.phases(BACKWARD):
                        root.backward()  # type: ignore[no-untyped-call]
                    sums.add()
                    losses.add(terms[number])
                    self._hand_down(index, number, batch)
                else:
                    terms[number] = self._through(loaded, model, batch, terms[number], number, last)
                    drawn = generator_state(self.device)
                    if not torch.equal(drawn, seeded):  # else the group above begins as this one did
                        self.spill.put(("draw", index + 1, number), drawn)
                if index < self.lowest:
                    self.spill.drop(("x", index, number))
            if top:  # the true count is known only now
                assert losses is not None, "a step has microbatches"
                losses.finish()
                leave(loaded, losses.share)
            self.kept.put_away(index, loaded.parts)
            del loaded, model
        assert losses is not None, "a stage has a head"
        return losses

    def _down(
        self,
        turns: Iterable[Loaded],
        microbatches: Sequence[Batch],
        step: int,
        losses: StepLoss,
        leave: Leave,
    ) -> None:
        """Group by group from the top, each forward again and backward, to the lowest that trains."""
        for loaded in turns:
            index = loaded.group.index
            self.loader.receive(loaded)
            self.loader.fill(loaded)
            model, sums = self.parts.model(loaded.parts), self.loader.sums(loaded)
            head = self.loader.tied_head(loaded) if self.tied and index == 0 else None
            for number, cpu_batch in self.phases.counted(microbatches):
                # Else nothing above that trains came from it.
                if ("g", index, number) in self.spill or losses.several:
                    self._back(index, model, head, (step, number, cpu_batch), losses)
                sums.add()
            leave(loaded, losses.share)
            del loaded, model, head, sums

    def _back(
        self, index: int, model: StageModel, head: StageModel | None, which: tuple[int, int, Batch], losses: StepLoss
    ) -> None:
        """A microbatch down through a group.

        Args:
            head: A tied one, above the front.
            which: Its step, its number in it, and what it is.
        """
        step, number, cpu_batch = which
        if (kept := self.kept.take(index, number)) is not None:
            batch, leaving, terms = kept.batch, kept.leaving, dict(kept.terms)
        else:
            batch = self._entering(index, number, cpu_batch)
            self._draw(step, index, number)
            with self.phases(BACKWARD), model.numerics(self.device):  # once more, for its gradient's sake
                leaving, terms = model.run(batch)
        roots, slopes = [], []
        if ("g", index, number) in self.spill:
            roots, slopes = [leaving], [self.spill.take(("g", index, number))]
        if head is not None:  # once more, for the gradient that reaches the front's embedding
            above = self._entering(len(self.groups) - 1, number, cpu_batch, track=False)
            self._draw(step, len(self.groups) - 1, number)
            terms = self._terms(head, above, terms)
        terms = {name: term for name, term in terms.items() if term.sum.requires_grad}
        if terms:
            root = losses.root(terms, batch)
            roots, slopes = [*roots, root], [*slopes, torch.ones_like(root)]
        if roots:
            with self.phases(BACKWARD):
                pull(roots, slopes)
            self._hand_down(index, number, batch)

    def _through(
        self, loaded: Loaded, model: StageModel, batch: Batch, below: Mapping[str, Term], number: int, last: int
    ) -> dict[str, Term]:
        """A microbatch up through a group; its pass is kept where there is room.

        Where it is not, its graph is what the way down will make too, so that both are the same operations. It ends
        here: it would keep the group's weights while the next one arrives.
        """
        index = loaded.group.index
        following = (len(self.groups) - 2 - index) * (last + 1) + last - number
        pieces = self.loader.pieces.keys() & loaded.parts.keys()  # they go with the group
        weights = self.kept.weights(index, loaded.parts)
        if index < self.lowest or pieces or not weights.may_wait or not self.kept.room(following):
            with self.phases(FORWARD), model.numerics(self.device):
                leaving, terms = model.run(batch, below)
        else:
            with self.phases(FORWARD), weights.apart() as count, model.numerics(self.device):
                leaving, terms = model.run(batch, below)
            self.kept.put(index, number, Pass(batch, leaving, terms, count.nbytes))
        self.spill.put(("x", index + 1, number), leaving.detach())
        return {name: replace(term, sum=term.sum.detach()) for name, term in terms.items()}

    def _terms(self, model: StageModel, batch: Batch, of_blocks: Mapping[str, Term]) -> dict[str, Term]:
        """The terms of the loss at the top, with those that the blocks below handed up."""
        with model.numerics(self.device):
            terms: dict[str, Term] = model(batch, of_blocks)
        return terms

    def _entering(self, index: int, number: int, batch: Batch, *, track: bool = True) -> Batch:
        """A microbatch as it enters a group, on the device; `track`: its gradient is taken if a part below trains."""
        if index:
            batch = batch.above(self.spill.get(("x", index, number)))
            self.spill.bring(("x", index, number + 1))
        self.spill.bring(("g", index, number + 1))
        batch = batch.to(self.device)
        if track and index > self.lowest:
            batch = batch.above(batch[ACTIVATIONS].detach().requires_grad_())
        return batch

    def _hand_down(self, index: int, number: int, batch: Batch) -> None:
        """Keep the gradient of what entered a group for the one below; what entered has done its duty."""
        if index > self.lowest and (gradient := batch[ACTIVATIONS].grad) is not None:
            self.spill.put(("g", index - 1, number), gradient)
        if not (self.tied and index + 1 == len(self.groups)):
            self.spill.drop(("x", index, number))
            self.spill.drop(("draw", index, number))

    def _draw(self, step: int, index: int, number: int) -> Tensor:
        """Set the generator to where it stood when the microbatch first entered the group; returns it as seeded."""
        seed_generator(self.device, derive_seed(*self.seed, step, self.ranks.microbatch(number), "dropout"))
        seeded = generator_state(self.device)
        if ("draw", index, number) in self.spill:
            set_generator(self.device, self.spill.held(("draw", index, number)))
        return seeded
