"""How the numbers of one observation reach the host, whether one process observes or several observe together.

There is one packing. What an observation gave (parts.py) becomes two vectors: one whose elements add up and one whose elements take the largest.
Every column of a row merges by one of these two operations (columns.py), so two pairs of vectors of the same layout merge by one sum and one
maximum, and the merged pair is the pair of one process that was given the concatenated batch. The host reads the rows from the merged pair.

There are two transports. `Local` (local.py) copies the pair of each device to the host and merges the copies there. `Ranks` (ranks.py) merges the
pairs of all processes with one SUM and one MAX all-reduce, and no other collective, and copies the result. A `Flight` (flight.py) is an observation
that is on its way with either of them. Nothing waits: the numbers are read at a later step.

Only the layout differs (layout.py). The layout of one process holds what ran there, and its numbers travel as they are, bit for bit. The layout of
several ranks is agreed upon at their first observation (agreement.py): the sites and layers of all ranks, in order. A rank that has not run a site
contributes nothing to it. Ranks may have read different shares of their elements, so each rank weighs its sums by the elements that they stand for,
and the reader scales them back; gradients are divided by what data parallelism averages over. When the sites of some rank have changed, the rank
says so in a column of the MAX vector, and LAG steps later, when every rank has read that column, all agree on a new layout.

No rank waits for another one. The collectives run asynchronously in a process group of our own, which is made from the store of the user's job, so
that they can never be taken for collectives of the user. Their result is read LAG steps later. A result that never arrives, because a rank has died
or left, is replaced by the numbers of this rank alone, and from then on this rank observes by itself.

A user may call `watch` on some ranks only (`if rank == 0: watch(...)`). Each rank that watches therefore announces itself in the store, and the
ranks decide at the end of the first observed step whether all observe together (meeting.py).

The imports point one way: layout, windows and meeting import nothing of this package, then come packing, flight, local and agreement, and at the
end ranks.
"""
