"""Outer steps in numpy, in float64: the papers' algorithms, to compare with."""

import numpy as np


def adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, decay=0.0):
    """The inner optimiser (parameters by name) -> a function of parameters and gradients that changes them in place."""

    def made(params):
        m, v = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
        count = 0

        def step(params, grads):
            nonlocal count
            count += 1
            for name, g in grads.items():
                m[name] = b1 * m[name] + (1 - b1) * g
                v[name] = b2 * v[name] + (1 - b2) * g**2
                moved = m[name] / (1 - b1**count) / (np.sqrt(v[name] / (1 - b2**count)) + eps)
                params[name] -= learning_rate * (moved + decay * params[name])

        return step

    return made


def muon(learning_rate, beta=0.95, eps=1e-8):
    """Keller Jordan's Muon with Nesterov momentum, as optax has it; vectors by NAdam."""
    a, b, c = 3.4445, -4.7750, 2.0315

    def orthogonal(x):
        turned = x.shape[0] > x.shape[1]
        x = x.T if turned else x
        x = x / (np.linalg.norm(x) + eps)
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if turned else x

    def made(params):
        m, v = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
        count = 0

        def step(params, grads):
            nonlocal count
            count += 1
            for name, g in grads.items():
                matrix = g.ndim == 2
                rate = beta if matrix else 0.9
                m[name] = rate * m[name] + (1 - rate) * g
                ahead = rate * m[name] / (1 - rate ** (count + 1)) + (1 - rate) * g / (1 - rate**count)
                if matrix:
                    rows, columns = g.shape
                    moved = orthogonal(ahead) * np.sqrt(max(1, columns / rows))
                else:
                    v[name] = 0.999 * v[name] + 0.001 * g**2
                    moved = ahead / (np.sqrt(v[name] / (1 - 0.999**count)) + eps)
                params[name] -= learning_rate * moved

        return step

    return made


def nesterov(learning_rate, momentum):
    """The outer optimiser: a function of the name, the anchor and the mean difference that gives the new anchor."""
    trace = {}

    def step(name, anchor, mean):
        trace[name] = mean + momentum * trace.get(name, 0)
        return anchor - learning_rate * (mean + momentum * trace[name])

    return step


def average(name, anchor, mean):
    """The outer optimiser that moves the anchor to the mean of the workers."""
    return anchor - mean


class Run:
    """A run with outer steps: the anchor, each worker's own parameters, and the residuals, by name."""

    def __init__(self, params, workers, *, every, inner, outer, send, parts=None, decay=1.0, delay=0, alpha=0.0):
        """Begins a run.

        Args:
          params: by name.
          workers: how many.
          every: the local steps of a period.
          inner: see `adamw`.
          outer: see `nesterov`.
          send: tensors by name -> the tensors as they arrive; None: as they are.
          parts: the names of each fragment, by default one of all.
          decay: the share of a residual that stays; None: there are no residuals.
          delay: the steps between an exchange and the moment when a worker goes on from the new anchor.
          alpha: a worker's share in what it goes on from.
        """
        self.anchor = {name: np.asarray(x, np.float64) for name, x in params.items()}
        self.own = [{name: x.copy() for name, x in self.anchor.items()} for _ in range(workers)]
        self.residual = [{name: np.zeros_like(x) for name, x in self.anchor.items()} for _ in range(workers)]
        self.inner, self.outer = [inner(self.anchor) for _ in range(workers)], outer
        self.send, self.decay = send or dict, decay
        self.every, self.parts, self.delay, self.alpha = every, parts or [list(params)], delay, alpha

    def train(self, gradient, steps):
        """So many local steps; gradient: (parameters, step, worker) -> gradients by name."""
        for done in range(steps):
            if self.delay:
                self.exchange(done)
            for worker, (own, step) in enumerate(zip(self.own, self.inner, strict=True)):
                step(own, gradient(own, done, worker))
            if not self.delay:
                self.exchange(done + 1)
            self.adopt(done + 1 - self.delay)
        return self

    def due(self, done):
        """The fragments that are exchanged after so many steps."""
        ends = [self.every * (part + 1) // len(self.parts) for part in range(len(self.parts))]
        return [self.parts[part] for part, end in enumerate(ends) if done >= end and (done - end) % self.every == 0]

    def exchange(self, done):
        for names in self.due(done):
            sent = []
            for own, residual in zip(self.own, self.residual, strict=True):
                owed = {name: self.anchor[name] - own[name] + (self.decay or 0) * residual[name] for name in names}
                sent.append(self.send(owed))
                if self.decay is not None:
                    residual |= {name: owed[name] - sent[-1][name] for name in names}
            for name in names:
                mean = np.mean([x[name] for x in sent], axis=0)
                self.anchor[name] = self.outer(name, self.anchor[name], mean)

    def adopt(self, done):
        for names in self.due(done):
            for own in self.own:
                own |= {name: self.alpha * own[name] + (1 - self.alpha) * self.anchor[name] for name in names}
