"""A paged-attention engine on piecework's runtime. In: requests of token ids, whenever they come. Out: their greedy continuations, as each alone would get them.

Read it from the top: a model, attention over a paged cache, a scheduler, the engine, a demonstration. Batching is continuous, long prompts run in chunks, requests can
be cancelled, and are preempted when the cache is full. It has no tokenizer, no sampling, no prefix cache, no server. Run it with ``python -m piecework.examples.engine``.
"""

import random
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn import functional as F

import piecework
from piecework import runtime

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 64, 4, 2, 16, 256
BLOCK = 16  # slots of one block of the cache; a slot holds the key and the value of one token


# --- the model: plain torch; the tokens of all requests of a step lie one behind the other ---------
class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.before_attention, self.before_mlp = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (-1, HEAD_DIM))
        query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        out = torch.empty_like(query)  # made here, so that it has a fixed place in a static graph
        paged_attention(query, key, value, out, self.index)
        x = x + self.o(out.flatten(1))
        gate, up = self.gate_up(self.before_mlp(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, -1)  # x [tokens, heads, head dim], cos and sin [tokens, 1, head dim / 2]
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


class Decoder(nn.Module):
    """Llama's shape, seeded weights. ids, positions [tokens] -> hidden states [tokens, HIDDEN]; `head` makes logits of them."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(index) for index in range(layers))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.register_buffer("speeds", 10_000.0 ** -torch.arange(0, 1, 2 / HEAD_DIM))

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        angles = (positions[:, None] * self.speeds)[:, None]
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.norm(x)


# --- attention: the operator that the graph is cut at ----------------------------------------------
class Paged(NamedTuple):
    """What attention reads of a step. Static tensors: a graph of a whole forward was captured on them, and finds the next step there."""

    cache: torch.Tensor  # [layers, keys and values, slots, kv heads, head dim]
    positions: torch.Tensor  # [tokens]: a token sees the keys of its request up to its own
    slots: torch.Tensor  # [tokens]: where its key and value are put
    owners: torch.Tensor  # [tokens]: its request's row of `tables`
    tables: torch.Tensor  # [requests, blocks]: the blocks of the cache that a request has, in order


@piecework.splitting_op("engine::paged_attention", mutates_args=("out",), rows="context")
def paged_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, layer: int
) -> None:
    """query, out [tokens, heads, head dim]; key, value [tokens, kv heads, head dim]. The step's state comes by the forward context."""
    paged = runtime.get_forward_context().attn_metadata
    keys, values = paged.cache[layer]
    keys[paged.slots], values[paged.slots] = key, value
    (attend_in_triton if query.is_cuda else attend_in_torch)(query, keys, values, paged, out)


def attend_in_torch(query, keys, values, paged, out):
    """Gather the blocks of each token's request, and leave out what lies behind its position."""
    blocks = paged.tables[paged.owners]  # [tokens, blocks]
    keys, values = (x.unflatten(0, (-1, BLOCK))[blocks].flatten(1, 2) for x in (keys, values))
    query, keys, values = query[:, :, None], keys.transpose(1, 2), values.transpose(1, 2)
    seen = torch.arange(keys.shape[2], device=keys.device) <= paged.positions.view(-1, 1, 1, 1)
    attended = F.scaled_dot_product_attention(query, keys, values, seen, enable_gqa=True)
    out.copy_(attended[:, :, 0])


def attend_in_triton(query, keys, values, paged, out):
    """The same in one launch. It plans nothing on the host, so that a whole decode step can be one graph."""
    (tokens, heads, dim), (_, kv_heads, _) = query.shape, keys.shape
    state = (paged.positions, paged.owners, paged.tables, paged.tables.shape[1])
    sizes = (heads // kv_heads, kv_heads, dim, triton.next_power_of_2(dim), BLOCK)
    attend[tokens, heads](query, keys, values, out, *state, *sizes)


@triton.jit
def attend(
    query, keys, values, out, positions, owners, tables, width,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token, head) goes once over the blocks of the token's request, with a running softmax."""
    token, head = tl.program_id(0), tl.program_id(1)
    lane, slot = tl.arange(0, LANES), tl.arange(0, BLOCK)
    row = (token * GROUP * KV_HEADS + head) * DIM + lane
    q = tl.load(query + row, mask=lane < DIM, other=0.0).to(tl.float32) / DIM**0.5
    position = tl.load(positions + token)
    table = tables + tl.load(owners + token) * width
    highest, total, attended = -float("inf"), 0.0, tl.zeros([LANES], tl.float32)
    for number in range(0, position // BLOCK + 1):
        seen = number * BLOCK + slot <= position
        at = (tl.load(table + number) * BLOCK + slot) * KV_HEADS + head // GROUP
        where, mask = at[:, None] * DIM + lane[None, :], seen[:, None] & (lane < DIM)[None, :]
        k = tl.load(keys + where, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + where, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(q[None, :] * k, 1), -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        weights, fade = tl.exp(scores - higher), tl.exp(highest - higher)
        attended = attended * fade + tl.sum(weights[:, None] * v, 0)
        highest, total = higher, total * fade + tl.sum(weights, 0)
    tl.store(out + row, (attended / total).to(out.dtype.element_ty), mask=lane < DIM)


# --- the scheduler: which tokens run next, and where they lie in the cache; it knows no model ------
@dataclass(frozen=True)
class Limits:
    tokens: int = 64  # of one step, over all requests
    requests: int = 8  # that run at a time
    length: int = 256  # of one request, prompt and output
    blocks: int = 129  # of the cache; the first is nobody's: padding is written there


@dataclass(eq=False)
class Request:
    tokens: list[int]  # the prompt, and then what is generated
    length: int  # how many tokens there are when it is finished
    cached: int = 0  # of how many the keys and values are in the cache
    blocks: list[int] = field(default_factory=list)


class Scheduler:
    def __init__(self, limits: Limits) -> None:
        self.limits, self.preemptions = limits, 0
        self.free = list(range(1, limits.blocks))
        self.waiting, self.running = [], []  # both with the oldest request first

    def add(self, request: Request) -> None:
        most = min(self.limits.length, (self.limits.blocks - 1) * BLOCK)
        if not 0 < len(request.tokens) < request.length <= most:
            raise ValueError(f"a request has a prompt and at most {most} tokens; got {request}")
        self.waiting.append(request)

    def next_batch(self) -> dict[Request, int]:
        """How many tokens of each request run next: one that decodes has one, others a part of their prompt."""
        batch: dict[Request, int] = {}
        budget = self.limits.tokens
        while len(batch) < len(self.running) and budget:
            request = self.running[len(batch)]
            count = min(len(request.tokens) - request.cached, budget)
            while not self._reserve(request, request.cached + count):
                youngest = self.running.pop()  # none of the batch: those are older
                self._release(youngest)  # it will compute all its tokens again
                self.waiting.insert(0, youngest)
                self.preemptions += 1
                if youngest is request:
                    return batch
            batch[request] = count
            budget -= count
        while self.waiting and len(self.running) < self.limits.requests and budget:
            if not self._reserve(self.waiting[0], len(self.waiting[0].tokens)):
                break
            self.running.append(request := self.waiting.pop(0))
            batch[request] = min(len(request.tokens), budget)
            budget -= batch[request]
        return batch

    def remove(self, request: Request) -> None:
        """Forget a request that is finished or cancelled."""
        (self.running if request in self.running else self.waiting).remove(request)
        self._release(request)

    def _reserve(self, request: Request, length: int) -> bool:
        more = -(-length // BLOCK) - len(request.blocks)
        if more > len(self.free):
            return False
        request.blocks += [self.free.pop() for _ in range(more)]
        return True

    def _release(self, request: Request) -> None:
        self.free += request.blocks
        request.blocks, request.cached = [], 0


# --- the engine: one step is schedule, stage, dispatch, run, choose --------------------------------
class Engine:
    """Batches of the sizes given, in tokens, are padded to and run as static graphs; without sizes the model runs as it is."""

    def __init__(self, model: Decoder, limits: Limits, sizes=(), config=None) -> None:
        self.model, self.forward, self.scheduler = model, model, Scheduler(limits)
        weight = model.embed.weight
        slots, self.width = limits.blocks * BLOCK, -(-limits.length // BLOCK)
        self.cache = weight.new_zeros(len(model.layers), 2, slots, KV_HEADS, HEAD_DIM)
        # What attention reads has its place for good. Padding is 0: position 0, and slot 0, which is nobody's.
        one = torch.zeros(1, dtype=torch.long, device=weight.device)
        state = {"positions": one, "slots": one, "owners": one, "tables": one.repeat(1, self.width)}
        self.static = runtime.StaticInputs.allocate(state, limits.tokens)
        uncaptured = runtime.CudagraphDispatcher(runtime.CUDAGraphMode.NONE, [], max_num_seqs=1)
        self.dispatch = uncaptured.dispatch
        if sizes:
            example = (one.repeat(2), one.repeat(2))
            most = {"max_num_batched_tokens": limits.tokens, "max_num_seqs": limits.requests}
            self.forward = piecework.compile(model, example, config=config, runtime_config=most)
            self.forward.capture(  # one graph where all requests decode, else one for each piece
                sizes, mode="FULL_AND_PIECEWISE", context_for=self.context, pad=True, put_back=False
            )
            self.cache.zero_()  # runs on dummy data wrote to slot 0, and nobody put it back
            self.dispatch = self.forward.dispatch

    def context(self, mode: object, shape: runtime.BatchDescriptor) -> object:
        """What a forward runs in, captured or served: as what, and what attention reads."""
        paged = Paged(self.cache, *self.static.views(shape.num_tokens))
        return runtime.set_forward_context(
            paged, cudagraph_runtime_mode=mode, batch_descriptor=shape
        )

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Run some tokens of some requests; returns the requests that are finished."""
        if not (batch := self.scheduler.next_batch()):
            return []
        rows = [
            (request.tokens[at], at, request.blocks[at // BLOCK] * BLOCK + at % BLOCK, owner)
            for owner, (request, count) in enumerate(batch.items())
            for at in range(request.cached, request.cached + count)
        ]
        ids, *state = torch.tensor(rows, device=self.cache.device).T.contiguous()
        blocks = [request.blocks + [0] * (self.width - len(request.blocks)) for request in batch]
        state.append(torch.tensor(blocks, device=self.cache.device))
        mode, shape = self.dispatch(len(rows), uniform_decode=len(rows) == len(batch))
        self.static.stage(state, shape.num_tokens)
        with self.context(mode, shape):
            hidden = self.forward(ids, state[0])
        last = torch.tensor(list(batch.values())).cumsum(0) - 1
        chosen = self.model.head(hidden[last]).argmax(-1).tolist()
        for (request, count), token in zip(batch.items(), chosen, strict=True):
            request.cached += count
            if request.cached == len(request.tokens):  # else its prompt goes on in the next step
                request.tokens.append(token)
            if len(request.tokens) == request.length:
                self.scheduler.remove(request)
        return [request for request in batch if len(request.tokens) == request.length]


def main(backend: str = "inductor", sizes=(1, 2, 4, 8, 16, 32)) -> Engine:
    """Serve requests that come at random, cancel some, and generate the others again, one by one."""
    torch.set_num_threads(1)  # in work as small as this, threads wait for each other
    draw, limits = random.Random(0), Limits(blocks=20)
    model = Decoder().to("cuda" if torch.cuda.is_available() else "cpu")
    engine, one_by_one = Engine(model, limits, sizes, {"backend": backend}), Engine(model, limits)
    prompts = [draw.choices(range(VOCABULARY), k=draw.randint(1, 90)) for _ in range(32)]
    prompt_of = {Request(list(each), len(each) + draw.randint(1, 60)): each for each in prompts}
    coming, finished, steps, start = list(prompt_of), [], 0, time.perf_counter()
    while coming or engine.scheduler.waiting or engine.scheduler.running:
        if coming and draw.random() < 0.2:
            engine.scheduler.add(coming.pop())
        if engine.scheduler.running and draw.random() < 0.01:
            engine.scheduler.remove(draw.choice(engine.scheduler.running))
        finished += engine.step()
        steps += 1
    generated = sum(each.length - len(prompt_of[each]) for each in finished)
    print(f"{steps} steps, {generated / (time.perf_counter() - start):.0f} tokens a second")
    print(f"{len(prompts) - len(finished)} cancelled, {engine.scheduler.preemptions} preemptions")
    for row in engine.forward.call_report():
        print(f"{row.calls} steps ran {row.mode} {row.graph or '-'}, padded by {row.padding} rows")
    for request in finished:
        one_by_one.scheduler.add(again := Request(prompt_of[request], request.length))
        while again not in one_by_one.step():
            pass
        assert again.tokens == request.tokens, "batching changed the tokens"
    print(f"{len(finished)} finished, each with the tokens of one-by-one generation")
    return engine


if __name__ == "__main__":
    main()
