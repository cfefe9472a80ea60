"""`Loader`: batches in an order that is a pure function of (samples, seed, position), whatever the ranks.

Why not torch's DataLoader: its position cannot be saved, its shuffle comes from a global generator, its order depends
on DistributedSampler's padding, and worker processes cost more than a memory-mapped read (torchdata's
StatefulDataLoader saves one position per worker). Here a position is a number, restored at once on any number of ranks.
"""

from __future__ import annotations

from typing import Any

from ..checkpoint.wording import shown
from ..errors import ConfigError
from .batch import Batch, Samples, collate
from .mixing import Permutation, key_of


class Loader:
    """Endless batches, epoch after epoch, each in an order of its own.

    Args:
        samples: rows by index.
        batch_size: rows of a batch, of all ranks together.
        seed: of the orders.
        shuffle: False: as they come, in every epoch.
        rank: ours; it gets rows rank*B/world to (rank+1)*B/world of each batch.
        world: number of ranks.
        drop_last: leave out the rows at the end of an epoch that fill no batch (others in every epoch); else the last
            batch of an epoch is smaller.

    Attributes:
        position: samples consumed by all ranks together, since the very beginning.

    Raises ConfigError where no batch can be filled, or the ranks cannot share one evenly.
    """

    def __init__(
        self, samples: Samples, batch_size: int, *, seed: int = 0, shuffle: bool = True, rank: int = 0, world: int = 1,
        drop_last: bool = True,
    ) -> None:  # fmt: skip
        if batch_size < 1 or batch_size % world:
            raise ConfigError(
                f"A batch of {batch_size} rows cannot be shared evenly by {world} "
                f"{'rank' if world == 1 else 'ranks'}. Choose a multiple of {world}."
            )
        count = len(samples)
        if count < (batch_size if drop_last else 1):
            raise ConfigError(
                f"The corpus gives {count:,} rows, and a batch takes {batch_size:,}. Give more text, a smaller batch, "
                "a shorter context length, or a smaller stride."
            )
        self.samples, self.batch_size, self.seed, self.shuffle = samples, batch_size, seed, shuffle
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self.samples_per_epoch = count - count % batch_size if drop_last else count
        self.position = 0
        self._permutation: tuple[int, Permutation] | None = None

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.samples_per_epoch // self.batch_size)

    @property
    def epoch(self) -> float:
        """How often all samples were seen."""
        return self.position / self.samples_per_epoch

    def next_batch(self) -> Batch:
        """Our rows of the batch at `position`, which moves on."""
        epoch, start = divmod(self.position, self.samples_per_epoch)
        size = min(self.batch_size, self.samples_per_epoch - start)
        own = range(start + self.rank * size // self.world, start + (self.rank + 1) * size // self.world)
        batch = collate([self.samples[int(index)] for index in self._order(epoch, own)])
        self.position += size
        return batch

    def _order(self, epoch: int, places: range) -> Any:
        if not self.shuffle:
            return places
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = epoch, Permutation(len(self.samples), key_of("epoch", self.seed, epoch))
        return self._permutation[1](places.start, places.stop)

    # -- where it stands

    def state(self) -> dict[str, int | str]:
        """What `restore` needs; JSON."""
        return {"position": self.position, "samples_per_epoch": self.samples_per_epoch, **self._order_state()}

    def _order_state(self) -> dict[str, int | str]:
        identity = getattr(self.samples, "identity", type(self.samples).__name__)
        return {
            "corpus": identity,
            "samples": len(self.samples),
            "seed": self.seed if self.shuffle else "none, as the rows are not shuffled",
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. The number of ranks may differ, and the batch size where that can be.

        Raises ConfigError if the order of the samples would not be the same, or no batch begins at that position.
        """
        for name, own in self._order_state().items():
            if state.get(name) != own:
                raise ConfigError(
                    f"The data cannot go on where the run stopped: its {name} was {shown(state.get(name))} and is "
                    f"now {shown(own)}, so other rows would follow. Resume with what the run began with, or begin anew."
                )
        position, per_epoch = state.get("position"), state.get("samples_per_epoch")
        if not isinstance(position, int) or not isinstance(per_epoch, int) or min(position, per_epoch) < 0:
            raise ConfigError(f"The saved position of the data is damaged: {shown(state)}. Resume an older checkpoint.")
        same_epochs = per_epoch == self.samples_per_epoch or position <= min(per_epoch, self.samples_per_epoch)
        if not same_epochs or position % self.samples_per_epoch % self.batch_size:
            raise ConfigError(
                f"The run stopped after {position:,} rows, at epochs of {per_epoch:,}; with batches of "
                f"{self.batch_size:,} ({self.samples_per_epoch:,} rows an epoch) none begins there, and rows would be "
                "seen twice or never. Resume with the batch size that the run began with."
            )
        self.position = position
