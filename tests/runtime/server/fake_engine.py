"""An engine that says what it is told to: for tests of the API, and for measuring the HTTP layer alone."""

from __future__ import annotations

import time

from qcn_compile.errors import DeviceError
from qcn_compile.runtime.detokenize import Detokenizer
from qcn_compile.runtime.output import Output
from qcn_compile.runtime.request import FinishReason
from qcn_compile.runtime.sampler import Sample


class _Live:
    def __init__(self, prompt, params, tokens, detokenizer):
        self.prompt, self.params, self.tokens, self.detokenizer = prompt, params, tokens, detokenizer
        self.place = 0


class FakeEngine:
    """One token a request a step. `reply(prompt, params)` gives the text; it ends with the end token.

    `delay`: seconds a step takes. `fail_at`: the step that raises. `steps` counts them.
    """

    def __init__(self, tokenizer, reply, slots=8, delay=0.0, fail_at=None):
        self.reply, self.slots, self.delay, self.fail_at = reply, slots, delay, fail_at
        self._tokenizer, self._live, self.steps = tokenizer, {}, 0
        self._eos = min(tokenizer.defaults.eos_token_ids)
        self.seen = []
        self.aborted = []
        self.cached = 0

    @property
    def unfinished(self):
        return len(self._live)

    def occupancy(self):
        used = min(self.slots, len(self._live))
        return used, self.slots, used, self.slots

    def add_request(self, prompt, params, request_id=None, constraint=None, after=None):
        self.seen.append((list(prompt), params))
        tokens = [*self._tokenizer.encode(self.reply(prompt, params)), self._eos]
        detokenizer = Detokenizer(self._tokenizer.token_bytes, params.stop, params.include_stop)
        self._live[request_id] = _Live(prompt, params, tokens, detokenizer)
        return request_id

    def abort(self, request_id):
        self.aborted.append((request_id, self.steps))
        self._live.pop(request_id, None)

    def step(self, launching=lambda: None):
        launching()
        self.steps += 1
        if self.steps == self.fail_at:
            raise DeviceError("kernel moe_experts failed")
        if self.delay:
            time.sleep(self.delay)
        return [self._advance(name, self._live[name]) for name in list(self._live)[:self.slots]]

    def _advance(self, name, live):
        token = live.tokens[live.place]
        live.place += 1
        wanted = live.params.logprobs
        top = () if wanted is None else tuple((token, -0.5) for _ in range(min(wanted, 1)))
        sample = Sample(token, None if wanted is None else -0.5, top)
        text = "" if token == self._eos else live.detokenizer.push((token,))
        reason = None
        if token == self._eos or live.detokenizer.stopped:
            reason = FinishReason.stop
        elif live.place == live.params.max_tokens:
            reason = FinishReason.length
        if reason is not None:
            text += live.detokenizer.finish()
            del self._live[name]
        output = Output(name, text, (token,), reason, (sample,), None, live.detokenizer.matched if reason else None)
        if live.place == 1:
            object.__setattr__(output, "cached", self.cached)
        return output
