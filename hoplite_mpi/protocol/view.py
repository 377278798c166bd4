"""Views: the numbered membership that every message is tied to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Member", "View"]


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a view. (rank, incarnation) never comes back once it has left."""

    rank: int
    incarnation: int
    #: identity of the machine: members with the same node share an arena
    node: str
    #: (host, port) of the side channel's listening socket
    address: tuple[str, int]
    #: number of the view in which it joined; seniority is (joined, rank)
    joined: int = 0

    def to_wire(self) -> list[Any]:
        return [self.rank, self.incarnation, self.node, list(self.address), self.joined]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Member:
        rank, incarnation, node, address, joined = wire
        return cls(rank, incarnation, node, (address[0], address[1]), joined)


@dataclass(frozen=True)
class View:
    """A numbered membership: rank → member. At most one incarnation of a rank is in a view."""

    number: int
    members: dict[int, Member] = field(default_factory=dict)

    def __contains__(self, rank: int) -> bool:
        return rank in self.members

    def __len__(self) -> int:
        return len(self.members)

    @property
    def ranks(self) -> list[int]:
        return sorted(self.members)

    @property
    def coordinator(self) -> int:
        """Rank of the most senior member."""
        return min(self.members.values(), key=lambda m: (m.joined, m.rank)).rank

    def has(self, rank: int, incarnation: int) -> bool:
        """Whether exactly this incarnation is a member."""
        member = self.members.get(rank)
        return member is not None and member.incarnation == incarnation

    def owner(self, key: bytes) -> int:
        """Return the rank that owns the directory shard of *key* (rendezvous hashing, so a change of view moves few keys)."""
        return max(
            self.members.values(),
            key=lambda m: hashlib.blake2b(key, digest_size=8, key=b"%d.%d" % (m.rank, m.incarnation)).digest(),
        ).rank

    def to_wire(self) -> list[Any]:
        return [self.number, [m.to_wire() for m in self.members.values()]]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> View:
        number, members = wire
        return cls(number, {m.rank: m for m in (Member.from_wire(w) for w in members)})
