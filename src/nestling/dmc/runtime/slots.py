"""A cache layer whose heads hold different numbers of slots, in pages: a door of transformers (`CacheLayerMixin`).

Keys (rotated) and values of all heads of a layer lie in one pool of pages of 32 rows; a table says which pages are a
head's. Where tokens merge, only the newest slot of a head ever changes, and beside it stand the running sums of that
slot in float32: weighted key (not rotated), weighted value, weight. Where tokens are dropped, a new one takes the place
of one that was, and beside the slots stands which of them hold the newest tokens; the order of slots means nothing, as
keys are rotated, but the newest token is in the last. To transformers the layer is as long as the text it has seen, so
positions, masks and `generate` need not know that it holds less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .gates import wide

PAGE = 32  # rows; on average half a page per head is empty
GROWTH = 8  # the pool grows by this part (1/8) at least, so a row is copied about eight times at most
OF_ROWS = ("sums", "length", "ended", "recent", "seen")
TENSORS = ("keys", "values", "table", "used", *OF_ROWS)


class SlotLayer(CacheLayerMixin):
    """One layer's slots.

    keys, values: `[pages, PAGE, dim]`. table: `[batch, heads, columns]`, number of each page of a head. length: slots
    `[batch, heads]`. sums: `[batch, heads, 2 dim + 1]`. ended: whether the last token parted documents `[batch]`.
    recent: slot of token t at t modulo its size `[batch, heads, window + 1]`, and -1 - slot where the token will be
    dropped; of size 0 where tokens merge, as sums are where they do not. seen: real tokens so far `[batch]`.
    tokens: text seen so far. used: pages in use `[1]`.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.tokens = 0
        self.keys: Any  # tensors once initialized
        self.values: Any

    # ---- what transformers asks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor, recent: int = 0) -> None:
        """Empty, for keys and values `[batch, heads, *, dim]`; `recent` newest tokens are kept whatever is decided."""
        batch, heads, _, dim = key_states.shape
        device = key_states.device
        self.keys, self.values = (states.new_empty(0, PAGE, dim) for states in (key_states, value_states))
        width = 0 if recent else 2 * dim + 1
        self.sums = torch.zeros(batch, heads, width, dtype=wide(key_states.dtype), device=device)
        self.recent = torch.zeros(batch, heads, recent, dtype=torch.int32, device=device)
        self.seen = torch.zeros(batch, dtype=torch.long, device=device)
        self.length = torch.zeros(batch, heads, dtype=torch.long, device=device)
        self.table = torch.zeros(batch, heads, 1, dtype=torch.long, device=device)
        self.used = torch.zeros(1, dtype=torch.long, device=device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.dtype, self.device = key_states.dtype, device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not called by a model with a compressed cache: its attention writes here itself, since it knows the gates."""
        raise ValueError("this cache belongs to a model with a compressed cache: call that model with it")

    def get_seq_length(self) -> int:
        """Tokens seen, not slots held."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.tokens = False, 0
        self.keys = self.values = None

    def crop(self, tokens_to_remove: int) -> None:
        """Only all tokens or none can be taken back: what was merged cannot be parted again. Raises `ValueError`."""
        if tokens_to_remove >= self.tokens:
            self.reset()
        elif tokens_to_remove > 0:
            raise ValueError(
                f"a compressed cache cannot give back its last {tokens_to_remove} tokens, since tokens were merged: "
                f"generate without an assistant or prompt lookup"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.length)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch; each gets pages of its own."""
        if not self.is_initialized:
            return
        rows = torch.arange(len(self.length), device=self.device)[indices.to(self.device)]
        old = self.table[rows]
        for name in OF_ROWS:
            setattr(self, name, getattr(self, name)[rows].contiguous())
        pages = -(-self.length // PAGE)
        held = torch.arange(old.shape[-1], device=self.device) < pages.unsqueeze(-1)
        source = old[held]
        self.keys, self.values = self.keys[source], self.values[source]
        self.table = torch.zeros_like(old)
        self.table[held] = torch.arange(len(source), device=self.device)
        self.used = torch.full_like(self.used, len(source))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything back."""
        self._move(self.device)

    # ---- what attention asks

    @property
    def nbytes(self) -> int:
        """Bytes held: pages, running sums, tables."""
        if not self.is_initialized:
            return 0
        return sum(getattr(self, name).numel() * getattr(self, name).element_size() for name in TENSORS)

    def tensors(self) -> list[Tensor]:
        """Those of `TENSORS`, each in one piece, for loops that write to them."""
        for name in TENSORS:
            if not getattr(self, name).is_contiguous():
                setattr(self, name, getattr(self, name).contiguous())
        return [getattr(self, name) for name in TENSORS]

    def restore(self, found: dict[str, Tensor], tokens: int) -> None:
        """Take over the tensors of another layer, by their names in `TENSORS`."""
        for name in TENSORS:
            setattr(self, name, found[name])
        self.dtype, self.device = found["keys"].dtype, found["keys"].device
        self.tokens, self.is_initialized = tokens, True

    def check(self, key_states: Tensor, recent: int) -> None:
        """Raises `ValueError` unless this holds what keys `[batch, heads, *, dim]` go on: loops would not notice."""
        given = (*key_states.shape[:2], key_states.shape[-1], recent)
        held = (*self.length.shape, self.keys.shape[-1], self.recent.shape[-1])
        if given != held:
            names = "sequences, heads, channels, newest tokens that stay"
            raise ValueError(f"this cache is of another batch or model: it holds {held} {names}, and is given {given}")

    def reserve(self, length: Tensor) -> None:
        """Make room for heads of that length `[batch, heads]`, and note which pages are whose."""
        wanted, held = -(-length // PAGE), -(-self.length // PAGE)
        self.make_room(int((wanted - held).clamp_min(0).sum()), int(wanted.max()))
        columns = torch.arange(self.table.shape[-1], device=self.device)
        new = (columns >= held.unsqueeze(-1)) & (columns < wanted.unsqueeze(-1))
        count = int(new.sum())
        self.table[new] = torch.arange(count, device=self.device) + self.used
        self.used += count

    def make_room(self, pages: int, columns: int) -> None:
        """At least that many free pages in the pool, and columns in the table."""
        missing = int(self.used) + pages - len(self.keys)
        if missing > 0:
            grown = max(missing, len(self.keys) // GROWTH)
            self.keys, self.values = (_longer(pool, grown) for pool in (self.keys, self.values))
        if columns > self.table.shape[-1]:
            self.table = torch.nn.functional.pad(self.table, (0, max(columns, 8) - self.table.shape[-1] + columns // 8))

    def read(self, row: int, head: int, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` keys and values `[count, dim]` of a head."""
        pages = self.table[row, head, : -(-count // PAGE)]
        return self.keys[pages].flatten(0, 1)[:count], self.values[pages].flatten(0, 1)[:count]

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values `[batch, heads, rows, dim]` up to the longest head, and which rows are slots."""
        table = self.table[..., : max(1, -(-int(self.length.max()) // PAGE))]
        rows = torch.arange(table.shape[-1] * PAGE, device=self.device)
        keys, values = (pool[table].flatten(2, 3) for pool in (self.keys, self.values))
        return keys, values, rows < self.length.unsqueeze(-1)

    def write(self, row: Tensor, head: Tensor, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values `[n, dim]` into slots, given by three index tensors `[n]`."""
        place = (self.table[row, head, slot // PAGE], slot % PAGE)
        self.keys[place], self.values[place] = keys.to(self.keys.dtype), values.to(self.values.dtype)

    def _move(self, device: torch.device) -> None:
        if self.is_initialized:
            for name in TENSORS:
                setattr(self, name, getattr(self, name).to(device, non_blocking=True))


def _longer(pool: Tensor, pages: int) -> Tensor:
    new = pool.new_empty(len(pool) + pages, *pool.shape[1:])
    new[: len(pool)], new[len(pool) :] = pool, 0
    return new
