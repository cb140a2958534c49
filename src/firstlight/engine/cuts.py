"""What row policies decide, made true: which rows skip a layer, come back, leave, or wait for a barrier.

Several policies join by intersection of what they keep. The last prompt row is never cut (its logits are asked for),
nor is a generated token's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from firstlight.core.parts import Cut, Enter, Obs, PartContext, RowPolicy
from firstlight.engine.batch import Member
from firstlight.engine.live import LiveRequest
from firstlight.engine.park import ParkStore


@dataclass(frozen=True, slots=True)
class CutTaken:
    """Rows `tok` are alive after `layer`; `n_parked` of the others can be revived, `n_gone` can't."""

    live: LiveRequest
    layer: int
    tok: Tensor
    n_parked: int
    n_gone: int


@dataclass(slots=True)
class RowCuts:
    """The row policies of a pass's members at work."""

    park: ParkStore
    taken: list[CutTaken]
    _pending: dict[str, list[Cut]] = field(default_factory=dict)

    def before_layer(self, member: Member, layer: int) -> tuple[Tensor, Tensor] | None:
        """Revive, hide, skip. Returns the rows set aside for this layer (tok, x), or None if the rows are as before."""
        member.visible = None
        live, changed = member.live, None
        for policy, context in self._policies(member):
            parked = self.park.ordinals(live.rid, layer, "cut")
            enter = policy.before_layer(layer, member.rows(), parked, context)
            if enter is not None:
                changed = self._apply_enter(member, layer, enter, changed)
        return changed

    def on_kv(self, member: Member, layer: int, k: Tensor, v: Tensor) -> None:
        for policy, context in self._policies(member):
            self._note(member, policy.on_kv(layer, member.rows(), k, v, member.loaded, context))

    def after_attend(self, member: Member, layer: int, obs: Obs | None) -> None:
        for policy, context in self._policies(member):
            self._note(member, policy.after_attend(layer, member.rows(), obs, context))

    def leaving(self, member: Member, layer: int) -> Tensor | None:
        """bool [n]: rows that leave before the MLP, as `early` cuts ask; None if none can.

        A row that is parked, or that another cut keeps waiting for the layer's end, stays.
        """
        cuts = self._pending.get(member.live.rid, [])
        if not any(cut.early for cut in cuts) or any(cut.park for cut in cuts) or layer + 1 == len(member.live.f):
            return None
        gone = torch.zeros(len(member.tok), dtype=torch.bool)
        for cut in cuts:
            if cut.early:
                gone |= ~torch.isin(member.tok, cut.keep)
        gone &= member.tok < member.live.num_prompt - 1
        if not bool(gone.any()):
            return None
        self.taken.append(CutTaken(member.live, layer, member.tok[~gone], 0, int(gone.sum())))
        return gone

    def apply(self, member: Member, layer: int) -> bool:
        """Take the cuts noted in this layer. True if rows left."""
        cuts = self._pending.pop(member.live.rid, [])
        if not cuts or layer + 1 == len(member.live.f):
            return False
        return self._cut(member, layer, cuts)

    def at_barrier(self, live: LiveRequest, layer: int, member: Member | None) -> bool:
        """The cut of a barrier layer, once every prompt row has finished it: on a one-shot pass's rows, or the store's.

        True if the member's rows changed.
        """
        mine = [(p, c) for p, c in zip(live.policies, live.contexts) if layer in p.barriers()]
        whole = member is not None and member.segment.tok[1] == live.num_prompt
        if not mine or not (whole if member is not None else live.f[layer] == live.num_prompt):
            return False
        tok = member.tok if member is not None else self.park.ordinals(live.rid, layer + 1, "waiting")
        obs = live.seen.get(layer)
        cuts = []
        for policy, context in mine:
            context.final = True
            cuts.append(policy.at_barrier(layer, tok, obs, context))
        if member is not None:
            return self._cut(member, layer, cuts)
        tok, x = self.park.take(live.rid, layer + 1, tok, "waiting")
        stays = self._stays(live, layer, tok, x, cuts)
        self.park.put(live.rid, layer + 1, tok[stays], x[stays], "waiting")
        return False

    def _cut(self, member: Member, layer: int, cuts: list[Cut]) -> bool:
        stays = self._stays(member.live, layer, member.tok, member.x, cuts)
        if bool(stays.all()):
            return False
        member.select(stays)
        return True

    def _stays(self, live: LiveRequest, layer: int, tok: Tensor, x: Tensor, cuts: list[Cut]) -> Tensor:
        """bool [n]: which rows are alive into the next layer; the others are parked where any cut says so."""
        protected = tok >= live.num_prompt - 1
        stays = torch.ones_like(protected)
        for cut in cuts:
            stays &= torch.isin(tok, cut.keep) | protected
        gone = ~stays
        parked = int(gone.sum()) if any(cut.park for cut in cuts) else 0
        if parked:
            self.park.put(live.rid, layer + 1, tok[gone], x[gone], "cut")
        if bool(gone.any()) and int(tok[-1]) < live.num_prompt:  # a schedule plans with a prompt's rows alone
            self.taken.append(CutTaken(live, layer, tok[stays], parked, int(gone.sum()) - parked))
        return stays

    def _apply_enter(
        self, member: Member, layer: int, enter: Enter, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor] | None:
        if enter.visible is not None:
            seen = enter.visible
            member.visible = seen if member.visible is None else seen[torch.isin(seen, member.visible)]
        if enter.skip is None and enter.revive is None:
            return before
        skip = enter.skip if enter.skip is not None else torch.zeros(len(member.tok), dtype=torch.bool)
        aside = (member.tok[skip], member.x[skip])
        member.select(~skip)
        if enter.revive is not None:
            tok, x = self.park.take(member.live.rid, layer, enter.revive, "cut")
            if len(tok):
                member.insert(tok, x)
        return aside if before is None else (torch.cat([before[0], aside[0]]), torch.cat([before[1], aside[1]]))

    def _note(self, member: Member, cut: Cut | None) -> None:
        if cut is not None:
            self._pending.setdefault(member.live.rid, []).append(cut)

    def _policies(self, member: Member) -> list[tuple[RowPolicy, PartContext]]:
        pairs = list(zip(member.live.policies, member.live.contexts))
        for _, context in pairs:
            context.final, context.decode = member.final, member.decode
        return pairs
