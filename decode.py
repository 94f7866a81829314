"""Sampling: which token is drawn, and a decoder that keeps its batch full. `policy.Policy` uses both; neither knows of texts.

Sections: 1 the draw and the plain way, 2 the cache, 3 the decoder.

- A token is drawn by inverse CDF from one number that belongs to its place in its row: (stream of the row, position). So a row's
  answer is the same in any batch, at any memory budget and after any retry, up to the rounding of logits.
- `transformers.generate` is the reference: it plays in lock step, and all rows wait for the longest answer. Here a row that ends is
  read its next prompt while the others go on, over a static cache in which each row has its own length. On CUDA a step is one graph
  for each shape of the batch: launching its thousands of kernels one by one takes many times what they compute.

Axes: B rows, T tokens of a prompt, L places of the cache, V ids.
"""

from __future__ import annotations

import inspect
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)      # rows of a CUDA graph
SPAN = dict(cuda=256, cpu=64)           # lengths of the cache that a step looks at are multiples of this
PREFILL = 16384                         # padded prompt tokens read at once: bounds their activations
WAITING = 8                             # prompts are read once there is one for so many live rows: reading few costs as much

Ask = tuple[list[int], int]             # a prompt's ids, and the stream of random numbers that its answer is drawn with
Follow = Callable[[int, list[int]], "Ask | None"]


# ---- 1. The draw, and the plain way ---------------------------------------------------------------------------

def uniforms(dice: Iterable[int], n: int) -> torch.Tensor:
    """The first n numbers of each stream, uniform in [0, 1): (B, n), float64. A stream is any integer of 0..2^63."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=d)).random(n) for d in dice]))


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B,) drawn from logits (B, V) by inverse CDF at these numbers (B,), and their log-probabilities (B,), in nats; the
    likeliest, as at temperature 1, where it is 0. Ids from `vocab` on are padding of the weight matrix, never drawn."""
    p = (logits[:, :vocab].float() / (temperature or 1.0)).softmax(-1)                                      # (B, V)
    if temperature:
        # In float64: in float32 an id of probability 1e-8 would be lost in the sum, and of 150,000 ids such are not few.
        cdf = p.cumsum(-1, dtype=torch.float64)
        total = cdf[:, -1:]
        at = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
        ids = torch.searchsorted(cdf, at, right=True)
    else:
        ids = logits[:, :vocab].argmax(-1, keepdim=True)
    return ids.squeeze(1), p.gather(1, ids).squeeze(1).log()


class Answer(list[int]):
    """The sampled ids of a response, and each one's log-probability when it was drawn."""

    def __init__(self, ids: Iterable[int] = (), logp: Iterable[float] = ()) -> None:
        super().__init__(ids)
        self.logp = [*logp]


def in_lock_step(asks: Iterable[tuple[int, Ask]], follow: Follow, speak: Callable[[list[Ask]], Sequence[list[int]]],
                 at_once: int) -> None:
    """Ask so many, hear them all, and ask on: the plain way to answer in batches, where all wait for the longest answer."""
    fresh, going = iter(asks), dict[int, Ask]()
    while going := going | dict(islice(fresh, at_once - len(going))):
        said = speak([*going.values()])
        going = {i: more for i, ids in zip(going, said) if (more := follow(i, ids)) is not None}


# ---- 2. The cache ----------------------------------------------------------------------------------------------

class Unservable(Exception):
    """A model that the decoder can't serve; says why."""


class Slots(StaticLayer):
    """Keys and values of B rows over L places, (B, heads, L, width). Row b writes at its own place `at[b]`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.at, self.is_initialized = keys, values, at, True
        self.row = torch.arange(len(at), device=at.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token of each row; what attention then reads."""
        self.keys[self.row, :, self.at] = key_states[:, :, 0]
        self.values[self.row, :, self.at] = value_states[:, :, 0]
        return self.keys, self.values


# ---- 3. The decoder --------------------------------------------------------------------------------------------

@dataclass
class Live:
    """A row that is being answered."""
    i: int
    prompt: list[int]
    said: Answer = field(default_factory=Answer)


class Decoder:
    """Answers to prompts, at most `rows` of them together, prompt and answer of one within `length` tokens. Made for a rollout
    and dropped after it, with its memory; `work` counts steps, and in them rows that were live and computed. Unservable for a
    model whose cache is not one of keys and values of all tokens."""

    def __init__(self, model: Any, head: Callable[[torch.Tensor], torch.Tensor], rows: int, length: int, vocab: int,
                 work: Counter[str]) -> None:
        self.model, self.head, self.rows, self.vocab, self.work = model, head, rows, vocab, work
        weight = model.get_output_embeddings().weight
        self.device, self.dtype, self.span = weight.device, model.dtype, SPAN[weight.device.type]
        self.length = -(-length // self.span) * self.span
        self.cache_name = "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"
        self.store: list[tuple[torch.Tensor, torch.Tensor]] = []            # of each layer, (rows, heads, length, width)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=self.device)       # each row's last token
        self.at = torch.zeros(rows, dtype=torch.long, device=self.device)           # the place of that token, once it is fed
        self.count = torch.zeros(rows, dtype=torch.long, device=self.device)        # tokens answered
        self.shapes: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}           # of a batch: its graph, its logits
        self.pool: Any = None

    def allocate(self, layers: Sequence[Any]) -> None:
        """Room for all rows, shaped as a cache that has been read into."""
        if strange := [type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer]:
            raise Unservable(f"its cache has a {strange[0]}")
        self.store = [(layer.keys.new_zeros(self.rows, layer.keys.shape[1], self.length, layer.keys.shape[3]),
                       layer.values.new_zeros(self.rows, layer.values.shape[1], self.length, layer.values.shape[3]))
                      for layer in layers]

    def admit(self, first: int, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Read prompts into the slots from `first` on. The logits (n, V) of the first token of each answer."""
        # Rollouts of a group begin with one prompt, and meet again: equal prompts are read once.
        places: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            places.setdefault(tuple(prompt), []).append(i)
        out: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
        order = sorted(places, key=len)
        while order:
            n, width = max(1, PREFILL // len(order[-1])), len(order[-1])            # the longest first, as many as fit
            part, order = order[-n:], order[:-n]
            # Padding on the right and causal attention: no mask is needed, which is what fast attention kernels ask for.
            ids = torch.tensor([[*prompt, *prompt[:1] * (width - len(prompt))] for prompt in part], device=self.device)     # (n, T)
            cache = DynamicCache(config=self.model.config)
            hidden = self.model.base_model(input_ids=ids, use_cache=True, **{self.cache_name: cache}).last_hidden_state
            if not self.store:
                self.allocate(cache.layers)
            last = torch.tensor([len(prompt) - 1 for prompt in part], device=self.device)
            logits = self.head(hidden[torch.arange(len(part), device=self.device), last])
            of = [(row, i) for row, prompt in enumerate(part) for i in places[prompt]]
            row, slot = torch.tensor([(row, first + i) for row, i in of], device=self.device).T
            for (keys, values), layer in zip(self.store, cache.layers):
                keys[slot, :, :width], values[slot, :, :width] = layer.keys[row], layer.values[row]
            self.at[slot], self.count[slot] = last[row], 0                          # `step` moves on by one
            for r, i in of:
                out[i] = logits[r]
        return torch.stack(out)

    def forward(self, rows: int, length: int) -> torch.Tensor:
        """One step of the first rows, looking at the first `length` places: the logits (rows, V)."""
        at = self.at[:rows].clamp(max=length - 1)                                   # rows at rest: anywhere
        cache = Cache(layers=[Slots(keys[:rows, :, :length], values[:rows, :, :length], at) for keys, values in self.store])
        seen = torch.arange(length, device=self.device) <= at[:, None]                                      # (B, L)
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, -torch.inf)
        hidden = self.model.base_model(input_ids=self.ids[:rows], position_ids=at[:, None], use_cache=True,
                                       attention_mask=mask[:, None, None], **{self.cache_name: cache}).last_hidden_state
        return self.head(hidden[:, -1])

    def step(self, n: int, longest: int) -> torch.Tensor:
        """Feed the first n rows their last token; `longest` is how long the longest then is. The next logits (n, V)."""
        self.at[:n] += 1
        length = min(self.length, -(-longest // self.span) * self.span)
        rows = n if self.device.type == "cpu" else min(self.rows, next((s for s in SIZES if s >= n), n))
        self.work.update(steps=1, live=n, rows=rows)
        if self.device.type == "cpu":
            return self.forward(rows, length)
        if (rows, length) not in self.shapes:
            self.shapes[rows, length] = self.capture(rows, length)
        graph, logits = self.shapes[rows, length]
        graph.replay()
        return logits[:n]

    def capture(self, rows: int, length: int) -> tuple[Any, torch.Tensor]:
        """The CUDA graph of a step of this shape, and where it leaves its logits. All graphs share one pool of memory."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                                               # libraries make their workspaces here
            self.forward(rows, length)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.forward(rows, length)
        self.pool = graph.pool()
        return graph, logits

    def leave(self, live: list[Live], slot: int) -> None:
        """Take a row out; the last one moves into its slot, so that the batch has no holes."""
        last = len(live) - 1
        if slot != last:
            for tensor in (self.ids, self.at, self.count, self.uniform, *(part for layer in self.store for part in layer)):
                tensor[slot] = tensor[last]
            live[slot] = live[last]
        live.pop()

    @torch.no_grad()
    def answer(self, asks: Iterable[tuple[int, Ask]], follow: Follow, ended: Callable[[list[int]], bool], temperature: float,
               max_new: int) -> None:
        """Answer all that is asked, until `ended` says that an answer's ids end, or with `max_new` ids. `follow` takes an answer
        and returns what its number is asked next, or None; `asks` are read as places fall free."""
        fresh, queue, live = iter(asks), deque[tuple[int, Ask]](), list[Live]()
        self.uniform = torch.zeros(self.rows, max_new, dtype=torch.float64, device=self.device)
        dry = False                                     # nobody is left to ask for the first time
        while live or queue or not dry:
            # Prompts are read once there is room for enough of them, or nothing else is left to do.
            room = self.rows - len(live)
            if (n := min(room, len(queue)) if dry else room) and n * WAITING >= len(live):
                new = [queue.popleft() for _ in range(min(n, len(queue)))]
                new += islice(fresh, n - len(new))
                dry = dry or len(new) < n
                if not new:
                    continue
                heard = slice(len(live), len(live) + len(new))
                live += [Live(i, prompt) for i, (prompt, _) in new]
                self.uniform[heard] = uniforms([dice for _, (_, dice) in new], max_new).to(self.device)
                logits = self.admit(heard.start, [prompt for _, (prompt, _) in new])
            else:
                heard = slice(0, len(live))
                logits = self.step(len(live), max(len(row.prompt) + len(row.said) for row in live))
            numbers = self.uniform[heard].gather(1, self.count[heard, None]).squeeze(1)
            tokens, logp = draw(logits, numbers, temperature, self.vocab)
            self.ids[heard, 0] = tokens
            self.count[heard] += 1
            # From the last slot on, so that what moves into a slot that falls empty has been heard.
            for slot, token, value in reversed([*zip(range(heard.start, heard.stop), tokens.tolist(), logp.tolist())]):
                row = live[slot]
                row.said.append(token)
                row.said.logp.append(value)
                if len(row.said) == max_new or ended(row.said):
                    self.leave(live, slot)
                    if (more := follow(row.i, row.said)) is not None:
                        queue.append((row.i, more))
