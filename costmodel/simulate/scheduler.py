"""What an engine puts into its next step: the policies of vLLM (V1) and of MindIE.

chunked (vllm-ascend)   every sequence that decodes gets its tokens first; then the prompt that was
                        begun, then waiting ones in order, as long as tokens of the step, slots and
                        blocks are left. Blocks are taken as tokens come; where none is left, the
                        sequence admitted last gives up all of its own, and is computed again later
                        as the first in line (preemption by recompute). A step that preempts admits
                        nothing.
prompts first (mindie)  while a prompt waits and finds a slot and blocks, steps are of prompts
                        alone: whole ones up to the tokens and the number of prompts of a step, a
                        longer one in pieces. Blocks are reserved for prompt and output together
                        (maxPreemptCount is 0 by default), so nothing is preempted.

An engine is one data-parallel group. A pipeline of p stages runs p batches; they share queue,
blocks and slots, and are kept as even as whole requests allow.

Blocks for the tokens of a step are there before it runs: w = 1 + k of a decoding sequence, k of
them predicted ahead. A sequence gains 1 to w tokens a step, drawn for each request; its context
grows by their mean, so that a step costs nothing for each sequence in it.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import Protocol

from shardplan.costmodel.simulate.batch import Batch, Policy
from shardplan.costmodel.simulate.blocks import Blocks
from shardplan.costmodel.simulate.request import Request

__all__ = ["Engine", "Events"]


class Events(Protocol):
    """Who is told what becomes of requests."""

    def steps_for(self, tokens: int) -> int:
        """Decode steps that give so many tokens."""

    def prompt_done(self, engine: Engine, request: Request, now_s: float) -> bool:
        """A prompt is computed; whether the request decodes elsewhere."""

    def ended(self, engine: Engine, request: Request, now_s: float) -> None:
        """A request has all its tokens."""


class Engine:
    """The scheduler of one data-parallel group."""

    def __init__(self, number: int, policy: Policy, blocks: Blocks, events: Events) -> None:
        self.number, self.policy, self.blocks, self.events = number, policy, blocks, events
        self.waiting: deque[Request] = deque()
        self.waiting_tokens = 0
        """Prompt tokens in the queue."""
        self.batches = [Batch() for _ in range(policy.batches)]
        self.claimed = 0
        """Slots kept for requests whose cache is on its way."""
        self.coming: deque[tuple[Request, Engine]] = deque()
        """Those that will decode here, with the engine that still holds their cache."""
        self.ready: deque[tuple[Request, int]] = deque()
        """Those whose cache is there, with its blocks."""
        self.load = 0
        """Requests that wait or run here, or are about to."""
        self._places = 0

    @property
    def running(self) -> int:
        """Requests that were admitted."""
        return sum(len(batch.running) for batch in self.batches)

    def add(self, request: Request) -> None:
        """A request comes."""
        self.waiting.append(request)
        self.waiting_tokens += request.prompt
        self.load += 1
        request.unit = self.number

    # A step is filled, ...

    def fill(self, batch: Batch) -> bool:
        """Choose what the batch's next step holds; whether it holds anything."""
        batch.fed, batch.tokens, batch.pairs, batch.active = [], 0, 0.0, 0
        if self.ready:
            self._receive(batch)
        if self.policy.prompts_first:
            self._admit(batch, self.policy.chunk)
            if not batch.fed:
                batch.active = batch.decoding
        else:
            preempted = self._grow(batch)
            room = self.policy.chunk - batch.decoding * self.policy.width
            if batch.begun is not None and room > 0:
                preempted |= not self._go_on(batch, batch.begun, room)
            if not preempted:
                self._admit(batch, room - batch.tokens)
            batch.active = batch.decoding
        return bool(batch.fed or batch.active)

    def _feed(self, batch: Batch, request: Request, tokens: int) -> None:
        batch.fed.append((request, tokens))
        batch.tokens += tokens
        batch.pairs += tokens * (request.computed + tokens / 2.0)
        done = request.computed + tokens >= request.prompt
        batch.begun = None if done else request

    def _go_on(self, batch: Batch, request: Request, room: int) -> bool:
        """Another piece of the prompt that was begun; False where blocks are short."""
        tokens = min(request.prompt - request.computed, room)
        held = request.blocks + len(request.shared) * self.blocks.part
        more = self.blocks.needed(request.computed + tokens) - held
        if more > 0:
            if not self.blocks.take(more):
                self._preempt(batch, request)
                return False
            request.blocks += more
        self._feed(batch, request, tokens)
        return True

    def _share_of(self, batch: Batch) -> int:
        """Requests that a batch may hold: slots are spread evenly over the batches."""
        count = len(self.batches)
        if count == 1:
            return self.policy.slots - self.claimed
        there = self.running + len(self.waiting) + self.claimed
        return -(-min(self.policy.slots, there) // count)

    def _admit(self, batch: Batch, room: int) -> None:
        """Waiting prompts, in order, as long as there is room."""
        policy, waiting = self.policy, self.waiting
        if batch.begun is not None:  # of an engine that lets prompts go first
            self._feed(batch, batch.begun, min(batch.begun.prompt - batch.begun.computed, room))
            room -= batch.tokens
        if not waiting:
            return
        most = self._share_of(batch)
        while waiting and room > 0 and len(batch.running) < most and batch.begun is None:
            request = waiting[0]
            found, hit = self._found(request)
            tokens = request.prompt - hit
            full = tokens > room or len(batch.fed) >= policy.most_prompts
            if policy.prompts_first and batch.fed and full:
                return
            tokens = min(tokens, room)
            if not self._reserve(request, found, hit + tokens):
                return
            waiting.popleft()
            self.waiting_tokens -= request.prompt
            self._place(batch, request)
            request.computed = hit
            self._feed(batch, request, tokens)
            room -= tokens

    def _found(self, request: Request) -> tuple[list[int], int]:
        """(parts of its prefix, tokens) that need not be computed: never the whole prompt."""
        if request.prefix:
            part = self.blocks.part * self.blocks.tokens
            whole = min(request.input_len, request.prompt - 1) // part
            count = self.blocks.found(request.prefix[:whole])
            return list(request.prefix[:count]), count * part
        return [], self.hit_tokens(request.input_len)

    def known_tokens(self, request: Request) -> int:
        """Tokens of a prompt that need not be computed here."""
        return self._found(request)[1]

    def hit_tokens(self, input_len: int) -> int:
        """Tokens of a prompt that are found where no prefix is told."""
        share = 1.0 - self.policy.prefix_hit
        return input_len - max(-int(-input_len * share // 1), 1)

    def _reserve(self, request: Request, found: list[int], tokens: int) -> bool:
        """Take the blocks of a prompt that is admitted; False, and nothing taken, if short."""
        if self.policy.prompts_first and not self.policy.sends:
            tokens = self._most_tokens(request)
        self.blocks.use(found)
        more = self.blocks.needed(tokens) - len(found) * self.blocks.part
        if not self.blocks.take(more):
            self.blocks.leave(found)
            return False
        request.blocks, request.shared = more, found
        return True

    def _most_tokens(self, request: Request) -> int:
        """Tokens of a request's cache at its end, those of its last step that are refused too."""
        return request.input_len + request.output_len + self.policy.width - 1

    def fits(self, request: Request) -> bool:
        """Whether the engine can hold the request at all."""
        tokens = request.input_len if self.policy.sends else self._most_tokens(request)
        return self.blocks.needed(tokens) <= self.blocks.total

    def _place(self, batch: Batch, request: Request) -> None:
        self._places += 1
        request.place = self._places
        batch.running[request.place] = request

    # ... sequences take blocks or are preempted, ...

    def _grow(self, batch: Batch) -> bool:
        """Blocks for the tokens of the next step; whether any sequence had to give way."""
        growing, preempted = batch.growing, False
        while growing and growing[0][0] <= batch.step:
            _, place, request = heappop(growing)
            if batch.running.get(place) is not request:
                continue
            while not self.blocks.take(1):
                last = batch.running[next(reversed(batch.running))]
                self._preempt(batch, last)
                preempted = True
                if last is request:
                    break
            else:
                request.blocks += 1
                self._watch(batch, request)
        return preempted

    def _watch(self, batch: Batch, request: Request) -> None:
        """Remember the step for which the request wants another block."""
        if self.policy.prompts_first:
            return
        held = (request.blocks + len(request.shared) * self.blocks.part) * self.blocks.tokens
        room = held - request.context - self.policy.width
        step = request.step + int(room // request.tokens_a_step) + 1
        if step < request.end_step:
            heappush(batch.growing, (step, request.place, request))

    def _preempt(self, batch: Batch, request: Request) -> None:
        """Give up what it holds; it will be computed again, with the tokens that it has made."""
        if request is batch.begun:
            batch.begun = None
            del batch.running[request.place]
        else:
            gained = request.tokens_a_step * (batch.step - request.step)
            self._remove(batch, request)
            request.made = min(request.made + int(gained), request.output_len - 1)
        self.release(request)
        request.prompt, request.computed = request.input_len + request.made, 0
        request.preempted += 1
        self.waiting.appendleft(request)
        self.waiting_tokens += request.prompt

    def _remove(self, batch: Batch, request: Request) -> None:
        """A sequence leaves those that decode."""
        del batch.running[request.place]
        if request in batch.fresh:
            batch.fresh.remove(request)
        batch.decoding -= 1
        if batch.decoding:
            gained = request.tokens_a_step * (batch.step - request.step)
            batch.context -= request.context + gained
            batch.growth -= request.tokens_a_step
        else:
            batch.context = batch.growth = 0.0

    def release(self, request: Request) -> None:
        """Give back all blocks of a request."""
        self.blocks.give(request.blocks)
        self.blocks.leave(request.shared)
        request.blocks, request.shared = 0, []

    # ... it lasts as long as nothing changes, ...

    def alike(self, batch: Batch, most: int) -> int:
        """Decode steps from here on that hold the same sequences and find their blocks."""
        ends = batch.ends
        while ends and batch.running.get(ends[0][1]) is not ends[0][2]:
            heappop(ends)
        if not ends or batch.fresh:
            return 1
        steps = min(ends[0][0] - batch.step, most)
        growing, left = batch.growing, self.blocks.available
        while growing and growing[0][0] < batch.step + steps:
            if batch.running.get(growing[0][1]) is not growing[0][2]:
                heappop(growing)
            elif left > 0:
                left -= 1
                batch.pending.append(heappop(growing))
            else:
                steps = growing[0][0] - batch.step
        return max(steps, 1)

    # ... and it is over.

    def complete(self, batch: Batch, steps: int, now_s: float) -> None:
        """The step, or `steps` decode steps in a row, ends."""
        if batch.active:
            batch.step += steps
            batch.context += batch.growth * steps
            self._settle(batch)
            for request in batch.fresh:
                request.first_s = now_s
            batch.fresh.clear()
            ends = batch.ends
            while ends and ends[0][0] <= batch.step:
                _, place, request = heappop(ends)
                if batch.running.get(place) is request:
                    self._remove(batch, request)
                    self._end(request, now_s)
        for request, tokens in batch.fed:
            request.computed += tokens
            if request.computed >= request.prompt:
                self._prompt_done(batch, request, now_s)
        batch.fed = []

    def _settle(self, batch: Batch) -> None:
        """Take the blocks that the steps which have run wanted."""
        pending, batch.pending = batch.pending, []
        for one in pending:
            if one[0] < batch.step and self.blocks.take(1):
                one[2].blocks += 1
                self._watch(batch, one[2])
            else:
                heappush(batch.growing, one)

    def _prompt_done(self, batch: Batch, request: Request, now_s: float) -> None:
        if request.prefix and not request.made:
            self._share(request)
        if self.events.prompt_done(self, request, now_s):
            del batch.running[request.place]
            self.load -= 1
            return
        request.made += 1
        if request.first_s < 0.0:
            request.first_s = now_s
        if request.made >= request.output_len:
            del batch.running[request.place]
            self._end(request, now_s)
        else:
            self._decode(batch, request, request.prompt, request.output_len - request.made)

    def _share(self, request: Request) -> None:
        """Its prefix, now computed, can be found by others."""
        whole = request.input_len // (self.blocks.part * self.blocks.tokens)
        shared = self.blocks.share(request.prefix[len(request.shared) : whole])
        request.blocks -= len(shared) * self.blocks.part
        request.shared = request.shared + shared

    def _decode(self, batch: Batch, request: Request, context: int, tokens: int) -> None:
        """A request joins those that decode, after `context` cached tokens."""
        steps = self.events.steps_for(tokens)
        request.step, request.end_step = batch.step, batch.step + steps
        request.context, request.tokens_a_step = float(context), tokens / steps
        batch.decoding += 1
        batch.context += context
        batch.growth += request.tokens_a_step
        heappush(batch.ends, (request.end_step, request.place, request))
        self._watch(batch, request)

    def _end(self, request: Request, now_s: float) -> None:
        request.end_s = now_s
        self.load -= 1
        self.release(request)
        self.events.ended(self, request, now_s)

    # Requests whose prompt was computed elsewhere.

    def claim(self, request: Request) -> int:
        """Keep a slot and blocks for a cache that is sent; their number, 0 where they are short."""
        tokens = request.input_len + self.policy.width
        if self.policy.prompts_first:
            tokens = self._most_tokens(request)
        count = self.blocks.needed(tokens)
        if self.running + self.claimed >= self.policy.slots or not self.blocks.take(count):
            return 0
        self.claimed += 1
        return count

    def _receive(self, batch: Batch) -> None:
        """Requests whose cache is there decode from their last prompt token on."""
        count = -(-len(self.ready) // len(self.batches))
        while self.ready and count:
            request, blocks = self.ready.popleft()
            count -= 1
            self.claimed -= 1
            request.blocks, request.unit = blocks, self.number
            self._place(batch, request)
            self._decode(batch, request, request.input_len - 1, request.output_len)
            batch.fresh.append(request)
